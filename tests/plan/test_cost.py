"""Budgets: what is chosen fits, what does not fit is refused with the numbers, more memory never costs more work."""

import dataclasses
import math
import re

import numpy as np
import pytest
from support.plans import chain

from engine.errors import BudgetError
from engine.geometry import Box
from engine.plan.cost import GIB, Budget, StageCost, check
from engine.plan.limits import IN_FLIGHT, WRITERS, cache_share
from engine.plan.measured import Footprint
from engine.plan.plan import BATCHED, Plan, shard_of
from engine.plan.tiles import LARGEST_BATCH, SATURATING, TILES, WORK_SLACK, choose_tiles, project, smaller_tile

MIB = 1 << 20
BASELINE = 300 * MIB
PLENTY = Budget(host=1 << 50, device=1 << 50, disk=1 << 50)

# Of a full RRDBNet: 2048 floats a pixel at the output's size, and the trunk's.
LARGE = Footprint(20 * MIB, 12_000.0, 1e-5)
SMALL = Footprint(3 * MIB, 700.0, 1e-6)
STRUCTURE = StageCost(Footprint(5 * MIB, 400.0, 1e-6), on_device=False)


def costs_of(stages, footprint=LARGE, on_device=False):
    return [StageCost(footprint, on_device)] * len(stages)


def plan_of(stages, roi=None):
    last = stages[-1]
    size = (last.height * last.scale, last.width * last.scale)
    shard, chunk = shard_of(last.tile * last.scale)
    base = (stages[0].height, stages[0].width)
    return Plan(size, roi or Box(0, 0, *size), base, tuple(stages), shard, chunk, 0, "", "fp32", "auto", "cpu")


def projected(stages, costs, structure=STRUCTURE, roi=None):
    plan = plan_of(stages, roi)
    return plan, project(plan, costs, structure, BASELINE, list(plan.writes()))


def work(stages):
    return sum(len(s.grid) * math.prod(s.tile_shape) for s in stages)


CHAINS = {
    "the paper's": chain(),
    "one stage": chain(scales=(4,)),
    "no window": chain(halo=10, align=1),
    "a picture": chain(base=(900, 1200), scales=(4,), halo=10, align=1),
    "x2": chain(base=(200, 300), scales=(2, 2, 2), halo=16, align=2),
}
BUDGETS = [int(v) for v in np.geomspace(0.35, 64, 16) * GIB]


@pytest.mark.parametrize("footprint", [LARGE, SMALL], ids=["large", "small"])
@pytest.mark.parametrize("name", CHAINS)
def test_what_is_chosen_passes_the_check(name, footprint):
    """Whatever the budget: tiles are found that fit it, or it is refused. A plan that is then refused helps nobody."""
    stages = CHAINS[name]
    costs = costs_of(stages, footprint)
    found = 0
    for host in BUDGETS:
        budget = Budget(host, None, 1 << 50)
        try:
            chosen = choose_tiles(stages, costs, STRUCTURE, budget, BASELINE)
        except BudgetError:
            assert not found, "a larger budget was refused where a smaller one was not"
            continue
        found += 1
        plan, projection = projected(chosen, costs)
        check(plan, projection, budget)
        for stage in chosen:
            stage.check()
    assert found > len(BUDGETS) // 3


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("name", CHAINS)
def test_a_larger_budget_never_costs_more_work(name, on_device):
    stages = CHAINS[name]
    costs = costs_of(stages, on_device=on_device)
    works = []
    for limit in BUDGETS:
        budget = Budget(1 << 50, limit, 1 << 50) if on_device else Budget(limit, None, 1 << 50)
        try:
            works.append(work(choose_tiles(stages, costs, STRUCTURE, budget, BASELINE)))
        except BudgetError:
            assert not works
    assert works == sorted(works, reverse=True)
    assert works[0] > works[-1]


@pytest.mark.parametrize("name", CHAINS)
def test_with_memory_to_spare_the_work_is_near_the_least(name):
    stages = CHAINS[name]
    for given, stage in zip(stages, choose_tiles(stages, costs_of(stages), STRUCTURE, PLENTY, BASELINE), strict=True):
        least = min(work([dataclasses.replace(given, core=c)]) for c in TILES if c % given.align == 0)
        assert work([stage]) <= WORK_SLACK * least
        # No larger than that needs.
        assert all(
            work([dataclasses.replace(given, core=c)]) > WORK_SLACK * least
            for c in TILES
            if c < stage.tile and c % given.align == 0
        )


