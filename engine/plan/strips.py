"""Layout in bands: choice of strips that fit the memory, and their cost. Knows nothing of tensors.

All stages of the chain hold their rows at the same time, so a strip costs the sum of their buffers for its columns.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import accumulate
from operator import mul

from engine.errors import option
from engine.geometry import Box
from engine.plan.cost import (
    CHANNELS,
    FLOAT,
    Projection,
    budget_error,
    finishing_parts,
    source_parts,
    store_bytes,
    with_allocator,
    within_budget,
    writer_bytes,
)
from engine.plan.limits import HALVES_BYTES, SOURCE_ROWS, writers
from engine.plan.measured import BandCost, Measured, MeasuredStage
from engine.plan.plan import Plan
from engine.plan.reduction import Reduction
from engine.plan.sides import shard_of
from engine.plan.stage import StagePlan

SHARD, CHUNK = 1024, 512
"""Sides in pixels. A row of shards waits until it is whole, so shards are smaller than those of tiles."""

_ROWS_OF_SHARDS = 2
"""One row that fills while the row before it is written."""

_BALANCE_BITS = 9
"""The largest share of the work is the least to one in 2^9."""

_ALLOCATOR = (24 << 20, 0.08)
"""Bytes and share for the allocator: the large buffers are made once, but threads allocate at the same time.

