"""Strips: their choice, their cost, and the columns that they read and write."""

import math
import re
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.plans import GIB, bands_of, chain, cost_of, measured_of, square

from engine.errors import BudgetError
from engine.geometry import Box
from engine.plan import strips
from engine.plan.cost import check
from engine.plan.measured import BandCost, Fallback, Footprint
from engine.plan.plan import Plan
from engine.plan.sides import shard_of

quick = settings(deadline=None, derandomize=True, max_examples=50)

COST = cost_of(bands=BandCost(16, 200_000.0, 1e-6))
LIMITS = {"base": Footprint(5 << 20, 400.0, 1e-6), "baseline": 300 << 20}


def measured(cost=COST, count=3, **changes):
    return measured_of([cost] * count, **(LIMITS | changes))


def planned(stages, host, cost=COST, device=None):
    """The plan, its projection and the budget for this much memory."""
    measurements = measured(cost, len(stages), host=host, device=device)
    last = stages[-1]
    size = (last.height * last.scale, last.width * last.scale)
    chosen = strips.choose_strips(stages, measurements, size[1])
    shard, chunk = (square(side) for side in strips.shard_of_strips(chosen[-1], size[1]))
    plan = Plan(
        canvas=size, roi=Box(0, 0, *size), base=(stages[0].height, stages[0].width), stages=chosen, shard=shard,
        chunk=chunk, seed=0, model_digest="", precision="fp32", backend="cpu", executor="bands",
    )  # fmt: skip
    return plan, strips.project(plan, measurements), measurements.budget


@pytest.mark.parametrize("align", [1, 8])
def test_less_memory_means_narrower_strips(align):
    widths = []
    for host in (int(v) for v in np.geomspace(0.4, 8, 40) * GIB):
        try:
            plan, projection, budget = planned(chain(align=align), host)
        except BudgetError:
            assert not widths, "a larger budget was refused where a smaller one was not"
            continue
        check(plan, projection, budget)
        for stage in plan.stages:
            stage.check()
        columns = list(plan.column_strips())
        assert len(columns) == 1 or plan.shard[1] <= strips.SHARD
        assert all(x % plan.shard[1] == 0 for x, _ in columns)
        assert projection.tasks == (len(columns),) * 3
        widths.append(plan.stages[-1].tile)
    assert widths == sorted(widths)
    assert widths[0] == strips.SHARD // 4
    assert widths[-1] * 4 == 16384
    assert len(set(widths)) > 5


def test_rows_in_float32_are_projected_within_the_budget():
    """In place of those in half precision, for all stages that have it, with their weights."""
    fp32 = Fallback(64 << 20, Footprint(0, 0.0, 0.0), BandCost(16, 300_000.0, 0.0))
    half = cost_of(bands=BandCost(16, 200_000.0, 1e-6), on_device=True, fp32=fp32)
    for device in (4 * GIB, 16 * GIB):
        plan, projection, budget = planned(chain(), 1 << 50, half, device=device)
        columns = strips._columns(plan.stages, min(plan.strip, plan.size[1]))
        more = sum((64 << 20) + 100_000 * n for n in columns)
        assert projection.device_in_fp32 == min(projection.device + more, device)
        check(plan, projection, budget)


@pytest.mark.parametrize("resource", ["memory", "VRAM"])
def test_narrowest_strip_is_refused_with_its_need(resource):
    """The number in the message is the truth: with that much, the same call succeeds."""

    def plan(limit):
        on_device = resource == "VRAM"
        cost = cost_of(bands=BandCost(16, 2e6, 1e-6), on_device=True) if on_device else COST
        return planned(chain(), 1 << 50 if on_device else limit, cost, device=limit if on_device else None)

    limit = {"memory": 0.35, "VRAM": 0.2}[resource]
    words = (
        rf"{resource.lower()}: the narrowest strip of bands \(1024 px\) needs ([\d.]+) GiB of {resource}, "
        rf"more than {limit:.2f} GiB; give at least {resource.lower()}='(\d+)MiB'"
    )
    with pytest.raises(BudgetError, match=words) as caught:
        plan(int(limit * GIB))
    need = float(re.search(words, str(caught.value))[1])
    plan(int((need + 0.01) * GIB))
    plan(int(re.search(words, str(caught.value))[2]) << 20)
    with pytest.raises(BudgetError):
        plan(int((need - 0.01) * GIB))


