"""Strips: as wide as the memory allows, what they cost, and what they read and write."""

import random
import time
from dataclasses import replace

import numpy as np
import pytest
from support.plans import bands_of, chain

from engine.errors import BudgetError
from engine.geometry import Box
from engine.plan import strips as bands
from engine.plan.cost import GIB, BandCost, Budget, StageCost, check
from engine.plan.measured import Footprint
from engine.plan.plan import Plan, shard_of

BASELINE = 300 << 20
COST = StageCost(Footprint(0, 0.0, 0.0), False, BandCost(16, 200_000.0, 1e-6))
STRUCTURE = StageCost(Footprint(5 << 20, 400.0, 1e-6), False)


def planned(stages, host, costs=None, size=None):
    """The plan and the projection for this much memory, as a job makes them."""
    costs, last = costs or [COST] * len(stages), stages[-1]
    size = size or (last.height * last.scale, last.width * last.scale)
    chosen = bands.choose_strips(stages, costs, STRUCTURE, Budget(host, None, 1 << 50), BASELINE, size[1])
    shard, chunk = bands.shard_of_strips(chosen[-1].tile * chosen[-1].scale, size[1])
    base = (stages[0].height, stages[0].width)
    plan = Plan(size, Box(0, 0, *size), base, chosen, shard, chunk, 0, "", "fp32", "auto", "cpu", "bands")
    return plan, bands.project(plan, costs, STRUCTURE, BASELINE)


@pytest.mark.parametrize("align", [1, 8])
def test_less_memory_means_narrower_strips_that_fit(align):
    widths = []
    for host in (int(v) for v in np.geomspace(0.4, 8, 40) * GIB):
        try:
            plan, projection = planned(chain(align=align), host)
        except BudgetError:
            assert not widths, "a larger budget was refused where a smaller one was not"
            continue
        check(plan, projection, Budget(host, None, 1 << 50))
        for stage in plan.stages:
            stage.check()
        strips = list(plan.column_strips())
        assert len(strips) == 1 or plan.shard <= bands.SHARD
        assert all(x % plan.shard == 0 for x, _ in strips)
        assert projection.tasks == (len(strips),) * 3
        widths.append(plan.stages[-1].tile)
    assert widths == sorted(widths)
    assert widths[0] == bands.SHARD // 4
    assert widths[-1] * 4 == 16384
    assert len(set(widths)) > 5


def test_the_narrowest_strip_is_refused_with_what_would_do():
    """The number in the message is the truth: given that much, the same call succeeds."""
    words = (
        r"bands: the narrowest strip \(1024 px\) needs ([\d.]+) GiB of memory, --memory allows 0.35 GiB; raise it, or "
    )
    with pytest.raises(BudgetError, match=words) as caught:
        planned(chain(), int(0.35 * GIB))
    need = float(str(caught.value).split("needs ")[1].split()[0])
    planned(chain(), int((need + 0.01) * GIB))
    with pytest.raises(BudgetError):
        planned(chain(), int((need - 0.01) * GIB))


def test_narrower_strips_cost_their_halos_and_nothing_else():
    (one, whole), (many, cut) = planned(chain(), 1 << 50), planned(chain(), int(0.7 * GIB))
    strips = list(many.column_strips())
    assert len(strips) > 1
    assert whole.lr_pixels == tuple(s.height * s.width for s in one.stages)
    for index, stage in enumerate(many.stages):
        extra = (
            sum(last - first for first, last in (many.input_columns(strip)[index] for strip in strips)) - stage.width
        )
        assert extra > 0
        assert cut.lr_pixels[index] == whole.lr_pixels[index] + stage.height * extra
    assert cut.working < whole.working
    assert cut.disk == whole.disk
    assert cut.scratch == whole.scratch == 0


def test_all_stages_hold_their_rows_at_the_same_time():
    plan, projection = planned(chain(), 1 << 50)
    assert projection.host_parts["network"] == sum(200_000 * stage.width for stage in plan.stages)
    assert projection.device == 0
    on_device = replace(COST, on_device=True)
    stages = bands.with_strips(chain(), [on_device] * 3, 256)
    found = bands.project(replace(plan, stages=stages), [on_device] * 3, None, BASELINE)
    assert found.device >= 200_000 * (256 + 2 * 24)
    assert found.host_parts["network"] == 0


def test_the_widest_of_canvases_is_planned_at_once():
    start = time.perf_counter()
    plan, projection = planned(chain((540, 1024)), int(1.5 * GIB))
    assert time.perf_counter() - start < 1
    assert plan.size == (34560, 65536)
    assert projection.host <= 1.5 * GIB
    assert 1 < projection.tasks[0] <= 64
    assert sum(box.area for box in plan.writes()) == 34560 * 65536


# What they read and write, by brute force


def random_plan(seed):
    chance = random.Random(seed)
    align = chance.choice([1, 2, 8])
    scales = chance.choice([(4,), (2,), (4, 4), (2, 4), (4, 2, 2)])
    halos = [align * chance.randrange(3) for _ in scales]
    size = (chance.randrange(1, 500), chance.randrange(1, 700))
    step = chance.choice([8, 16, 24, 40])
    cores = [step] * len(scales)
    if chance.random() < 0.5:
        top, left = (chance.randrange(n) for n in size)
        roi = Box(top, left, chance.randrange(top, size[0]) + 1, chance.randrange(left, size[1]) + 1)
    else:
        roi = None
    shard, chunk = shard_of(step * scales[-1], 64)
    return bands_of(
        size, scales=scales, halos=halos, cores=cores, align=align, roi=roi, shard=shard, chunk=chunk, band=2 * align
    )


@pytest.mark.parametrize("seed", range(40))
def test_strips_and_writes_cover_the_output_once(seed):
    plan = random_plan(seed)
    height, width = plan.size
    assert [x for x0, x1 in plan.column_strips() for x in range(x0, x1)] == list(range(width))
    counts = np.zeros(plan.size, np.uint8)
    for box in plan.writes():
        counts[box.slices] += 1
        assert (box.y0 % plan.shard, box.x0 % plan.shard) == (0, 0)
        assert box.y1 % plan.shard == 0 or box.y1 == height
        assert (box.x0, box.x1) in set(plan.column_strips())
        assert box.height <= plan.shard
    assert (counts == 1).all()


@pytest.mark.parametrize("seed", range(40))
def test_a_strip_reads_its_columns_and_their_halos_in_every_stage(seed):
    plan = random_plan(seed)
    for strip in plan.column_strips():
        wanted = {x + plan.roi.x0 for x in range(*strip)}
        for stage, (first, last) in reversed(list(zip(plan.stages, plan.input_columns(strip), strict=True))):
            frame = stage.padded[1]
            reach = range(-stage.halo, stage.halo + 1)
            needed = {x // stage.scale + d for x in wanted for d in reach} & set(range(frame))
            assert first % stage.align == last % stage.align == 0
            assert 0 <= first <= min(needed) < first + stage.align
            assert last - stage.align <= max(needed) < last <= frame
            padding = np.pad(np.arange(stage.width), (0, frame - stage.width), mode="reflect")
            inside = stage.source_box(Box(0, first, stage.padded[0], last))
            assert set(padding[first:last]) <= set(range(inside.x0, inside.x1)) <= set(range(stage.width))
            wanted = set(range(inside.x0, inside.x1))
