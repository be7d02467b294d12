"""Chooses the tiles that fit the memory and projects what a plan costs. Knows nothing of tensors.

The projection is a sum of named parts, each measured (the networks) or counted (buffers), so that a refusal can say
what is too large, by how much, and what to do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from engine.errors import BudgetError
from engine.geometry import Box
from engine.plan import Plan, StagePlan, shard_of
from engine.profile import Footprint

GIB = 1 << 30

CORES = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
"""Tile cores that are tried, in LR pixels: multiples of every window in use, so that shards divide well."""

WORK_SLACK = 1.15
"""The smallest core within 15 % of the least work is taken: larger ones cost memory and lose more work when
interrupted.
"""

CACHE_BYTES = 32 << 20
"""Inner tiles held in memory; what does not fit goes to the scratch array and through the operating system's page
cache."""

CHANNELS = 3
_FLOAT = 4

_SHARDS_IN_HAND = 4
"""A shard and its encoded form; its parent in the pyramid and one decoded child."""

_ALLOCATOR_FIXED, _ALLOCATOR_SHARE = 40 << 20, 0.12
"""What the parts do not see: threads and tables of the libraries, and holes in the heap. An upper bound of what
benchmarks/bench_memory.py measures."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits in bytes. ``host``: resident memory of the process; ``device``: memory of the accelerator, None on a
    CPU.
    """

    host: int
    device: int | None
    disk: int


@dataclass(frozen=True, slots=True)
class StageCost:
    """What is known about running a stage's network, and whether it runs on an accelerator."""

    footprint: Footprint
    on_device: bool


@dataclass(frozen=True, slots=True)
class Projection:
    """What a plan is expected to cost. Bytes and seconds; ``tiles``: tiles to run, per stage."""

    baseline: int
    host_parts: dict[str, int]
    device: int
    disk: int
    scratch: int
    tiles: tuple[int, ...]
    seconds: float

    @property
    def working(self) -> int:
        """Host memory above the idle process with the model loaded."""
        return sum(self.host_parts.values())

    @property
    def host(self) -> int:
        return self.baseline + self.working

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "working": self.working, "host": self.host}


def project(
    plan: Plan, costs: Sequence[StageCost], structure: StageCost | None, baseline: int, writes: Sequence[Box]
) -> Projection:
    """Cost of ``plan`` for the given writes. ``baseline``: resident bytes of the idle process with the model loaded."""
    pixels = [math.prod(s.tile_shape) for s in plan.stages]
    networks = [(c, c.footprint.bytes_at(n)) for c, n in zip(costs, pixels, strict=True)]
    base_pixels = math.prod(plan.base)
    if structure is not None:
        networks.append((structure, structure.footprint.bytes_at(base_pixels)))
    tiles = plan.tiles_to_run(writes)
    seconds = sum(k * n * c.footprint.seconds_per_pixel for k, n, c in zip(tiles, pixels, costs, strict=True))
    if structure is not None:
        seconds += base_pixels * structure.footprint.seconds_per_pixel
    return Projection(
        baseline=baseline,
        host_parts=_with_allocator(
            {"network": max((b for c, b in networks if not c.on_device), default=0), **_buffers(plan)}
        ),
        device=max((b for c, b in networks if c.on_device), default=0),
        disk=_store_bytes(plan),
        scratch=_scratch_bytes(plan),
        tiles=tiles,
        seconds=seconds,
    )


def _with_allocator(parts: dict[str, int]) -> dict[str, int]:
    return {**parts, "allocator": _ALLOCATOR_FIXED + int(_ALLOCATOR_SHARE * sum(parts.values()))}


def _buffers(plan: Plan) -> dict[str, int]:
    """Host memory beside the networks: the base image, the cache of inner tiles, tiles in hand, shards being
    written."""
    in_hand = [_tile_bytes(s, _FLOAT) for s in plan.stages[:-1]] + [_tile_bytes(plan.stages[-1], 1)]
    reads = [math.prod(s.tile_shape) * CHANNELS * _FLOAT for s in plan.stages]
    return {
        "base image": math.prod(plan.base) * CHANNELS * _FLOAT,
        "cache": sum(min(cache_share(len(plan.stages)), n) for n in _cached_bytes(plan)),
        "tiles in hand": 2 * max(in_hand) + sum(reads),
        "shards": _SHARDS_IN_HAND * plan.shard**2 * CHANNELS,
    }


def cache_share(stages: int) -> int:
    """Bytes that one level's cache may hold."""
    return CACHE_BYTES // stages