A process that takes its measurements from the cache loads 12 MiB of code with its first band, 9 of them PyTorch's. Peaks of
equal small renders differ by 19 MiB, as a heap of many threads has other holes each time.
"""


def shard_of_strips(last: StagePlan, width: int) -> tuple[int, int]:
    """Sides (shard, chunk) for strips of an output of ``width`` columns. A single strip may end within a shard."""
    strip = last.tile * last.scale
    return (SHARD, CHUNK) if strip >= width or not last.is_image else shard_of(strip, SHARD)


def streamable(measured: Measured) -> bool:
    """Whether every network can be streamed in bands."""
    return all(stage.bands is not None for stage in measured.stages)


def choose_strips(stages: Sequence[StagePlan], measured: Measured, width: int) -> tuple[StagePlan, ...]:
    """The stages with the widest strips that fit the budget.

    One strip has no inner edge, so it needs no halo and computes nothing twice; each further strip costs its halos.

    Args:
        stages: stages whose strips are to be chosen.
        measured: costs and budget.
        width: columns of the output, in pixels.

    Raises:
        BudgetError: the narrowest strip does not fit.
    """
    budget = measured.budget
    for tile in _strip_widths(stages, measured, width):
        chosen = with_strips(stages, measured, tile)
        host, on_device = _needs(chosen, measured, width)
        if host <= budget.host and on_device <= (budget.device or 0):
            return chosen
    name, need, limit, idle = "memory", host, budget.host, measured.baseline
    if need <= limit:
        name, need, limit, idle = "vram", on_device, budget.device or 0, measured.device_baseline
    part, remedy = f"the narrowest strip of bands ({tile * chosen[-1].scale} px)", option("executor", "tiles")
    raise budget_error(name, part, need=need, limit=limit, idle=idle, remedy=remedy)


def one_strip(stages: Sequence[StagePlan], measured: Measured, width: int) -> tuple[StagePlan, ...] | None:
    """The stages with one strip for all ``width`` output columns; None if it does not fit the budget."""
    chosen = with_strips(stages, measured, all_columns(stages, measured, width))
    host, on_device = _needs(chosen, measured, width)
    return chosen if host <= measured.budget.host and on_device <= (measured.budget.device or 0) else None


def all_columns(stages: Sequence[StagePlan], measured: Measured, width: int) -> int:
    """LR columns of the last stage behind ``width`` output columns, without a halo."""
    return -(-_enlarged(measured.canvas.reduction, width) // stages[-1].scale)


def with_strips(stages: Sequence[StagePlan], measured: Measured, tile: int) -> tuple[StagePlan, ...]:
    """The stages in bands, with strips of ``tile`` LR columns of the last stage."""
    return _with_width([replace(s, band=_bands(c).band) for s, c in zip(stages, measured.stages, strict=True)], tile)


def narrower(plan: Plan, stages: Sequence[StagePlan]) -> tuple[StagePlan, ...] | None:
    """The stages with strips of about half the width, in whole shards of the plan; None if no strip is narrower.

    With exact halos the pixels are those of the wider strips to rounding; else they have the seam error of the halos.

    Args:
        plan: plan of the store.
        stages: its stages, or these in narrower strips.
    """
    last, strip = stages[-1], replace(plan, stages=tuple(stages)).strip
    step = math.lcm(plan.shard[1], last.scale * last.align) if last.is_image else plan.shard[1]
    parts = -(-min(strip, plan.size[1]) // step)
    if parts < 2:
        return None
    return _with_width(stages, _tile_of(last, plan.reduction, -(-parts // 2) * step))


def _with_width(stages: Sequence[StagePlan], tile: int) -> tuple[StagePlan, ...]:
    """The stages with strips of ``tile`` LR columns of the last stage; earlier stages get the matching width."""
    result = [replace(stages[-1], tile=tile)]
    for stage in reversed(stages[:-1]):
        result.append(replace(stage, tile=-(-result[-1].tile // stage.scale)))
    return tuple(reversed(result))


def _tile_of(last: StagePlan, reduction: Reduction, columns: int) -> int:
    """LR columns of the last stage, in whole windows, behind ``columns`` output columns."""
    return -(-_enlarged(reduction, columns) // (last.scale * last.align)) * last.align


def _strip_widths(stages: Sequence[StagePlan], measured: Measured, width: int) -> Iterator[int]:
    """Candidates in LR pixels, widest first: the whole width, then equal parts in whole shards."""
    last = stages[-1]
    step = math.lcm(SHARD, last.scale * last.align) if last.is_image else SHARD
    yield all_columns(stages, measured, width)
    previous = None
    for parts in range(2, -(-width // step) + 1):
        columns = -(-width // (parts * step)) * step
        tile = _tile_of(last, measured.canvas.reduction, columns)
        if tile != previous:
            yield tile
        previous = tile


def _enlarged(reduction: Reduction, columns: int) -> int:
    """Columns of the last stage's image behind ``columns`` output columns, without the window of a reduction."""
    return -(-columns * reduction.source[1] // reduction.target[1])


def project(plan: Plan, measured: Measured, writes: Iterable[Box] | None = None) -> Projection:
    """Cost of ``plan`` for these boxes of whole writes, or for all."""
    runs = _strips(plan) if writes is None else list(_runs(writes))
    pixels = [sum(counts) for counts in zip(*(_lr_pixels(plan, measured, run) for run in runs), strict=True)]
    pixels = pixels or [0] * len(plan.stages)
    costs = [_bands(stage) for stage in measured.stages]
    seconds = sum(n * cost.seconds_per_pixel for n, cost in zip(pixels, costs, strict=True))
    if measured.base is not None:
        seconds += math.prod(plan.base) * measured.base.seconds_per_pixel
    strip = max((x1 - x0 for x0, x1 in plan.column_strips()), default=0)
    device, in_fp32 = (_device_bytes(plan.stages, measured, strip, in_fp32=fp32) for fp32 in (False, True))
    return Projection(
        baseline=measured.baseline,
        host_parts=_host_parts(plan.stages, measured, strip),
        device=device,
        device_in_fp32=within_budget(device, in_fp32, measured.budget),
        disk=store_bytes(plan),
        scratch=0,
        tasks=(len(runs),) * len(pixels),
        lr_pixels=tuple(pixels),
        seconds=seconds,
    )


def shares(plan: Plan, measured: Measured, count: int) -> tuple[int, ...]:
    """Bounds of ``count`` ranges of the plan's writes whose largest takes the least work; the last ones may be empty.

    A range is a run of rows in each strip that it meets, and each run has a warm-up of a receptive field. So cuts lie
    between strips where that balances as well.
    """
    grid = plan.writes().grid
    total, rows = len(grid), grid.rows
    widths = [_lr_columns(plan, columns) for columns in plan.column_strips()]

    @cache
    def lr_rows(first: int, last: int) -> list[float]:
        """LR rows of every stage for rows of shards."""
        return _lr_rows(plan, measured, (grid.box(first, 0).y0, grid.box(last - 1, 0).y1))

    def pixels(strip: int, first: int, last: int) -> int:
        """LR pixels of rows of shards of a strip."""
        return round(sum(map(mul, lr_rows(first, last), widths[strip]))) if first < last else 0

    whole = list(accumulate((pixels(strip, 0, rows) for strip in range(grid.columns)), initial=0))

    def work(first: int, last: int) -> int:
        """LR pixels of the writes: of whole strips at once, as plans may have thousands."""
        (begin, y0), (end, y1) = divmod(first, rows), divmod(last, rows)
        if begin == end:
            return pixels(begin, y0, y1)
        return pixels(begin, y0, rows) + whole[end] - whole[begin + 1] + pixels(end, 0, y1)

    def packed(limit: int) -> list[int]:
        """Bounds of ranges that hold as much as the limit allows, and at least one write."""
        bounds = [0]
        while bounds[-1] < total:
            first, step = bounds[-1], bounds[-1] - bounds[-2] if len(bounds) > 1 else 1
            low, high = first + 1, min(first + 1 + step, total)  # shares are about as long as the one before
            while high < total and work(first, high) <= limit:
                low, high = high, min(high + step, total)
                step *= 2
            ends = range(low, high + 1)
            taken = bisect_right(ends, limit, key=partial(work, first))
            bounds.append(ends[max(taken, 1) - 1])
            if len(bounds) > count + 1:
                break  # too many
        return bounds

    if count >= total:
        return tuple(min(k, total) for k in range(count + 1))
    low, high = 0, work(0, total)
    while high - low > high >> _BALANCE_BITS:
        middle = (low + high) // 2
        low, high = (low, middle) if len(packed(middle)) - 1 <= count else (middle, high)
    bounds = packed(high)
    return (*bounds, *[total] * (count + 1 - len(bounds)))


def _lr_pixels(plan: Plan, measured: Measured, run: Box) -> list[int]:
    """LR pixels that every stage computes for consecutive rows of a strip."""
    rows = _lr_rows(plan, measured, (run.y0, run.y1))
    return [round(n) for n in map(mul, rows, _lr_columns(plan, (run.x0, run.x1)))]


def _lr_columns(plan: Plan, strip: tuple[int, int]) -> list[int]:
    """LR columns that every stage computes for a strip."""
    return [right - left for left, right in plan.input_columns(strip)]


def _lr_rows(plan: Plan, measured: Measured, rows: tuple[int, int]) -> list[float]:
    """LR rows that every stage computes for consecutive rows of the output."""
    first, last = plan.reduction.rows.read(*(y + plan.roi.y0 for y in rows))
    computed = []
    for stage, cost in zip(reversed(plan.stages), reversed(measured.stages), strict=True):
        count, first, last = _rows_computed(stage, cost, first, last)
        computed.append(count)
    return computed[::-1]


def _rows_computed(stage: StagePlan, cost: MeasuredStage, first: int, last: int) -> tuple[float, int, int]:
    """LR rows that a stream computes for the output rows [first, last), and the source rows [first, last) that it reads.

    At both ends every operation computes the rows that later ones read, as far as they lie in the picture, and a few more: up
    to a band. Operations are taken to read as many rows each.
    """
    bands, frame, margin = _bands(cost), stage.padded[0], stage.margins[0]
    first, last = margin + first // stage.scale, min(margin - (-last // stage.scale), frame)
    context = cost.radius / 2 if bands.context is None else bands.context
    partial = stage.band / 2 if bands.beyond is None else bands.beyond
    rows = float(last - first)
    for inside in (first, frame - last):  # rows of the picture beyond the end
        part = min(1.0, inside / (cost.radius or 1))
        rows += partial + context * part * (2 - part)
    return rows, max(0, first - cost.radius), min(last + cost.radius, stage.height)


def inner_edges(plan: Plan) -> list[bool]:
    """Whether a strip of each stage has an edge inside the image; the sides of an image that wraps are inside it."""
    inputs = [plan.input_columns(strip) for strip in plan.column_strips()]
    return [
        any(s.period) or any(columns[i] != (0, s.padded[1]) for columns in inputs) for i, s in enumerate(plan.stages)
    ]


def _needs(stages: Sequence[StagePlan], measured: Measured, width: int) -> tuple[int, int]:
    """Bytes of host and device for the widest strip of an output of ``width`` columns."""
    reduction = measured.canvas.reduction
    strip = min(width, -(-stages[-1].tile * stages[-1].scale * reduction.target[1] // reduction.source[1]))
    parts = _host_parts(stages, measured, strip)
    return measured.baseline + sum(parts.values()), _device_bytes(stages, measured, strip)


def _bands(stage: MeasuredStage) -> BandCost:
    assert stage.bands is not None
    return stage.bands


def _strips(plan: Plan) -> list[Box]:
    """Every strip as one box, without a list of its writes."""
    return [Box(0, x0, plan.size[0], x1) for x0, x1 in plan.column_strips()]


def _runs(writes: Iterable[Box]) -> Iterator[Box]:
    """Consecutive writes of a strip, joined into one box each."""
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
    """Upper bound of the LR columns that every stage reads for a strip of ``strip`` columns of the last stage's image."""
    counts, columns = [], strip
    for stage in reversed(stages):
        context = stage.halo + stage.margins[1] + stage.align
        columns = min(stage.padded[1], -(-columns // stage.scale) + 2 * context)
        counts.append(columns)
    return counts[::-1]


def _stream_bytes(
    stages: Sequence[StagePlan], measured: Measured, strip: int, *, on_device: bool, in_fp32: bool = False
) -> int:
    columns = _columns_read(stages, measured, strip)
    return sum(
        _bands_in_fp32(cost, n) if in_fp32 else _bands(cost).bytes_at(n)
        for cost, n in zip(measured.stages, columns, strict=True)
        if cost.on_device == on_device
    )


def _bands_in_fp32(cost: MeasuredStage, columns: int) -> int:
    """Rows of a stage in float32, in place of those in half precision, and its weights beside those in half precision."""
    if cost.fp32 is None or cost.fp32.bands is None:
        return _bands(cost).bytes_at(columns)
    return cost.fp32.weights + cost.fp32.bands.bytes_at(columns)


def _columns_read(stages: Sequence[StagePlan], measured: Measured, strip: int) -> list[int]:
    """Upper bound of the LR columns that every stage reads for a strip of ``strip`` output columns."""
    reduction = measured.canvas.reduction
    window = 0 if reduction.is_identity else reduction.columns.taps
    return _columns(stages, _enlarged(reduction, strip) + window)


def _device_bytes(stages: Sequence[StagePlan], measured: Measured, strip: int, *, in_fp32: bool = False) -> int:
    """Bytes of the device: context, weights and libraries, which it holds without a strip, and the rows of all stages.

    ``in_fp32``: with float32 in all stages that have half precision.
    """
    columns = _columns_read(stages, measured, strip)
    ends = sum(
        # The input of a band with its noise, before and after it is filled up to a whole band.
        n * (_transfer_bytes(stage) + 2 * stage.band * cost.inputs * FLOAT)
        for stage, cost, n in zip(stages, measured.stages, columns, strict=True)
        if cost.on_device
    )
    rows = _stream_bytes(stages, measured, strip, on_device=True, in_fp32=in_fp32)
    return measured.device_baseline + rows + ends


def _transfer_bytes(stage: StagePlan) -> int:
    """Bytes of each LR column on their way to a device and back: two bands in each direction."""
    pixel = 1.25 if stage.is_image else FLOAT  # the image's own rows come with their half
    return math.ceil(2 * CHANNELS * ((stage.band + stage.align) * FLOAT + stage.band * stage.scale**2 * pixel))


def _host_parts(stages: Sequence[StagePlan], measured: Measured, strip: int) -> dict[str, int]:
    """Host memory above the baseline, for strips of ``strip`` output columns."""
    base = math.prod(stages[0].source_shape)
    step_1 = measured.base.bytes_at(base) if measured.base is not None else 0
    columns = _columns_read(stages, measured, strip)
    parts = {
        "network": max(step_1, _stream_bytes(stages, measured, strip, on_device=False)),
        **source_parts(measured, base, SOURCE_ROWS, columns[0]),
        "rows of shards": _ROWS_OF_SHARDS * SHARD * strip * measured.pixels.bytes,
        "shards": writer_bytes((SHARD, SHARD), measured.pixels),
    }
    if any(cost.on_device for cost in measured.stages):
        parts["shards"] = parts["shards"] * writers(parts["shards"]) + HALVES_BYTES
        # Page-locked memory, of which PyTorch takes powers of two.
        parts["pinned"] = 2 * sum(n * _transfer_bytes(s) for s, n in zip(stages, columns, strict=True))
    return with_allocator(parts | finishing_parts(measured, strip), *_ALLOCATOR)