def test_narrow_strips_cost_their_halos():
    (_, whole, _), (many, cut, _) = planned(chain(), 1 << 50), planned(chain(), int(0.7 * GIB))
    columns = list(many.column_strips())
    assert len(columns) > 1
    for index, stage in enumerate(many.stages):
        width = sum(last - first for first, last in (many.input_columns(strip)[index] for strip in columns))
        assert width > stage.width
        assert stage.height <= whole.lr_pixels[index] / stage.width <= stage.height + stage.band
        assert cut.lr_pixels[index] * stage.width == whole.lr_pixels[index] * width
    assert cut.working < whole.working
    assert cut.disk == whole.disk
    assert cut.scratch == whole.scratch == 0


def test_work_counts_partial_bands_and_margins():
    """The first and the last band are filled in part, and the margin above the output is computed and dropped."""
    (uncut,) = chain(base=(135, 256), scales=(4,), halo=8)
    for margin in (0, 8):
        (cut,) = strips.with_strips([replace(uncut, margin=margin)], measured(count=1), 256)
        plan = replace(bands_of(cut.grid.bounds.shape, cores=(16,), halos=(8,), scales=(4,)), stages=(cut,))
        projection = strips.project(plan, measured(count=1, base=None))
        assert 135 - margin <= projection.lr_pixels[0] / 256 <= 135 + 16
        assert projection.seconds == pytest.approx(projection.lr_pixels[0] * 1e-6)


def test_all_stages_hold_their_rows_at_once():
    plan, projection, _ = planned(chain(), 1 << 50)
    assert projection.host_parts["network"] == sum(200_000 * stage.width for stage in plan.stages)
    assert projection.device == 0
    on_device = measured(replace(COST, on_device=True), base=None)
    stages = strips.with_strips(chain(), on_device, 256)
    projection = strips.project(replace(plan, stages=stages), on_device)
    assert projection.device >= 200_000 * (256 + 2 * 24)
    assert projection.host_parts["network"] == 0


def test_device_holds_context_and_weights_beside_the_rows():
    """With a budget of exactly the projection a width is chosen; the context alone moves it to narrower strips."""
    cost = replace(COST, on_device=True)
    bare, projection, _ = planned(chain(), 1 << 50, cost, device=1 << 50)
    assert len(list(bare.column_strips())) == 1
    for context, is_whole in ((0, True), (1, False), (450 << 20, False)):
        measurements = measured(cost, host=1 << 50, device=projection.device, device_baseline=context)
        chosen = strips.choose_strips(chain(), measurements, 16384)
        assert (chosen == bare.stages) == is_whole
        plan = replace(bare, stages=chosen, shard=strips.SHARD)
        rows = strips.project(plan, replace(measurements, device_baseline=0)).device
        assert strips.project(plan, measurements).device == rows + context <= projection.device


def test_inner_edges_of_strips():
    one, many = planned(chain(), 1 << 50)[0], planned(chain(), int(0.7 * GIB))[0]
    assert strips.inner_edges(one) == [False] * 3
    assert strips.inner_edges(many) == [True] * 3


def test_streamable_needs_every_cost():
    assert strips.streamable(measured())
    assert not strips.streamable(measured_of([COST, cost_of()]))


def test_widest_canvas_is_planned_at_once():
    start = time.perf_counter()
    plan, projection, _ = planned(chain((540, 1024)), int(1.5 * GIB))
    assert time.perf_counter() - start < 1
    assert plan.size == (34560, 65536)
    assert projection.host <= 1.5 * GIB
    assert 1 < projection.tasks[0] <= 64
    assert sum(box.area for box in plan.writes()) == 34560 * 65536


