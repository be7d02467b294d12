"""Tiles: their choice within a budget, their cost, and refusals with numbers."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from support.plans import GIB, chain, cost_of, measured_of

from engine.errors import BudgetError
from engine.geometry import Box
from engine.plan.cost import check, readable
from engine.plan.limits import HALVES_BYTES, SATURATING, cache_share, saturating_pixels, writers
from engine.plan.measured import Budget, Fallback, Footprint
from engine.plan.plan import Plan
from engine.plan.sides import shards_of
from engine.plan.tiles import (
    DEVICE_SLACK,
    LARGEST,
    LARGEST_BATCH,
    LARGEST_ON_DEVICE,
    SLACK,
    SMALLEST,
    choose_tiles,
    inner_edges,
    project,
    smaller_tile,
)

MIB = 1 << 20
BASELINE = 300 * MIB
DEVICE_BASELINE = 600 * MIB
BASE = Footprint(5 * MIB, 400.0, 1e-6)

# A full RRDBNet: 2048 floats per pixel at the output's size, and the trunk's.
LARGE = cost_of(20 * MIB, 12_000.0, 1e-5)
SMALL = cost_of(3 * MIB, 700.0, 1e-6)

CHAINS = {
    "the paper's": chain(),
    "one stage": chain(scales=(4,)),
    "no window": chain(halo=10, align=1),
    "a picture": chain(base=(900, 1200), scales=(4,), halo=10, align=1),
    "x2": chain(base=(200, 300), scales=(2, 2, 2), halo=16, align=2),
}
BUDGETS = [int(v) for v in np.geomspace(0.35, 64, 16) * GIB]

over_chains = pytest.mark.parametrize("stages", CHAINS.values(), ids=CHAINS)


def measured(stages, cost=LARGE, *, on_device=False, host=1 << 50, device=1 << 50, disk=1 << 50, **changes):
    """Measurements of stages of equal cost; budgets are unlimited by default."""
    changes = {"base": BASE, "baseline": BASELINE} | changes
    costs = [replace(cost, on_device=on_device)] * len(stages)
    return measured_of(costs, host=host, device=device, disk=disk, **changes)


def plan_of(stages, roi=None):
    last = stages[-1]
    size = (last.height * last.scale, last.width * last.scale)
    shard, chunk = shards_of(last.grid.cell)
    return Plan(
        canvas=size, roi=roi or Box(0, 0, *size), base=(stages[0].height, stages[0].width), stages=tuple(stages),
        shard=shard, chunk=chunk, seed=0, model_digest="", precision="fp32", backend="cpu",
    )  # fmt: skip


def with_tiles(stages, *tiles, **changes):
    """The stages with these tiles, or with one tile for all."""
    tiles = tiles if len(tiles) > 1 else tiles * len(stages)
    return tuple(replace(s, tile=tile, **changes) for s, tile in zip(stages, tiles, strict=True))


def projected(stages, measurements, *, batched=False, roi=None, writes=None):
    plan = plan_of(stages, roi)
    return plan, project(plan, measurements, writes, batched=batched)


def batches_of(stages, cost=LARGE, writes=None, **changes):
    """Projection of batches on a device."""
    changes = {"on_device": True, "device_baseline": DEVICE_BASELINE} | changes
    return projected(stages, measured(stages, cost, **changes), batched=True, writes=writes)[1]


def work(stages):
    return sum(len(s.grid) * math.prod(s.tile_shape) for s in stages)


# The choice of tiles


@over_chains
@pytest.mark.parametrize("kind", ["host", "device", "batched"])
def test_chosen_tiles_fit_every_budget(stages, kind):
    """Any budget is met or refused, and a larger one is never refused or used for more work."""
    for cost in (LARGE, SMALL):
        works = []
        for limit in BUDGETS:
            limits = {"host": limit, "device": None} if kind == "host" else {"device": limit, "on_device": True}
            baseline = DEVICE_BASELINE if kind == "batched" else 0
            measurements = measured(stages, cost, device_baseline=baseline, **limits)
            try:
                chosen = choose_tiles(stages, measurements, batched=kind == "batched")
            except BudgetError:
                assert not works, "a larger budget was refused where a smaller one was not"
                continue
            plan, projection = projected(chosen, measurements, batched=kind == "batched")
            check(plan, projection, measurements.budget)
            for stage in chosen:
                stage.check()
            assert projection.device > baseline or kind == "host"
            works.append(work(chosen))
        assert len(works) > len(BUDGETS) // 3
        assert works == sorted(works, reverse=True)
        # Small costs fit any budget, so that only a large one shows the difference.
        assert works[0] > works[-1] or cost is SMALL


@over_chains
@pytest.mark.parametrize("on_device", [False, True])
def test_unlimited_tiles_are_near_the_least_work(stages, on_device):
    """As little work as the best square, up to the slack, in tiles that fill the image."""
    slack, largest = (DEVICE_SLACK, LARGEST_ON_DEVICE) if on_device else (SLACK, LARGEST**2)
    for uncut, stage in zip(
        stages, choose_tiles(stages, measured(stages, on_device=on_device), batched=on_device), strict=True
    ):
        squares = range(uncut.align, math.isqrt(largest) + 1, max(8, uncut.align))
        assert work([stage]) <= slack * 1.01 * min(work([replace(uncut, tile=t)]) for t in squares)
        assert math.prod(stage.core) <= largest
        assert max(stage.core) <= 3 * min(stage.core)
        for side, cells, length in zip(stage.core, (stage.grid.rows, stage.grid.columns), stage.padded, strict=True):
            assert (side - 16) * cells < length, "the last row or column of tiles is nearly whole"


def test_tiles_of_long_images_span_them():
    """An image of a few rows is not cut into squares."""
    for base in ((8, 2000), (2000, 8)):
        (stage,) = choose_tiles(chain(base=base, scales=(4,)), measured(chain(scales=(4,))), batched=False)
        assert min(stage.core) == SMALLEST
        assert max(stage.core) > 10 * SMALLEST


GPU_WORK = [
    # (GiB of VRAM, MiB of the context, largest work of RRDBNet with a halo of 40, and of the shipped models' 14)
    (1.25, 450, 1.31, 1.10),
    (1.25, 600, 1.36, 1.11),
    (1.25, 650, 1.38, 1.11),
    (2, 450, 1.20, 1.07),
    (2, 650, 1.20, 1.07),
    (4, 650, 1.17, 1.07),
    (8, 650, 1.17, 1.07),
]


def test_work_on_a_gpu():
    """16384x8640 from 4096x2160 with 1,870 bytes a pixel (tests/probe); squares of a fixed list took 1.61 and 1.44."""
    for gib, context, large, small in GPU_WORK:
        for halo, most in ((40, large), (14, small)):
            stages = chain(base=(2160, 4096), scales=(4,), halo=halo, align=1)
            costs = measured(
                stages, cost_of(0, 1870.0, 1e-7), on_device=True, device=int(gib * GIB), base=None,
                device_baseline=(context + 34) * MIB,
            )  # fmt: skip
            chosen = choose_tiles(stages, costs, batched=True)
            plan, projection = projected(chosen, costs, batched=True)
            check(plan, projection, costs.budget)
            assert projection.lr_pixels[0] / (2160 * 4096) <= most, (gib, context, halo)


def test_tiles_hold_their_blend():
    """However small the budget: a cross-fade is never wider than the tile."""
    stages = tuple(replace(s, blend=200) for s in chain(base=(900, 1200), scales=(4,)))
    tiles = set()
    for limit in BUDGETS:
        try:
            (stage,) = choose_tiles(stages, measured(stages, host=limit), batched=False)
        except BudgetError:
            continue
        stage.check()
        tiles |= {*stage.core}
    assert 200 <= min(tiles) < 240


def test_device_and_host_have_their_own_limits():
    stages = chain()
    measurements = measured(stages, on_device=True, device=GIB)
    chosen = choose_tiles(stages, measurements, batched=False)
    projection = projected(chosen, measurements)[1]
    assert projection.device <= GIB
    assert projection.device == max(LARGE.footprint.bytes_at(math.prod(s.tile_shape)) for s in chosen)
    # The network's tiles are not in the host's memory; a small host limits the tiles in hand all the same.
    measurements = measured(stages, on_device=True, host=BASELINE + 256 * MIB)
    small = choose_tiles(stages, measurements, batched=False)
    check(*projected(small, measurements), measurements.budget)


def test_next_smaller_tile_is_smaller():
    for core in ((2048, 2048), (96, 2048), (512, 64)):
        (stage,) = chain(base=(500, 700), scales=(4,), halo=24)
        sizes, smaller = [], stage.with_core(core)
        while smaller is not None:
            stage = smaller
            stage.check()
            assert all(side <= largest for side, largest in zip(stage.core, core, strict=True))
            sizes.append(math.prod(stage.tile_shape))
            smaller = smaller_tile(stage)
        assert len(sizes) > 3
        assert sizes == sorted(set(sizes), reverse=True)
        assert SMALLEST <= max(stage.core) < 2 * SMALLEST
    assert smaller_tile(replace(stage, tile=64, tile_rows=96, blend=64)) is None


def test_inner_edges_of_tiles():
    stages = with_tiles(chain(), 256, 64, 64)
    assert inner_edges(plan_of(stages)) == [False, True, True]


# Batches on a device


def test_small_tiles_are_batched():
    stages = with_tiles(chain(), 64, 32, 480, halo=8)
    projection = batches_of(stages)
    tasks = projection.tasks
    assert projection.batches == (min(tasks[0], SATURATING // 80**2), min(LARGEST_BATCH, SATURATING // 48**2), 1)
    # A small GPU is busy with fewer.
    assert batches_of(stages, saturating=5 * 48**2).batches == (1, 5, 1)
    # A CPU gains nothing from batches, and tiles one by one have none.
    assert batches_of(stages, on_device=False).batches == (1, 1, 1)
    assert projected(stages, measured(stages, on_device=True))[1].batches == ()
    # A batch is not larger than the work that is left.
    left = batches_of(stages, writes=list(plan_of(stages).writes())[-1:])
    assert left.batches[1] <= left.tasks[1] < projection.tasks[1]


def test_batches_shrink_to_fit():
    stages = with_tiles(chain(), 64)
    alone, most = batches_of(stages, device=0), batches_of(stages)
    assert alone.batches == (1, 1, 1)
    sizes = []
    for room in np.geomspace(1, 64, 12):
        device = int(alone.device * room)
        projection = batches_of(stages, device=device)
        check(plan_of(stages), projection, Budget(1 << 50, device, 1 << 50))
        sizes.append(sum(projection.batches))
    assert sizes == sorted(sizes)
    assert sizes[0] == 3 < sizes[-1]
    # The host's memory, which holds their outputs, limits them as well.
    host = alone.host + (most.host - alone.host) // 2
    projection = batches_of(stages, host=host)
    check(plan_of(stages), projection, Budget(host, 1 << 50, 1 << 50))
    assert sum(projection.batches) < sum(most.batches)


def test_batches_leave_room_for_a_tile_in_float32():
    """As far as a single tile leaves any; beyond, the projection is the budget, within which the tile runs alone."""
    stages = with_tiles(chain(), 64)
    fp32 = Fallback(100 * MIB, Footprint(40 * MIB, 24_000.0, 0.0), None)
    cost = replace(LARGE, fp32=fp32)
    (rows, columns), alone = stages[0].tile_shape, batches_of(stages, device=0)
    redo = 3 * 100 * MIB + 40 * MIB + 24_000 * rows * columns + 12 * (64 * 4) ** 2 + 12 * rows * columns
    plain = batches_of(stages, device=2 * alone.device)
    assert plain.device_in_fp32 == plain.device
    with_room = batches_of(stages, cost, device=2 * alone.device)
    assert with_room.device_in_fp32 == with_room.device + redo <= 2 * alone.device
    assert sum(with_room.batches) < sum(plain.batches)
    tight = batches_of(stages, cost, device=alone.device + redo // 2)
    assert tight.batches == (1, 1, 1)
    assert tight.device_in_fp32 == alone.device + redo // 2


def test_device_holds_one_network_and_all_buffers():
    stages = with_tiles(chain(), 64, 128, 256)
    projection = batches_of(stages, device=0)
    pixels = [math.prod(s.tile_shape) for s in stages]
    # Source pixels, inputs and outputs; those of the largest network are in its footprint already.
    buffers = [12 * n * (1 + 1 + 16) for n in pixels]
    inner = sum(12 * (s.tile * 4) ** 2 for s in stages[:2])
    outputs = 3 * (stages[2].tile * 4) ** 2 * 5 // 4  # with their half
    network = LARGE.footprint.bytes_at(max(pixels))
    assert projection.device == DEVICE_BASELINE + network + sum(buffers) - max(buffers) + inner + outputs
    shard = 4 * 3 * math.prod(plan_of(stages).shard)
    assert projection.host_parts["shards"] == writers(shard) * shard + HALVES_BYTES


@pytest.mark.parametrize(
    ("cores", "mib", "threads"), [(1, 12, 2), (2, 12, 2), (6, 12, 5), (16, 12, 8), (16, 48, 5), (16, 500, 2)]
)
def test_writers_follow_the_cores_and_the_memory(cores, mib, threads):
    assert writers(mib << 20, cores) == threads


def test_batches_follow_the_gpu():
    """Eight blocks for each multiprocessor, or as many as the second-level cache holds, and at least four."""
    gpus = {"rtx-3060": (28, 3), "rtx-4090": (128, 72), "a100": (108, 40), "h100": (132, 50)}
    pixels = {name: saturating_pixels(count, cache << 20) for name, (count, cache) in gpus.items()}
    assert pixels == {"rtx-3060": 14336, "rtx-4090": 131072, "a100": 96768, "h100": 135168}


# Refusals


@pytest.mark.parametrize("kind", ["memory", "vram"])
def test_smallest_tile_is_refused_with_its_need(kind):
    """The number in the message is the truth: with that much, the same call succeeds."""
    stages = chain(halo=160)

    def choose(gib):
        limits = {"device": int(gib * GIB), "on_device": True} if kind == "vram" else {"host": int(gib * GIB)}
        return choose_tiles(stages, measured(stages, **limits), batched=False)

    words = (
        rf"{kind}: the smallest tile of step \d \(\d+x\d+ with its halo of 160\) needs ([\d.]+) GiB of {kind}, "
        rf"more than 0.40 GiB; give at least {kind}='(\d+)MiB', or use a smaller overlap or half precision"
    )
    with pytest.raises(BudgetError, match=f"(?i){words}") as caught:
        choose(0.4)
    need = float(re.search(r"needs ([\d.]+) GiB", str(caught.value))[1])
    assert need > 0.4
    assert choose(need + 0.01)
    assert choose(int(re.search(r"(\d+)MiB", str(caught.value))[1]) / 1024)
    with pytest.raises(BudgetError):
        choose(need - 0.01)


def test_large_step_1_is_refused_with_its_remedy():
    """No tile helps against a base image that is too large."""
    stages = chain(base=(3000, 4000), scales=(4,))
    words = (
        r"memory: step 1 for its image of 4000x3000 needs [\d.]+ GiB of memory, more than 0.50 GiB; "
        r"give at least memory='\d+MiB', or use a smaller size"
    )
    with pytest.raises(BudgetError, match=words):
        choose_tiles(stages, measured(stages, SMALL, host=GIB // 2), batched=False)


def test_no_remedy_is_promised_below_the_idle_process():
    stages = chain(halo=160)
    with pytest.raises(BudgetError, match=r"give at least memory='\d+MiB', as the idle process takes \d"):
        choose_tiles(stages, measured(stages, host=measured(stages).baseline), batched=False)


EXCESSES = {
    "host": (
        GIB // 2,
        r"^memory: the plan \(largest part: \w.*, [\d.]+ GiB\) needs [\d.]+ GiB of memory, more than 0.50 GiB; give at "
        r"least memory='\d+MiB', or use tile below 256$",
    ),
    "device": (
        GIB // 4,
        r"^vram: the plan needs [\d.]+ GiB of VRAM, more than 0.25 GiB; give at least vram='\d+MiB', or use tile "
        r"below 256$",
    ),
    "disk": (
        GIB // 2,
        r"^disk: the output may take 0.\d\d GiB and the scratch array 0.\d\d GiB, more than 0.50 GiB free; make room, ",
    ),
}


@pytest.mark.parametrize("resource", EXCESSES)
def test_excess_is_refused_with_numbers(resource):
    stages = with_tiles(chain(), 256)
    limit, words = EXCESSES[resource]
    measurements = measured(stages, on_device=resource == "device")
    plan, projection = projected(stages, measurements)
    check(plan, projection, measurements.budget)
    with pytest.raises(BudgetError, match=words):
        check(plan, projection, replace(measurements.budget, **{resource: limit}))


def test_budget_is_enough_to_the_byte():
    stages = with_tiles(chain(), 64)
    measurements = measured(stages, on_device=True)
    plan, projection = projected(stages, measurements)
    used = {"host": projection.host, "device": projection.device, "disk": projection.disk + projection.scratch}
    for resource, size in used.items():
        check(plan, projection, replace(measurements.budget, **{resource: size}))
        with pytest.raises(BudgetError):
            check(plan, projection, replace(measurements.budget, **{resource: size - 1}))
    check(plan, projection, replace(measurements.budget, device=None))


def test_readable_bytes():
    sizes = {
        5 * GIB // 4: "1.25 GiB",
        GIB // 10: "0.10 GiB",
        12 * MIB: "12.0 MiB",
        3584: "3.5 KiB",
        1: "1 byte",
        0: "0 bytes",
    }
    assert {size: readable(size) for size in sizes} == sizes


# Projections


@pytest.fixture
def tiled():
    return with_tiles(chain(), 64, 128, 128)


def test_projection_sums_its_parts(tiled):
    projection = projected(tiled, measured(tiled))[1]
    assert projection.working == sum(projection.host_parts.values())
    assert projection.host == BASELINE + projection.working
    assert min(projection.host_parts.values()) > 0
    assert projection.to_json()["host"] == projection.host
    assert projection.to_json()["working"] == projection.working


def test_projection_counts_buffers(tiled):
    """The base image; the tile being filled and its source; the input of every stage; four shards."""
    plan, projection = projected(tiled, measured(tiled))
    parts = projection.host_parts
    assert parts["base image"] == 12 * 135 * 256
    inputs = sum(12 * math.prod(s.tile_shape) for s in tiled)
    assert parts["tiles in hand"] == 2 * 12 * (128 * 4) ** 2 + inputs
    assert parts["shards"] == 4 * 3 * math.prod(plan.shard)
    assert parts["allocator"] > 0.1 * (projection.working - parts["allocator"])
    assert "borders" not in parts


def test_projection_counts_flat_tiles(tiled):
    """By their area: the network, the tile in hand, its shard and its borders."""
    flat = (*tiled[:-1], replace(tiled[-1], tile=256, tile_rows=64))
    plan, projection = projected(flat, measured(flat))
    assert plan.shard == (256, 1024)
    parts, pixels = projection.host_parts, [math.prod(s.tile_shape) for s in flat]
    assert parts["network"] == LARGE.footprint.bytes_at(max(pixels))
    assert parts["tiles in hand"] == 2 * 12 * (128 * 4) ** 2 + 12 * sum(pixels)
    assert parts["shards"] == 4 * 3 * 256 * 1024
    blended = (*tiled[:-1], replace(flat[-1], blend=16))
    borders = projected(blended, measured(blended))[1].host_parts["borders"]
    assert borders == blended[-1].borders_kept * 12 * 64 * (64 * 4 + 256 * 4 + 64)


def test_projection_counts_blend_borders(tiled):
    last = replace(tiled[-1], blend=16)
    parts = projected((*tiled[:-1], last), measured(tiled))[1].host_parts
    assert last.borders_kept == 2 * 32 + 3
    # A strip to the right and one below, each of blend x tile, and their corner.
    assert parts["borders"] == last.borders_kept * 12 * (2 * 512 * 64 + 64**2)


def test_networks_run_one_at_a_time(tiled):
    costs = measured_of([SMALL, LARGE, SMALL], base=BASE, baseline=BASELINE)
    largest = LARGE.footprint.bytes_at(math.prod(tiled[1].tile_shape))
    assert projected(tiled, costs)[1].host_parts["network"] == largest
    greedy = measured(tiled, SMALL, base=Footprint(50 * GIB, 0, 0))
    assert projected(tiled, greedy)[1].host_parts["network"] == 50 * GIB


def test_inner_stages_have_their_own_caches(tiled):
    """Each of the two inner stages is cached within its share, and never beyond its whole image."""
    first, second = (s.height * s.width * s.scale**2 * 12 for s in tiled[:2])
    share = cache_share(3)
    assert first < share < second
    assert projected(tiled, measured(tiled))[1].host_parts["cache"] == first + share
    single = chain(scales=(4,))
    assert projected(single, measured(single))[1].host_parts["cache"] == 0


def test_regions_cache_the_last_stage(tiled):
    """A region's shards do not line up with the tiles, which are kept until their neighbours are written."""
    whole = projected(tiled, measured(tiled))[1]
    plan, part = projected(tiled, measured(tiled), roi=Box(100, 100, 6000, 6000))
    assert part.host_parts["cache"] == whole.host_parts["cache"] + cache_share(3)
    tiles = list(plan.stages[-1].tiles(plan.roi))
    inner = [
        min(s.height * s.width * s.scale**2, k * math.prod(s.core) * s.scale**2) * 12
        for s, k in zip(plan.stages[:-1], part.tasks, strict=False)
    ]
    assert part.scratch == sum(inner) + 3 * sum(t.cell.area for t in tiles) < whole.scratch + 3 * plan.roi.area * 2


