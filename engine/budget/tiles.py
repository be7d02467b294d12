"""Chooses the tiles that fit the memory and projects what a plan of tiles costs. Knows nothing of tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import repeat

from engine.budget import (
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
from engine.errors import BudgetError
from engine.geometry import Box
from engine.plan import Plan, StagePlan, shard_of

CORES = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
"""Tile cores that are tried, in LR pixels: multiples of every window in use, so that shards divide well."""

WORK_SLACK = 1.15
"""The smallest core within 15 % of the least work is taken: larger ones cost memory, and work when interrupted."""

CACHE_BYTES = 32 << 20
"""Inner tiles held in memory; what does not fit goes to the scratch array beside the output."""


_ALLOCATOR = (40 << 20, 0.12)


def project(
    plan: Plan,
    costs: Sequence[StageCost],
    structure: StageCost | None,
    baseline: int,
    writes: Sequence[Box] | None = None,
) -> Projection:
    """Cost of ``plan`` for these writes, or for all. ``baseline``: resident bytes of the idle process with its model."""
    tiles = plan.tiles_to_run(writes)
    pixels = tuple(k * math.prod(s.tile_shape) for k, s in zip(tiles, plan.stages, strict=True))
    seconds = sum(n * c.footprint.seconds_per_pixel for n, c in zip(pixels, costs, strict=True))
    if structure is not None:
        seconds += math.prod(plan.base) * structure.footprint.seconds_per_pixel
    # The last level is cached, and spilled, only where a region's shards straddle its tiles.
    last = 0 if plan.is_whole else sum(t.write.area for t in plan.stages[-1].tiles(plan.roi)) * CHANNELS
    cached = [*(_level_bytes(s) for s in plan.stages[:-1]), last]
    return Projection(
        baseline=baseline,
        host_parts=_host_parts(plan.stages, costs, structure, cached),
        device=max((_network_bytes(s, c) for s, c in zip(plan.stages, costs, strict=True) if c.on_device), default=0),
        disk=store_bytes(plan),
        scratch=sum(cached),
        pieces=tiles,
        pixels=pixels,
        seconds=seconds,
    )


def _host_parts(
    stages: Sequence[StagePlan], costs: Sequence[StageCost], structure: StageCost | None, cached: Sequence[int]
) -> dict[str, int]:
    """Host memory above the baseline. ``cached``: bytes of every level that the caches may come to hold."""
    networks = [_network_bytes(s, c) for s, c in zip(stages, costs, strict=True) if not c.on_device]
    base = stages[0].height * stages[0].width
    if structure is not None:
        networks.append(structure.footprint.bytes_at(base))
    parts = {
        "network": max(networks, default=0),
        "base image": base * CHANNELS * FLOAT,
        "cache": sum(min(cache_share(len(stages)), n) for n in cached),
        "tiles in hand": 2 * max(_tile_bytes(s, s is stages[-1]) for s in stages) + sum(_read_bytes(s) for s in stages),
        "shards": _shard_bytes(stages[-1]),
    }
    return with_allocator(parts, *_ALLOCATOR)


def cache_share(stages: int) -> int:
    """Bytes that one level's cache may hold."""
    return CACHE_BYTES // stages


def _network_bytes(stage: StagePlan, cost: StageCost) -> int:
    return cost.footprint.bytes_at(math.prod(stage.tile_shape))


def _tile_bytes(stage: StagePlan, last: bool) -> int:
    return (stage.core * stage.scale) ** 2 * CHANNELS * (1 if last else FLOAT)


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
) -> tuple[StagePlan, ...]:
    """Give every stage the smallest core within ``WORK_SLACK`` of the least work that fits the budget.

    What the stages need together depends on all of their tiles: a limit on every single tile is lowered until the whole
    fits.
    """
    candidates = [[replace(s, core=c) for c in CORES if c % s.align == 0] for s in stages]
    smallest = [options[0] for options in candidates]

    def host(chosen: Sequence[StagePlan]) -> int:
        cached = [_level_bytes(s) for s in chosen]
        return baseline + sum(_host_parts(chosen, costs, structure, cached).values())

    if host(smallest) > budget.host or not all(map(_fits_device, smallest, costs, repeat(budget))):
        _refuse(smallest, costs, structure, budget, host(smallest))
    last = len(stages) - 1
    sized = [
        [(_host_bytes(s, cost, index == last), s) for s in options if _fits_device(s, cost, budget)]
        for index, (options, cost) in enumerate(zip(candidates, costs, strict=True))
    ]
    for limit in sorted({n for options in sized for n, _ in options}, reverse=True):
        fitting = [[s for n, s in options if n <= limit] for options in sized]
        if all(fitting) and host(chosen := [_least_work(options) for options in fitting]) <= budget.host:
            return tuple(chosen)
    return tuple(smallest)


def _fits_device(stage: StagePlan, cost: StageCost, budget: Budget) -> bool:
    return not cost.on_device or _network_bytes(stage, cost) <= (budget.device or 0)


def _host_bytes(stage: StagePlan, cost: StageCost, last: bool) -> int:
    """Host memory that grows with this stage's tiles."""
    network = 0 if cost.on_device else _network_bytes(stage, cost)
    return network + 2 * _tile_bytes(stage, last) + _read_bytes(stage) + (_shard_bytes(stage) if last else 0)


def _least_work(options: Sequence[StagePlan]) -> StagePlan:
    """The first, smallest, of these whose work is near the least."""
    work = [len(s.grid) * math.prod(s.tile_shape) for s in options]
    return next(s for s, n in zip(options, work, strict=True) if n <= WORK_SLACK * min(work))


def _refuse(
    smallest: Sequence[StagePlan], costs: Sequence[StageCost], structure: StageCost | None, budget: Budget, host: int
) -> None:
    """Say which of the smallest tiles, or that step 1, is too large. ``host``: memory of all of them together."""
    networks = [(_network_bytes(s, c), s, c.on_device) for s, c in zip(smallest, costs, strict=True)]
    device, largest, _ = max((n for n in networks if n[2]), key=lambda n: n[0], default=(0, smallest[0], True))
    need, limit, what, flag = device, budget.device or 0, "VRAM", "--vram"
    if device <= limit:
        on_host, largest, _ = max(
            (n for n in networks if not n[2]), key=lambda n: n[0], default=(0, smallest[-1], False)
        )
        need, limit, what, flag = host, budget.host, "memory", "--memory"
        first = smallest[0]
        if structure is not None and structure.footprint.bytes_at(first.height * first.width) > on_host:
            raise BudgetError(
                f"step 1: its image of {first.width}x{first.height} needs {readable(need)} of memory, {flag} allows "
                f"{readable(limit)}; raise it, or use more --stages or a smaller --size"
            )
    h, w = largest.tile_shape
    raise BudgetError(
        f"{largest.name}: the smallest tile ({w}x{h} with its halo of {largest.halo}) needs {readable(need)} of {what}, "
        f"{flag} allows {readable(limit)}; raise it, or use a smaller --overlap or half --precision"
    )