@st.composite
def plans(draw):
    """Any small plan of bands, of a whole image or a region."""
    align = draw(st.sampled_from([1, 2, 8]))
    scales = draw(st.sampled_from([(4,), (2,), (4, 4), (2, 4), (4, 2, 2)]))
    size = draw(st.integers(1, 499)), draw(st.integers(1, 699))
    tile = draw(st.sampled_from([8, 16, 24, 40]))
    roi = None
    if draw(st.booleans()):
        top, left = (draw(st.integers(0, n - 1)) for n in size)
        roi = Box(top, left, draw(st.integers(top + 1, size[0])), draw(st.integers(left + 1, size[1])))
    shard, chunk = map(square, shard_of(tile * scales[-1], 64))
    return bands_of(
        size, scales=scales, halos=[align * draw(st.integers(0, 2)) for _ in scales], cores=[tile] * len(scales),
        align=align, roi=roi, shard=shard, chunk=chunk, band=2 * align,
    )  # fmt: skip


@quick
@given(plans())
def test_strips_and_writes_cover_once(plan):
    height, width = plan.size
    columns = list(plan.column_strips())
    assert [x for x0, x1 in columns for x in range(x0, x1)] == list(range(width))
    counts = np.zeros(plan.size, np.uint8)
    for box in plan.writes():
        counts[box.slices] += 1
        assert (box.y0 % plan.shard[0], box.x0 % plan.shard[1]) == (0, 0)
        assert box.y1 % plan.shard[0] == 0 or box.y1 == height
        assert (box.x0, box.x1) in columns
        assert box.height <= plan.shard[0]
    assert (counts == 1).all()


@quick
@given(plans())
def test_narrower_strips_are_whole_shards(plan):
    """Down to one shard, or one shard's worth of windows; every cut can be written beside the wider one."""
    cuts, strip = plan.stages, min(plan.strip, plan.size[1])
    while (cuts := strips.narrower(plan, cuts)) is not None:
        cut = replace(plan, stages=cuts)
        assert cut.strip < strip
        assert cut.strip % plan.shard[1] == cuts[-1].tile % cuts[-1].align == 0
        assert [(s.halo, s.band) for s in cuts] == [(s.halo, s.band) for s in plan.stages]
        assert sum(box.area for box in cut.writes()) == plan.size[0] * plan.size[1]
        strip = cut.strip
    last = plan.stages[-1]
    assert strip <= math.lcm(plan.shard[1], last.scale * last.align)


@quick
@given(plans())
def test_strips_read_their_columns_and_halos(plan):
    """In every stage, by brute force."""
    for strip in plan.column_strips():
        columns = {x + plan.roi.x0 for x in range(*strip)}
        for stage, (first, last) in reversed(list(zip(plan.stages, plan.input_columns(strip), strict=True))):
            frame = stage.padded[1]
            reach = range(-stage.halo, stage.halo + 1)
            needed = {x // stage.scale + d for x in columns for d in reach} & set(range(frame))
            assert first % stage.align == last % stage.align == 0
            assert 0 <= first <= min(needed) < first + stage.align
            assert last - stage.align <= max(needed) < last <= frame
            padding = np.pad(np.arange(stage.width), (0, frame - stage.width), mode="reflect")
            source = range(*stage.source_columns((first, last)))
            assert set(padding[first:last]) <= set(source) <= set(range(stage.width))
            columns = set(source)


@quick
@given(plans(), st.data())
def test_projection_of_some_writes(plan, data):
    """Strips are counted once each; fewer writes take no more time, and the same memory."""
    measurements = measured(count=len(plan.stages))
    writes = list(plan.writes())
    first = data.draw(st.integers(0, len(writes) - 1))
    assume(first)
    whole, rest = (strips.project(plan, measurements, w) for w in (writes, writes[first:]))
    assert whole == strips.project(plan, measurements)
    assert rest.tasks == (len({(box.x0, box.x1) for box in writes[first:]}),) * len(plan.stages)
    assert rest.seconds <= whole.seconds
    assert (rest.host, rest.disk) == (whole.host, whole.disk)