def test_a_device_has_its_own_limit_and_the_host_keeps_its():
    stages = chain()
    costs = costs_of(stages, on_device=True)
    chosen = choose_tiles(stages, costs, STRUCTURE, Budget(1 << 50, GIB, 1 << 50), BASELINE)
    plan, projection = projected(chosen, costs)
    assert projection.device <= GIB
    assert projection.device == max(LARGE.bytes_at(math.prod(s.tile_shape)) for s in chosen)
    # The network's tiles are not in the host's memory; a small host limits the tiles in hand all the same.
    host = BASELINE + 256 * MIB
    small = choose_tiles(stages, costs, STRUCTURE, Budget(host, 1 << 50, 1 << 50), BASELINE)
    plan, projection = projected(small, costs)
    check(plan, projection, Budget(host, 1 << 50, 1 << 50))


# Batches on a device


RESIDENT = 600 * MIB


def streamed(stages, costs, budget, writes=None):
    plan = dataclasses.replace(plan_of(stages), executor=BATCHED)
    return plan, project(plan, costs, STRUCTURE, BASELINE, writes, RESIDENT, budget)


@pytest.mark.parametrize("footprint", [LARGE, SMALL], ids=["large", "small"])
@pytest.mark.parametrize("name", CHAINS)
def test_what_is_chosen_for_a_device_passes_the_check(name, footprint):
    stages = CHAINS[name]
    costs = costs_of(stages, footprint, on_device=True)
    found = []
    for limit in BUDGETS:
        budget = Budget(host=1 << 50, device=limit, disk=1 << 50)
        try:
            chosen = choose_tiles(stages, costs, STRUCTURE, budget, BASELINE, RESIDENT, streaming=True)
        except BudgetError:
            assert not found, "a larger budget was refused where a smaller one was not"
            continue
        plan, projection = streamed(chosen, costs, budget)
        check(plan, projection, budget)
        assert projection.device > RESIDENT
        found.append(work(chosen))
    assert len(found) > len(BUDGETS) // 3
    assert found == sorted(found, reverse=True)


