"""Chooses the strips that fit the memory and projects what a plan of bands costs. Knows nothing of tensors.

All stages of the chain hold their rows at the same time, so a strip costs the sum of what they keep for its columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from engine.errors import BudgetError
from engine.geometry import Box
from engine.plan.cost import (
    CHANNELS,
    FLOAT,
    SHARDS_IN_HAND,
    BandCost,
    Budget,
    Projection,
    StageCost,
    readable,
    store_bytes,
    with_allocator,
)
from engine.plan.plan import Plan, StagePlan, shard_of

SHARD, CHUNK = 1024, 512
"""Sides in pixels. A row of shards waits until it is whole: smaller ones than those of tiles keep it short."""

_ROWS_OF_SHARDS = 2
"""One that fills while the one before it is written."""


_ALLOCATOR = (3 << 20, 0.04)
"""Less than with tiles: the large buffers are made once."""


def shard_of_strips(strip: int, width: int) -> tuple[int, int]:
    """(shard, chunk) for strips of so many output columns; a single one may end within a shard."""
    return (SHARD, CHUNK) if strip >= width else shard_of(strip, SHARD)


def streamable(costs: Sequence[StageCost]) -> bool:
    return all(c.bands is not None for c in costs)


def choose_strips(
    stages: Sequence[StagePlan],
    costs: Sequence[StageCost],
    structure: StageCost | None,
    budget: Budget,
    baseline: int,
    width: int,
) -> tuple[StagePlan, ...]:
    """The widest strips that fit the budget. ``width``: columns of the output, in pixels.

    One strip has no inner edge, so it needs no halo and computes nothing twice; each further one costs its halos.
    """
    for core in _strip_widths(stages[-1], width):
        chosen = with_strips(stages, costs, core)
        strip = min(width, core * chosen[-1].scale)
        parts = _host_parts(chosen, costs, structure, strip)
        on_device = _device_bytes(chosen, costs, strip)
        if baseline + sum(parts.values()) <= budget.host and on_device <= (budget.device or 0):
            return chosen
    need, limit, what, flag = baseline + sum(parts.values()), budget.host, "memory", "--memory"
    if need <= limit:
        need, limit, what, flag = on_device, budget.device or 0, "VRAM", "--vram"
    raise BudgetError(
        f"bands: the narrowest strip ({core * chosen[-1].scale} px) needs {readable(need)} of {what}, {flag} allows "
        f"{readable(limit)}; raise it, or use --executor tiles"
    )


def with_strips(stages: Sequence[StagePlan], costs: Sequence[StageCost], core: int) -> tuple[StagePlan, ...]:
    """The stages with strips that are ``core`` LR columns of the last stage wide; below it, what that comes to there."""
    result: list[StagePlan] = []
    for stage, cost in zip(reversed(stages), reversed(costs), strict=True):
        if result:
            core = -(-core // stage.scale)
        result.append(replace(stage, core=core, band=_cost(cost).band))
    return tuple(reversed(result))


def _strip_widths(last: StagePlan, width: int) -> Iterator[int]:
    """Candidates in LR pixels, wide ones first: all of it, then equal parts in whole shards."""
    step = math.lcm(SHARD, last.scale * last.align)
    yield -(-width // last.scale)
    previous = None
    for parts in range(2, -(-width // step) + 1):
        core = -(-width // (parts * step)) * step // last.scale
        if core != previous:
            yield core
        previous = core


def project(
    plan: Plan,
    costs: Sequence[StageCost],
    structure: StageCost | None,
    baseline: int,
    writes: Sequence[Box] | None = None,
) -> Projection:
    """Cost of ``plan`` for these writes, or for all. ``baseline``: resident bytes of the idle process with its model."""
    runs = _strips(plan) if writes is None else list(_runs(writes))
    pixels, ends = [0] * len(plan.stages), [0] * len(plan.stages)
    for run in runs:
        reads = plan.reads((run.x0, run.x1))
        first, last = run.y0 + plan.roi.y0, run.y1 + plan.roi.y0
        for index in reversed(range(len(pixels))):
            stage, columns = plan.stages[index], reads[index][1] - reads[index][0]
            first, last = first // stage.scale, -(-last // stage.scale)
            pixels[index] += (last - first) * columns
            # The first and the last band are filled in part; what comes of a margin is dropped.
            ends[index] += (stage.band + 2 * stage.margin) * columns
            first, last = first + stage.margin if first else 0, min(last + 2 * stage.margin, stage.height)
    seconds = sum((n + e) * _cost(c).seconds_per_pixel for n, e, c in zip(pixels, ends, costs, strict=True))
    if structure is not None:
        seconds += math.prod(plan.base) * structure.footprint.seconds_per_pixel
    strip = max((x1 - x0 for x0, x1 in plan.strips()), default=0)
    return Projection(
        baseline=baseline,
        host_parts=_host_parts(plan.stages, costs, structure, strip),
        device=_device_bytes(plan.stages, costs, strip),
        disk=store_bytes(plan),
        scratch=0,
        pieces=(len(runs),) * len(pixels),
        pixels=tuple(pixels),
        seconds=seconds,
    )


def _cost(cost: StageCost) -> BandCost:
    assert cost.bands is not None
    return cost.bands


def _strips(plan: Plan) -> list[Box]:
    """The whole of every strip, without listing what is written of it."""
    return [Box(0, x0, plan.size[0], x1) for x0, x1 in plan.strips()]


def _runs(writes: Sequence[Box]) -> Iterator[Box]:
    """Writes that follow on each other down a strip, as one box each."""
    run: Box | None = None
    for box in writes:
        if run is not None and (run.x0, run.x1, run.y1) == (box.x0, box.x1, box.y0):
            run = replace(run, y1=box.y1)
            continue
        if run is not None:
            yield run
        run = box
    if run is not None:
        yield run


def _columns(stages: Sequence[StagePlan], strip: int) -> list[int]:
    """The LR columns that every stage reads for a strip of so many output columns, at most."""
    found, columns = [], strip
    for stage in reversed(stages):
        context = stage.halo + stage.margin + stage.align
        columns = min(stage.padded[1], -(-columns // stage.scale) + 2 * context)
        found.append(columns)
    return found[::-1]


def _stream_bytes(stages: Sequence[StagePlan], costs: Sequence[StageCost], strip: int, on_device: bool) -> int:
    columns = _columns(stages, strip)
    return sum(_cost(c).bytes_at(n) for c, n in zip(costs, columns, strict=True) if c.on_device == on_device)


def _device_bytes(stages: Sequence[StagePlan], costs: Sequence[StageCost], strip: int) -> int:
    return _stream_bytes(stages, costs, strip, on_device=True)


def _host_parts(
    stages: Sequence[StagePlan], costs: Sequence[StageCost], structure: StageCost | None, strip: int
) -> dict[str, int]:
    """Host memory above the baseline, for strips of so many output columns."""
    base = stages[0].height * stages[0].width
    step_1 = structure.footprint.bytes_at(base) if structure is not None else 0
    parts = {
        "network": max(step_1, _stream_bytes(stages, costs, strip, on_device=False)),
        "base image": base * CHANNELS * FLOAT,
        "rows of shards": _ROWS_OF_SHARDS * SHARD * strip * CHANNELS,
        "shards": SHARDS_IN_HAND * SHARD**2 * CHANNELS,
    }
    return with_allocator(parts, *_ALLOCATOR)
