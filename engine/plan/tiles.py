"""Chooses the tiles that fit the memory and projects what a plan of tiles costs. Knows nothing of tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from engine.errors import BudgetError
from engine.geometry import Box
from engine.plan import limits
from engine.plan.cost import (
    CHANNELS,
    FLOAT,
    SHARDS_IN_HAND,
    Budget,
    Projection,
    StageCost,
    readable,
    store_bytes,
    with_allocator,
)
from engine.plan.limits import IN_FLIGHT, WRITERS
from engine.plan.plan import STREAM, Plan, StagePlan, shard_of

CORES = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
"""Tile cores that are tried, in LR pixels: multiples of every window in use, so that shards divide well."""

WORK_SLACK = 1.15
"""The smallest core within 15 % of the least work is taken: larger ones cost memory, and work when interrupted."""


SATURATING, LARGEST_BATCH = 1 << 17, 64
"""LR pixels that should keep a large GPU busy, to which small tiles are put together, and tiles at most. Estimated from 132
multiprocessors and blocks of 128 pixels (eight rounds); not yet measured on a GPU."""

_ALLOCATOR = (40 << 20, 0.12)


def project(
    plan: Plan,
    costs: Sequence[StageCost],
    structure: StageCost | None,
    baseline: int,
    writes: Sequence[Box] | None = None,
    resident: int = 0,
    budget: Budget | None = None,
) -> Projection:
    """Cost of ``plan`` for these writes, or for all. ``baseline``: resident bytes of the idle process with its model;
    ``resident``: the same on the device. Batches are as large as pays off and ``budget`` allows.
    """
    tiles = plan.tiles_to_run(writes)
    pixels = tuple(k * math.prod(s.tile_shape) for k, s in zip(tiles, plan.stages, strict=True))
    seconds = sum(n * c.footprint.seconds_per_pixel for n, c in zip(pixels, costs, strict=True))
    if structure is not None:
        seconds += math.prod(plan.base) * structure.footprint.seconds_per_pixel
    # The last level is cached, and spilled, only where a region's shards straddle its tiles.
    last = 0 if plan.is_whole else sum(t.write.area for t in plan.stages[-1].tiles(plan.roi)) * CHANNELS
    cached = [*(_level_bytes(s) for s in plan.stages[:-1]), last]

    def parts(batches: Sequence[int] | None) -> tuple[dict[str, int], int]:
        return (
            _host_parts(plan.stages, costs, structure, cached, batches),
            resident + _network_peak(plan.stages, costs, batches, on_device=True),
        )

    batches = None
    if plan.executor == STREAM:
        known = zip(plan.stages, costs, tiles, strict=True)
        batches = [_useful_batch(s, count) if c.on_device else 1 for s, c, count in known]
        while budget is not None and max(batches) > 1 and not _within(budget, baseline, *parts(batches)):
            largest = max(
                range(len(batches)), key=lambda k: (batches[k] > 1, _batch_pixels(plan.stages[k], batches[k]))
            )
            batches[largest] //= 2
    host_parts, device = parts(batches)
    return Projection(
        baseline=baseline,
        host_parts=host_parts,
        device=device,
        disk=store_bytes(plan),
        scratch=sum(cached),
        pieces=tiles,
        pixels=pixels,
        seconds=seconds,
        batches=tuple(batches or ()),
    )


def _within(budget: Budget, baseline: int, host_parts: dict[str, int], device: int) -> bool:
    fits_device = budget.device is None or device <= budget.device
    return fits_device and baseline + sum(host_parts.values()) <= budget.host


def _useful_batch(stage: StagePlan, tiles: int) -> int:
    """How many of a stage's tiles to run at once on a device, if memory allows; a CPU gains nothing by it."""
    return max(1, min(tiles, LARGEST_BATCH, SATURATING // math.prod(stage.tile_shape)))


def _batch_pixels(stage: StagePlan, batch: int) -> int:
    return batch * math.prod(stage.tile_shape)


def _host_parts(
    stages: Sequence[StagePlan],
    costs: Sequence[StageCost],
    structure: StageCost | None,
    cached: Sequence[int],
    batches: Sequence[int] | None,
) -> dict[str, int]:
    """Host memory above the baseline. ``cached``: bytes of every level that the caches may come to hold; ``batches``: of
    the executor stream, None where tiles run one by one.
    """
    base = stages[0].height * stages[0].width
    network = _network_peak(stages, costs, batches, on_device=False)
    if structure is not None:
        network = max(network, structure.footprint.bytes_at(base))
    hand = 2 * max(_tile_bytes(s, s is stages[-1]) for s in stages) + sum(_read_bytes(s) for s in stages)
    shards = _shard_bytes(stages[-1])
    if batches is not None:
        hand += sum(_pinned_bytes(s, b, s is stages[-1]) for s, b in zip(stages, batches, strict=True))
        shards *= WRITERS
    parts = {
        "network": network,
        "base image": base * CHANNELS * FLOAT,
        "cache": sum(min(limits.cache_share(len(stages)), n) for n in cached),
        "tiles in hand": hand,
        "shards": shards,
    }
    if strips := sum(_strip_bytes(s) for s in stages):
        parts["strips"] = strips
    return with_allocator(parts, *_ALLOCATOR)


def _network_peak(
    stages: Sequence[StagePlan], costs: Sequence[StageCost], batches: Sequence[int] | None, on_device: bool
) -> int:
    """Networks run one at a time, so their largest counts. The buffers of batches, some of which the network's footprint
    holds already, are there all the time.
    """
    used = [
        (s, c, b, s is stages[-1])
        for s, c, b in zip(stages, costs, batches or [1] * len(stages), strict=True)
        if c.on_device == on_device
    ]
    if batches is None:
        return max((c.footprint.bytes_at(_batch_pixels(s, b)) for s, c, b, _ in used), default=0)
    temporary = max(
        (c.footprint.bytes_at(_batch_pixels(s, b)) - _seen_bytes(s, c, b) for s, c, b, _ in used), default=0
    )
    slots = sum(_slots(last) * b * _tile_bytes(s, last) for s, _, b, last in used)
    inputs = sum(_seen_bytes(s, c, b) for s, c, b, _ in used)
    return max(0, temporary) + inputs + slots


def _seen_bytes(stage: StagePlan, cost: StageCost, batch: int) -> int:
    """What a batch is made of and its input and output: buffers that are there when a footprint is measured, too."""
    return _batch_pixels(stage, batch) * FLOAT * (CHANNELS * (1 + stage.scale**2) + cost.inputs)


def _slots(last: bool) -> int:
    """Buffers for the pixels of a batch: those of inner stages are taken at once."""
    return IN_FLIGHT + 1 if last else 1


def _pinned_bytes(stage: StagePlan, batch: int, last: bool) -> int:
    """Page-locked host memory of a stage: PyTorch takes powers of two."""
    sizes = [_batch_pixels(stage, batch) * CHANNELS * FLOAT, *[batch * _tile_bytes(stage, last)] * _slots(last)]
    return sum(1 << (size - 1).bit_length() for size in sizes)


def _tile_bytes(stage: StagePlan, last: bool) -> int:
    """What a tile makes; of tiles that are blended, the levels are rounded afterwards."""
    side = (stage.core + stage.blend) * stage.scale
    return side**2 * CHANNELS * (1 if last and not stage.blend else FLOAT)


def _strip_bytes(stage: StagePlan) -> int:
    """What is kept of tiles for those that are blended with them."""
    core, blend = stage.core * stage.scale, stage.blend * stage.scale
    return stage.strips_kept * blend * (2 * core + blend) * CHANNELS * FLOAT


def _read_bytes(stage: StagePlan) -> int:
    return math.prod(stage.tile_shape) * CHANNELS * FLOAT


def _shard_bytes(last: StagePlan) -> int:
    shard, _ = shard_of(last.core * last.scale)
    return SHARDS_IN_HAND * shard**2 * CHANNELS


def _level_bytes(stage: StagePlan) -> int:
    return stage.height * stage.width * stage.scale**2 * CHANNELS * FLOAT


def choose_cores(
    stages: Sequence[StagePlan],
    costs: Sequence[StageCost],
    structure: StageCost | None,
    budget: Budget,
    baseline: int,
    resident: int = 0,
    streaming: bool = False,
) -> tuple[StagePlan, ...]:
    """Give every stage the smallest core within ``WORK_SLACK`` of the least work that fits the budget.

    What the stages need together depends on all of their tiles: a limit on every single tile is lowered until the whole
    fits. ``streaming``: for the executor stream, here in batches of one. ``resident``: bytes that the device holds anyway.
    """
    candidates = [[replace(s, core=c) for c in CORES if c % s.align == 0 and c >= s.blend] for s in stages]
    smallest = [options[0] for options in candidates]
    batches = [1] * len(stages) if streaming else None

    def needs(chosen: Sequence[StagePlan]) -> tuple[dict[str, int], int]:
        cached = [_level_bytes(s) for s in chosen]
        parts = _host_parts(chosen, costs, structure, cached, batches)
        return parts, resident + _network_peak(chosen, costs, batches, on_device=True)

    def fits(chosen: Sequence[StagePlan]) -> bool:
        return _within(budget, baseline, *needs(chosen))

    if not fits(smallest):
        parts, device = needs(smallest)
        _refuse(smallest, costs, structure, budget, baseline + sum(parts.values()), device)
    last = len(stages) - 1
    sized = [
        [(_bytes_with(s, cost, index == last), s) for s in options]
        for index, (options, cost) in enumerate(zip(candidates, costs, strict=True))
    ]
    for limit in sorted({n for options in sized for n, _ in options}, reverse=True):
        fitting = [[s for n, s in options if n <= limit] for options in sized]
        if all(fitting) and fits(chosen := [_least_work(options) for options in fitting]):
            return tuple(chosen)
    return tuple(smallest)


def smaller_core(stage: StagePlan) -> int | None:
    """The next smaller core that makes the stage's tile smaller; None when it is as small as tiles get."""
    core = stage.core // 2 // stage.align * stage.align
    while core >= max(CORES[0], stage.align, stage.blend):
        if math.prod(replace(stage, core=core).tile_shape) < math.prod(stage.tile_shape):
            return core
        core = core // 2 // stage.align * stage.align
    return None


def _bytes_with(stage: StagePlan, cost: StageCost, last: bool) -> int:
    """Memory, of host and device, that grows with this stage's tiles."""
    network = cost.footprint.bytes_at(math.prod(stage.tile_shape))
    return network + 2 * _tile_bytes(stage, last) + _read_bytes(stage) + (_shard_bytes(stage) if last else 0)


def _least_work(options: Sequence[StagePlan]) -> StagePlan:
    """The first, smallest, of these whose work is near the least."""
    work = [len(s.grid) * math.prod(s.tile_shape) for s in options]
    return next(s for s, n in zip(options, work, strict=True) if n <= WORK_SLACK * min(work))


def _refuse(
    smallest: Sequence[StagePlan],
    costs: Sequence[StageCost],
    structure: StageCost | None,
    budget: Budget,
    host: int,
    device: int,
) -> None:
    """Say which of the smallest tiles, or that step 1, is too large. ``host``, ``device``: memory of all of them together."""

    def largest(on_device: bool) -> tuple[int, StagePlan]:
        sizes = [
            (c.footprint.bytes_at(math.prod(s.tile_shape)), s)
            for s, c in zip(smallest, costs, strict=True)
            if c.on_device == on_device
        ]
        return max(sizes, key=lambda n: n[0], default=(0, smallest[-1]))

    too_large = budget.device is not None and device > budget.device
    size, stage = largest(on_device=too_large)
    need, limit, what, flag = host, budget.host, "memory", "--memory"
    if too_large:
        need, limit, what, flag = device, budget.device or 0, "VRAM", "--vram"
    elif structure is not None and structure.footprint.bytes_at(smallest[0].height * smallest[0].width) > size:
        first = smallest[0]
        raise BudgetError(
            f"step 1: its image of {first.width}x{first.height} needs {readable(need)} of memory, {flag} allows "
            f"{readable(limit)}; raise it, or use more --stages or a smaller --size"
        )
    h, w = stage.tile_shape
    raise BudgetError(
        f"{stage.name}: the smallest tile ({w}x{h} with its halo of {stage.halo}) needs {readable(need)} of {what}, "
        f"{flag} allows {readable(limit)}; raise it, or use a smaller --overlap or half --precision"
    )