def _cached_bytes(plan: Plan) -> list[int]:
    """Size of every level that is cached: the inner ones, and the last one when a region's shards straddle its tiles."""
    inner = [_level_bytes(s) for s in plan.stages[:-1]]
    return inner if plan.is_whole else [*inner, math.prod(plan.size) * CHANNELS]


def _tile_bytes(stage: StagePlan, item: int) -> int:
    return (stage.core * stage.scale) ** 2 * CHANNELS * item


def _level_bytes(stage: StagePlan) -> int:
    return stage.height * stage.width * stage.scale**2 * CHANNELS * _FLOAT


def _scratch_bytes(plan: Plan) -> int:
    return sum(_level_bytes(s) for s in plan.stages[:-1])


def _store_bytes(plan: Plan) -> int:
    """Upper bound: noise does not compress."""
    return sum(h * w * CHANNELS for h, w in plan.levels)


def choose_cores(
    stages: Sequence[StagePlan], costs: Sequence[StageCost], budget: Budget, baseline: int
) -> tuple[StagePlan, ...]:
    """Give every stage the smallest core within ``WORK_SLACK`` of the least work that fits the budget."""
    chosen = []
    for index, (stage, cost) in enumerate(zip(stages, costs, strict=True)):
        limit = (budget.device or 0) if cost.on_device else budget.host - baseline
        last = index == len(stages) - 1
        candidates = [replace(stage, core=c) for c in CORES if c % stage.align == 0]
        fitting = [s for s in candidates if _stage_bytes(s, cost, last) <= limit]
        if not fitting:
            _refuse(candidates[0], cost, budget, baseline, last)
        least = min(_work(s) for s in fitting)
        chosen.append(next(s for s in fitting if _work(s) <= WORK_SLACK * least))
    return tuple(chosen)


def _work(stage: StagePlan) -> int:
    return len(stage.grid) * math.prod(stage.tile_shape)


def _stage_bytes(stage: StagePlan, cost: StageCost, last: bool) -> int:
    """Memory that grows with the tile: the network, and on the host the tiles in hand and the shards."""
    network = cost.footprint.bytes_at(math.prod(stage.tile_shape))
    if cost.on_device:
        return network
    shards = _SHARDS_IN_HAND * shard_of(stage.core * stage.scale)[0] ** 2 * CHANNELS if last else 0
    read = math.prod(stage.tile_shape) * CHANNELS * _FLOAT
    parts = network + 2 * _tile_bytes(stage, 1 if last else _FLOAT) + read + shards + CACHE_BYTES
    return int(parts * (1 + _ALLOCATOR_SHARE)) + _ALLOCATOR_FIXED


def _refuse(smallest: StagePlan, cost: StageCost, budget: Budget, baseline: int, last: bool) -> None:
    need = _stage_bytes(smallest, cost, last)
    h, w = smallest.tile_shape
    if cost.on_device:
        raise BudgetError(
            f"{smallest.name}: the smallest tile ({w}x{h} with its halo of {smallest.halo}) needs {need / GIB:.2f} GiB of VRAM, "
            f"--vram allows {(budget.device or 0) / GIB:.2f} GiB; raise it, or use a smaller --overlap or half --precision"
        )
    raise BudgetError(
        f"{smallest.name}: the smallest tile ({w}x{h} with its halo of {smallest.halo}) needs {(baseline + need) / GIB:.2f} GiB, "
        f"--memory allows {budget.host / GIB:.2f} GiB; raise it, or use a smaller --overlap or half --precision"
    )


def check(plan: Plan, projection: Projection, budget: Budget) -> None:
    """Raise BudgetError when the projection exceeds the budget."""
    if projection.host > budget.host:
        largest = max(projection.host_parts, key=lambda k: projection.host_parts[k])
        raise BudgetError(
            f"the plan needs {projection.host / GIB:.2f} GiB of memory (largest part: {largest}, "
            f"{projection.host_parts[largest] / GIB:.2f} GiB), --memory allows {budget.host / GIB:.2f} GiB; "
            f"raise it or use a --tile below {plan.stages[-1].core}"
        )
    if budget.device is not None and projection.device > budget.device:
        raise BudgetError(
            f"the plan needs {projection.device / GIB:.2f} GiB of VRAM, --vram allows {budget.device / GIB:.2f} GiB; "
            f"raise it or use a --tile below {plan.stages[-1].core}"
        )
    if projection.disk + projection.scratch > budget.disk:
        raise BudgetError(
            f"the output may take {projection.disk / GIB:.2f} GiB and the scratch array {projection.scratch / GIB:.2f} GiB, "
            f"the disk has {budget.disk / GIB:.2f} GiB free; make room, write elsewhere or use a smaller --size"
        )