def test_time_is_pixels_times_seconds(tiled):
    seconds = (1e-6, 2e-6, 4e-6)
    costs = [cost_of(seconds=s) for s in seconds]
    plan, projection = projected(tiled, measured_of(costs))
    counts = plan.tiles_to_run(list(plan.writes()))
    pixels = tuple(k * math.prod(s.tile_shape) for k, s in zip(counts, plan.stages, strict=True))
    expected = sum(n * s for n, s in zip(pixels, seconds, strict=True))
    assert projection.tasks == counts
    assert projection.lr_pixels == pixels
    assert projection.seconds == pytest.approx(expected)
    with_step_1 = projected(tiled, measured_of(costs, base=BASE))[1]
    assert with_step_1.seconds == pytest.approx(expected + 135 * 256 * 1e-6)


def test_fewer_writes_take_less_time_not_memory(tiled):
    plan, whole = projected(tiled, measured(tiled))
    rest = project(plan, measured(tiled), list(plan.writes())[-3:], batched=False)
    assert rest.seconds < whole.seconds
    assert rest.host == whole.host


def test_disk_is_the_uncompressed_pyramid(tiled):
    plan, projection = projected(tiled, measured(tiled))
    assert projection.disk == sum(3 * h * w for h, w in plan.pyramid)
    assert projection.scratch == sum(12 * s.height * s.width * s.scale**2 for s in tiled[:2])