def test_small_tiles_are_put_together_until_they_fill_a_device():
    stages = tuple(dataclasses.replace(s, core=c, halo=8) for s, c in zip(chain(), (64, 32, 480), strict=True))
    _, projection = streamed(stages, costs_of(stages, on_device=True), PLENTY)
    counts = projection.tasks
    assert projection.batches == (min(counts[0], SATURATING // 80**2), min(LARGEST_BATCH, SATURATING // 48**2), 1)
    # A CPU has nothing to be filled.
    assert streamed(stages, costs_of(stages), PLENTY)[1].batches == (1, 1, 1)
    # Nor are there more than what is left to do.
    plan, _ = streamed(stages, costs_of(stages, on_device=True), PLENTY)
    left = streamed(stages, costs_of(stages, on_device=True), PLENTY, list(plan.writes())[-1:])[1]
    assert left.batches[1] <= left.tasks[1] < projection.batches[1]


def test_batches_shrink_with_the_device_and_never_stand_in_the_way():
    stages = tuple(dataclasses.replace(s, core=64) for s in chain())
    costs = costs_of(stages, on_device=True)
    alone = streamed(stages, costs, Budget(1 << 50, 0, 1 << 50))[1]
    assert alone.batches == (1, 1, 1)
    sizes = []
    for room in np.geomspace(1, 64, 12):
        budget = Budget(1 << 50, int(alone.device * room), 1 << 50)
        plan, projection = streamed(stages, costs, budget)
        check(plan, projection, budget)
        sizes.append(sum(projection.batches))
    assert sizes == sorted(sizes)
    assert sizes[0] == 3 < sizes[-1]
    # The host's memory, which holds what comes out of them, limits them as well.
    most = streamed(stages, costs, PLENTY)[1]
    tight = Budget(alone.host + (most.host - alone.host) // 2, 1 << 50, 1 << 50)
    plan, projection = streamed(stages, costs, tight)
    check(plan, projection, tight)
    assert sum(projection.batches) < sum(most.batches)


def test_a_device_holds_the_largest_network_and_every_stages_buffers():
    stages = tuple(dataclasses.replace(s, core=c) for s, c in zip(chain(), (64, 128, 256), strict=True))
    _, projection = streamed(stages, costs_of(stages, on_device=True), Budget(1 << 50, 0, 1 << 50))
    pixels = [math.prod(s.tile_shape) for s in stages]
    largest = LARGE.bytes_at(max(pixels))
    # The blocks that tiles are made of, inputs and outputs; those of the largest are in its footprint already.
    buffers = [12 * n * (1 + 1 + 16) for n in pixels]
    inner = sum(12 * (s.tile * 4) ** 2 for s in stages[:2])
    slots = (IN_FLIGHT + 1) * 3 * (stages[2].tile * 4) ** 2
    assert projection.device == RESIDENT + largest + sum(buffers) - max(buffers) + inner + slots
    assert projection.host_parts["shards"] == WRITERS * 4 * 3 * plan_of(stages).shard ** 2


def test_the_next_smaller_tile_is_smaller():
    (stage,) = chain(base=(500, 700), scales=(4,), halo=24)
    sizes, core = [], 2048
    while core is not None:
        stage = dataclasses.replace(stage, core=core)
        stage.check()
        sizes.append(math.prod(stage.tile_shape))
        core = smaller_tile(stage)
    assert len(sizes) > 3
    assert sizes == sorted(set(sizes), reverse=True)
    assert TILES[0] <= stage.tile < 2 * TILES[0]


# Refusals


@pytest.mark.parametrize("on_device", [False, True], ids=["memory", "vram"])
def test_too_little_for_the_smallest_tile_is_refused_with_what_would_do(on_device):
    """The number in the message is the truth: given that much, the same call succeeds."""
    stages = chain(halo=160)
    costs = costs_of(stages, on_device=on_device)
    flag = "--vram" if on_device else "--memory"

    def given(limit):
        return Budget(1 << 50, limit, 1 << 50) if on_device else Budget(limit, None, 1 << 50)

    with pytest.raises(BudgetError, match=rf"stage \d: the smallest tile .*, {flag} allows 0.40 GiB") as caught:
        choose_tiles(stages, costs, STRUCTURE, given(int(0.4 * GIB)), BASELINE)
    need = float(re.search(r"needs ([\d.]+) GiB", str(caught.value))[1])
    assert need > 0.4
    assert choose_tiles(stages, costs, STRUCTURE, given(int((need + 0.01) * GIB)), BASELINE)
    with pytest.raises(BudgetError):
        choose_tiles(stages, costs, STRUCTURE, given(int((need - 0.01) * GIB)), BASELINE)


def test_step_1_too_large_is_refused_with_its_own_way_out():
    """No tile helps against a base image that is too large."""
    stages = chain(base=(3000, 4000), scales=(4,))
    with pytest.raises(BudgetError, match=r"step 1: its image of 4000x3000 needs [\d.]+ GiB .*0.50 GiB; .*--stages"):
        choose_tiles(stages, costs_of(stages, SMALL), STRUCTURE, Budget(GIB // 2, None, 1 << 50), BASELINE)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (
            {"host": GIB // 2},
            r"needs [\d.]+ GiB of memory \(largest part: \w.*, [\d.]+ GiB\), --memory allows 0.50 GiB",
        ),
        ({"device": GIB // 4}, r"needs [\d.]+ GiB of VRAM, --vram allows 0.25 GiB"),
        (
            {"disk": GIB // 2},
            r"output may take 0.\d\d GiB and the scratch array 0.\d\d GiB, the disk has 0.50 GiB free",
        ),
    ],
)
def test_a_plan_beyond_a_budget_is_refused_with_the_numbers(limits, message):
    stages = tuple(dataclasses.replace(s, core=256) for s in chain())
    costs = costs_of(stages, on_device="device" in limits)
    plan, projection = projected(stages, costs)
    with pytest.raises(BudgetError, match=message):
        check(plan, projection, dataclasses.replace(PLENTY, **limits))
    check(plan, projection, PLENTY)


@pytest.mark.parametrize("resource", ["host", "device", "disk"])
def test_a_budget_is_enough_to_the_byte(resource):
    stages = tuple(dataclasses.replace(s, core=64) for s in chain())
    plan, projection = projected(stages, costs_of(stages, on_device=True))
    used = {"host": projection.host, "device": projection.device, "disk": projection.disk + projection.scratch}
    check(plan, projection, dataclasses.replace(PLENTY, **{resource: used[resource]}))
    with pytest.raises(BudgetError):
        check(plan, projection, dataclasses.replace(PLENTY, **{resource: used[resource] - 1}))


# Projections


@pytest.fixture
def tiled():
    return tuple(dataclasses.replace(s, core=c) for s, c in zip(chain(), (64, 128, 128), strict=True))


def test_the_projection_sums_its_parts(tiled):
    _, projection = projected(tiled, costs_of(tiled))
    assert projection.working == sum(projection.host_parts.values())
    assert projection.host == BASELINE + projection.working
    assert min(projection.host_parts.values()) > 0
    assert projection.to_json()["host"] == projection.host
    assert projection.to_json()["working"] == projection.working


def test_buffers_are_counted(tiled):
    """The base image; the tile being filled and the one it is cut from; every stage's input; four shards."""
    plan, projection = projected(tiled, costs_of(tiled))
    parts = projection.host_parts
    assert parts["base image"] == 12 * 135 * 256
    inputs = sum(12 * math.prod(s.tile_shape) for s in tiled)
    assert parts["tiles in hand"] == 2 * 12 * (128 * 4) ** 2 + inputs
    assert parts["shards"] == 4 * 3 * plan.shard**2
    assert parts["allocator"] > 0.1 * (projection.working - parts["allocator"])


def test_networks_run_one_at_a_time(tiled):
    cheap = StageCost(SMALL, on_device=False)
    _, projection = projected(tiled, [cheap, StageCost(LARGE, on_device=False), cheap])
    assert projection.host_parts["network"] == LARGE.bytes_at(math.prod(tiled[1].tile_shape))
    greedy = StageCost(Footprint(50 * GIB, 0, 0), on_device=False)
    assert projected(tiled, [cheap] * 3, greedy)[1].host_parts["network"] == 50 * GIB


def test_every_inner_level_has_a_cache_of_its_own(tiled):
    """Three stages: two levels are held, each within its share, and never more than a whole level."""
    _, projection = projected(tiled, costs_of(tiled))
    first, second = (s.height * s.width * s.scale**2 * 12 for s in tiled[:2])
    share = cache_share(3)
    assert first < share < second
    assert projection.host_parts["cache"] == first + share
    assert projected(chain(scales=(4,)), costs_of(tiled[:1]))[1].host_parts["cache"] == 0


def test_a_region_holds_the_last_stages_tiles_too(tiled):
    """Its shards do not line up with the tiles, which are therefore kept until their neighbours are written."""
    _, whole = projected(tiled, costs_of(tiled))
    plan, part = projected(tiled, costs_of(tiled), roi=Box(100, 100, 6000, 6000))
    assert part.host_parts["cache"] == whole.host_parts["cache"] + cache_share(3)
    tiles = list(plan.stages[-1].tiles(plan.roi))
    assert part.scratch == whole.scratch + 3 * sum(t.cell.area for t in tiles)


def test_time_is_pixels_times_seconds(tiled):
    costs = [StageCost(Footprint(0, 0, t), on_device=False) for t in (1e-6, 2e-6, 4e-6)]
    plan, projection = projected(tiled, costs, structure=None)
    counts = plan.tiles_to_run(list(plan.writes()))
    pixels = [math.prod(s.tile_shape) for s in plan.stages]
    expected = sum(k * n * t for k, n, t in zip(counts, pixels, (1e-6, 2e-6, 4e-6), strict=True))
    assert projection.tasks == counts
    assert projection.lr_pixels == tuple(k * n for k, n in zip(counts, pixels, strict=True))
    assert projection.seconds == pytest.approx(expected)
    with_structure = projected(tiled, costs)[1]
    assert with_structure.seconds == pytest.approx(expected + 135 * 256 * 1e-6)


def test_writing_less_takes_less_time_but_the_same_memory(tiled):
    costs = costs_of(tiled)
    plan, whole = projected(tiled, costs)
    rest = project(plan, costs, STRUCTURE, BASELINE, list(plan.writes())[-3:])
    assert rest.seconds < whole.seconds
    assert rest.host == whole.host


def test_disk_is_that_of_the_uncompressed_pyramid(tiled):
    plan, projection = projected(tiled, costs_of(tiled))
    assert projection.disk == sum(3 * h * w for h, w in plan.pyramid)
    assert projection.scratch == sum(12 * s.height * s.width * s.scale**2 for s in tiled[:2])
