"""Layout in tiles: choice of tiles that fit the memory, and their cost. Knows nothing of tensors."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import product
from typing import NamedTuple, NoReturn

from engine.errors import option
from engine.geometry import Box
from engine.pixels import PLAIN, PixelFormat
from engine.plan import limits
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
from engine.plan.limits import IN_FLIGHT, writers
from engine.plan.measured import Measured, MeasuredStage
from engine.plan.plan import Plan
from engine.plan.sides import REDUCED_CHUNK, REDUCED_SHARD, Sides, shards_of
from engine.plan.stage import StagePlan

SMALLEST, LARGEST = 16, 2048
"""Sides of a chosen tile without halo, in LR pixels."""

_STEP = 16
"""Output pixels of which sides are multiples, so that shards and chunks of useful sizes divide them."""

_WHOLE_STEP = 256
"""Output pixels of which the sides of a tile for a whole image are multiples, for the same reason."""

_ELONGATION = 3
"""Longer side of a chosen tile by its shorter one, unless that spans the image. Footprints are measured on squares: a
network's memory follows the area, but the chunks of a tail carry rows of context, which count more in a flat tile.
"""

_FINER = 1.05
"""Factor between the numbers of parts that an image is divided into, beyond the first twenty."""

SLACK, DEVICE_SLACK = 1.10, 1.02
"""The smallest tile is chosen whose work is within this factor of the least.

Larger tiles cost memory, work when interrupted, and on a CPU time: RRDBNet on 312 x 368 pixels takes 1.2 times as long a pixel
as on 192 x 192. An accelerator has memory to spare.
"""

LARGEST_ON_DEVICE = 1 << 20
"""LR pixels of a chosen tile on an accelerator, without halo: the last tile is compressed while no network runs."""

LARGEST_BATCH = 64
"""Largest batch of tiles."""

_ALLOCATOR = (40 << 20, 0.12)
"""Bytes and share for the allocator."""

Batches = Sequence[int] | None
"""Tiles of each stage that run at once; None where tiles run one by one."""


def project(plan: Plan, measured: Measured, writes: Iterable[Box] | None = None, *, batched: bool) -> Projection:
    """Cost of ``plan`` for these boxes of whole writes, or for all. Batches are as large as is useful and the budget allows."""
    counts = plan.tiles_to_run(writes)
    pixels = tuple(k * math.prod(s.tile_shape) for k, s in zip(counts, plan.stages, strict=True))
    seconds = sum(n * c.footprint.seconds_per_pixel for n, c in zip(pixels, measured.stages, strict=True))
    if measured.base is not None:
        seconds += math.prod(plan.base) * measured.base.seconds_per_pixel
    cached = [*_cached_inside(plan), _cached_of_last(plan)]
    batches = _batches(plan, measured, counts, cached) if batched else None
    host_parts, device = _needs(plan.stages, measured, cached, batches)
    return Projection(
        baseline=measured.baseline,
        host_parts=host_parts,
        device=device,
        device_in_fp32=within_budget(device, device + _redo_bytes(plan.stages, measured), measured.budget),
        disk=store_bytes(plan),
        scratch=sum(cached),
        tasks=counts,
        lr_pixels=pixels,
        seconds=seconds,
        batches=tuple(batches or ()),
    )


def shares(plan: Plan, count: int) -> tuple[int, ...]:
    """Bounds of ``count`` ranges of the plan's writes with equal work: numbers of tiles, or areas of shards of a region."""
    writes = plan.writes()
    if plan.writes_tiles:
        return tuple(-(-k * len(writes) // count) for k in range(count + 1))
    ends, area = range(len(writes) + 1), writes.area
    return tuple(bisect_left(ends, -(-k * area // count), key=lambda end: writes[:end].area) for k in range(count + 1))


def _cached_inside(plan: Plan) -> list[int]:
    """Bytes that the caches of inner stages may come to hold: whole images, or the tiles that a region takes."""
    if plan.is_whole:
        return [_image_bytes(stage) for stage in plan.stages[:-1]]
    counts = plan.tiles_to_run()
    return [min(_image_bytes(s), k * _tile_bytes(s)) for s, k in zip(plan.stages[:-1], counts, strict=False)]


def _cached_of_last(plan: Plan) -> int:
    """Bytes of the last stage that its cache may come to hold: only where shards straddle its tiles."""
    last = plan.stages[-1]
    if plan.is_whole:
        return 0 if plan.is_direct else _image_bytes(last)
    cells, (height, width) = last.grid.covered(plan.reduction.read(plan.roi)), last.grid.cell
    pixels = Box(cells.y0 * height, cells.x0 * width, cells.y1 * height, cells.x1 * width).clip(last.grid.bounds)
    return pixels.area * CHANNELS * (1 if last.is_image else FLOAT)


def shard_of_tiles(last: StagePlan) -> tuple[Sides, Sides]:
    """(height, width) of (shard, chunk) of the store for tiles of the last stage, in pixels."""
    if last.is_image:
        return shards_of(last.grid.cell)
    return (REDUCED_SHARD, REDUCED_SHARD), (REDUCED_CHUNK, REDUCED_CHUNK)


def inner_edges(plan: Plan) -> list[bool]:
    """Whether a tile of each stage has an edge inside the image; the sides of an image that wraps are inside it."""
    return [any(stage.period) or not is_whole(stage) for stage in plan.stages]


def choose_tiles(stages: Sequence[StagePlan], measured: Measured, *, batched: bool) -> tuple[StagePlan, ...]:
    """Give every stage the smallest tile within the slack of the least work that fits the budget.

    The memory of all stages depends on all of their tiles: a limit on every single tile is lowered until the whole fits.

    Args:
        stages: stages whose tiles are to be chosen.
        measured: costs and budget.
        batched: whether tiles run in batches; here in batches of one.

    Raises:
        BudgetError: the smallest tiles, or step 1, do not fit.
    """
    candidates = [_candidates(s, cost) for s, cost in zip(stages, measured.stages, strict=True)]
    smallest = [options[0].cut for options in candidates]
    batches = [1] * len(stages) if batched else None

    def needs(chosen: Sequence[StagePlan]) -> tuple[dict[str, int], int]:
        return _needs(chosen, measured, [_image_bytes(s) for s in chosen], batches)

    def fits(chosen: Sequence[StagePlan]) -> bool:
        return _within(measured, *needs(chosen))

    if not fits(smallest):
        parts, device = needs(smallest)
        _refuse(smallest, measured, measured.baseline + sum(parts.values()), device)
    for limit in sorted({candidate.size for options in candidates for candidate in options}, reverse=True):
        fitting = [[candidate for candidate in options if candidate.size <= limit] for options in candidates]
        if all(fitting) and fits(
            chosen := [_chosen(options, c.on_device) for options, c in zip(fitting, measured.stages, strict=True)]
        ):
            return tuple(chosen)
    return tuple(smallest)


def one_tile(stages: Sequence[StagePlan], measured: Measured, *, batched: bool) -> tuple[StagePlan, ...] | None:
    """The stages with a single tile each; None if it does not fit the budget."""
    chosen = []
    for stage in stages:
        step = math.lcm(stage.align, _WHOLE_STEP // math.gcd(_WHOLE_STEP, stage.scale))
        rows, columns = (-(-side // step) * step for side in stage.padded)
        chosen.append(stage.with_core((rows, columns)))
    batches = [1] * len(stages) if batched else None
    needs = _needs(chosen, measured, [_image_bytes(stage) for stage in chosen], batches)
    return tuple(chosen) if _within(measured, *needs) else None


def is_whole(stage: StagePlan) -> bool:
    """Whether a single tile covers the stage's input."""
    return stage.tile_shape == stage.padded


def smaller_tile(stage: StagePlan) -> StagePlan | None:
    """The stage with the longer side of its tile halved until the input is smaller; None when the tile is the smallest."""
    smaller = stage
    while True:
        rows, columns = smaller.core
        side = max(rows, columns) // 2 // stage.align * stage.align
        if side < max(SMALLEST, stage.align, stage.blend):
            return None
        smaller = stage.with_core((side, columns) if rows >= columns else (rows, side))
        if math.prod(smaller.tile_shape) < math.prod(stage.tile_shape):
            return smaller


class _Candidate(NamedTuple):
    """A cut that may be chosen."""

    size: int
    """Memory, of host and device, that grows with the stage's tiles."""
    work: int
    """LR pixels that the network computes for the whole image, with halos."""
    cut: StagePlan


def _candidates(stage: StagePlan, cost: MeasuredStage) -> list[_Candidate]:
    """Cuts of a stage into equal tiles that fill its image, smallest first: each needs less work than all smaller ones."""
    rows, columns = (_sides(stage, output // stage.scale) for output in stage.grid.bounds.shape)
    largest = LARGEST_ON_DEVICE if cost.on_device else math.inf
    found = []
    for core in product(rows, columns):
        is_flat = max(core) > _ELONGATION * min(core) and min(core) < min(rows[0], columns[0])
        if is_flat or math.prod(core) > largest:
            continue
        cut = stage.with_core(core)
        found.append(_Candidate(_bytes_with(cut, cost), len(cut.grid) * math.prod(cut.tile_shape), cut))
    best: list[_Candidate] = []
    for candidate in sorted(found, key=lambda candidate: candidate[:2]):
        if not best or candidate.work < best[-1].work:
            best.append(candidate)
    return best


def _sides(stage: StagePlan, length: int) -> list[int]:
    """Sides of tiles that divide ``length`` LR pixels into equal parts, rounded up; longest first."""
    step = math.lcm(stage.align, _STEP // math.gcd(_STEP, stage.scale))
    smallest = -(-max(SMALLEST, stage.blend) // step) * step
    sides, parts = {smallest}, 1
    while (side := -(-length // (parts * step)) * step) > smallest:
        if side <= LARGEST:
            sides.add(side)
        parts = max(parts + 1, int(parts * _FINER))
    return sorted(sides, reverse=True)


def _batches(plan: Plan, measured: Measured, counts: Sequence[int], cached: Sequence[int]) -> list[int]:
    """Useful batches, halved, largest first, until they fit the budget beside a tile that float32 computes again.

    A single tile takes the device to itself then (``engine.run.batched``).
    """
    stages = plan.stages
    batches = [
        # Statistics are recorded and taken one tile at a time.
        _useful_batch(s, count, measured.saturating) if c.on_device and not s.statistics else 1
        for s, c, count in zip(stages, measured.stages, counts, strict=True)
    ]
    redo = _redo_bytes(stages, measured)

    def fits() -> bool:
        host_parts, device = _needs(stages, measured, cached, batches)
        return _within(measured, host_parts, device + redo)

    while max(batches) > 1 and not fits():
        largest = max(range(len(batches)), key=lambda k: (batches[k] > 1, _batch_pixels(stages[k], batches[k])))
        batches[largest] //= 2
    return batches


def _useful_batch(stage: StagePlan, tiles: int, saturating: int) -> int:
    """Tiles of a stage that are worth running at once on a device; a CPU gains nothing from batches."""
    return max(1, min(tiles, LARGEST_BATCH, saturating // math.prod(stage.tile_shape)))


def _batch_pixels(stage: StagePlan, batch: int) -> int:
    return batch * math.prod(stage.tile_shape)


def _within(measured: Measured, host_parts: dict[str, int], device: int) -> bool:
    budget = measured.budget
    fits_device = budget.device is None or device <= budget.device
    return fits_device and measured.baseline + sum(host_parts.values()) <= budget.host


def _needs(
    stages: Sequence[StagePlan], measured: Measured, cached: Sequence[int], batches: Batches
) -> tuple[dict[str, int], int]:
    """Parts of the host memory, and bytes of the device. ``cached``: bytes of every stage that caches may come to hold."""
    device = measured.device_baseline + _network_peak(stages, measured, batches, on_device=True)
    device += _blend_bytes(stages, measured, on_device=True)
    return _host_parts(stages, measured, cached, batches), device


def _host_parts(
    stages: Sequence[StagePlan], measured: Measured, cached: Sequence[int], batches: Batches
) -> dict[str, int]:
    """Host memory above the baseline."""
    base = math.prod(stages[0].source_shape)
    network = _network_peak(stages, measured, batches, on_device=False)
    if measured.base is not None:
        network = max(network, measured.base.bytes_at(base))
    hand = 2 * max(_tile_bytes(s) for s in stages) + sum(_input_bytes(s) for s in stages)
    shards = _shard_bytes(stages[-1], measured.pixels)
    if batches is not None:
        hand += sum(_pinned_bytes(s, b) for s, b in zip(stages, batches, strict=True))
        shards *= writers(shards)
    if any(cost.on_device for cost in measured.stages):
        shards += limits.HALVES_BYTES
    parts = {
        "network": network,
        **source_parts(measured, base, *stages[0].tile_shape),
        "cache": sum(min(limits.cache_share(len(stages)), n) for n in cached),
        "tiles in hand": hand,
        "shards": shards,
    }
    if borders := _blend_bytes(stages, measured, on_device=False):
        parts["borders"] = borders
    return with_allocator(parts | finishing_parts(measured, REDUCED_SHARD), *_ALLOCATOR)


def _network_peak(stages: Sequence[StagePlan], measured: Measured, batches: Batches, *, on_device: bool) -> int:
    """Networks run one at a time, so the largest one counts.

    The buffers of batches exist all the time. A network's footprint includes some of them, which are counted once.
    """
    used = [
        (s, c, b)
        for s, c, b in zip(stages, measured.stages, batches or [1] * len(stages), strict=True)
        if c.on_device == on_device
    ]
    if batches is None:
        return max((c.footprint.bytes_at(_batch_pixels(s, b)) for s, c, b in used), default=0)
    temporary = max((c.footprint.bytes_at(_batch_pixels(s, b)) - _io_bytes(s, c, b) for s, c, b in used), default=0)
    # Pixels leave for the host's buffers at once, unless they are cross-faded.
    outputs = sum((_output_buffers(s) if s.blend else 1) * b * (_tile_bytes(s) + _half_bytes(s)) for s, _, b in used)
    inputs = sum(_io_bytes(s, c, b) for s, c, b in used)
    return max(0, temporary) + inputs + outputs


def _redo_bytes(stages: Sequence[StagePlan], measured: Measured) -> int:
    """Memory of a device that one tile takes in float32 beside everything else: the weights of all stages stay."""
    redone = [(s, c.fp32) for s, c in zip(stages, measured.stages, strict=True) if c.fp32 is not None]
    tiles = [f.tiles.bytes_at(math.prod(s.tile_shape)) + _tile_bytes(s) + _input_bytes(s) for s, f in redone]
    return sum(f.weights for _, f in redone) + max(tiles, default=0)


def _io_bytes(stage: StagePlan, cost: MeasuredStage, batch: int) -> int:
    """A batch's source pixels, input and output: buffers that a measured footprint includes."""
    return _batch_pixels(stage, batch) * FLOAT * (CHANNELS * (1 + stage.scale**2) + cost.inputs)


def _output_buffers(stage: StagePlan) -> int:
    """Buffers for the pixels of a batch, on the host or where they are cross-faded. Those of inner stages are emptied at once."""
    return IN_FLIGHT + 1 if stage.is_image else 1


def _pinned_bytes(stage: StagePlan, batch: int) -> int:
    """Page-locked host memory of a stage: PyTorch takes powers of two."""
    outputs = [] if stage.blend else [batch * _tile_bytes(stage), batch * _half_bytes(stage)] * _output_buffers(stage)
    sizes = [_batch_pixels(stage, batch) * CHANNELS * FLOAT, *outputs]
    return sum(1 << (size - 1).bit_length() for size in sizes if size)


def _tile_bytes(stage: StagePlan) -> int:
    """Output of a tile. Cross-faded tiles of the last stage are rounded to 8 bits afterwards."""
    rows, columns = (side + stage.blend for side in stage.core)
    return rows * columns * stage.scale**2 * CHANNELS * (1 if stage.is_image and not stage.blend else FLOAT)


def _half_bytes(stage: StagePlan) -> int:
    """The halved output of a tile, which a device makes of the image's own tiles."""
    return -(-_tile_bytes(stage) // 4) if stage.is_image and not stage.blend else 0


def _blend_bytes(stages: Sequence[StagePlan], measured: Measured, *, on_device: bool) -> int:
    """Memory of the cross-fade, where the networks run: borders, and on a device the cell that is blended."""
    used = [s for s, c in zip(stages, measured.stages, strict=True) if c.on_device == on_device and s.blend]
    cells = 2 * max((_tile_bytes(s) for s in used), default=0) if on_device else 0
    return sum(_border_bytes(s) for s in used) + cells


def _border_bytes(stage: StagePlan) -> int:
    """Blend borders that are kept for the neighbours: one to the right, one below, and their corner."""
    pixels = stage.blend * (sum(stage.core) + stage.blend) * stage.scale**2
    return stage.borders_kept * pixels * CHANNELS * FLOAT


def _input_bytes(stage: StagePlan) -> int:
    return math.prod(stage.tile_shape) * CHANNELS * FLOAT


def _shard_bytes(last: StagePlan, pixels: PixelFormat = PLAIN) -> int:
    shard, _ = shard_of_tiles(last)
    return writer_bytes(shard, pixels)


def _image_bytes(stage: StagePlan) -> int:
    """Float32 output of a whole stage."""
    return stage.height * stage.width * stage.scale**2 * CHANNELS * FLOAT


def _bytes_with(stage: StagePlan, cost: MeasuredStage) -> int:
    """Memory, of host and device, that grows with this stage's tiles."""
    network = cost.footprint.bytes_at(math.prod(stage.tile_shape))
    shards = _shard_bytes(stage) if stage.is_image else 0
    return network + 2 * _tile_bytes(stage) + _input_bytes(stage) + shards


def _chosen(options: Sequence[_Candidate], on_device: bool) -> StagePlan:
    """The smallest option whose work is near the least."""
    limit = (DEVICE_SLACK if on_device else SLACK) * options[-1].work
    return next(candidate.cut for candidate in options if candidate.work <= limit)


def _refuse(smallest: Sequence[StagePlan], measured: Measured, host: int, device: int) -> NoReturn:
    """Raise BudgetError for the smallest tile or step 1, whichever is larger.

    Args:
        smallest: stages with their smallest tiles.
        measured: costs and budget.
        host: host memory of all stages together.
        device: device memory of all stages together.
    """
    budget = measured.budget
    too_large = budget.device is not None and device > budget.device
    sizes = [
        (c.footprint.bytes_at(math.prod(s.tile_shape)), s)
        for s, c in zip(smallest, measured.stages, strict=True)
        if c.on_device == too_large
    ]
    size, stage = max(sizes, key=lambda n: n[0], default=(0, smallest[-1]))
    name, need, limit, idle = "memory", host, budget.host, measured.baseline
    if too_large:
        name, need, limit, idle = "vram", device, budget.device or 0, measured.device_baseline
    first, (height, width) = smallest[0], stage.tile_shape
    part = f"the smallest tile of {stage.name} ({width}x{height} with its halo of {stage.halo})"
    remedy = f"a smaller {option('overlap')} or half {option('precision')}"
    if not too_large and measured.base is not None and measured.base.bytes_at(math.prod(first.source_shape)) > size:
        base_height, base_width = first.source_shape
        part, remedy = f"step 1 for its image of {base_width}x{base_height}", f"a smaller {option('size')}"
    raise budget_error(name, part, need=need, limit=limit, idle=idle, remedy=remedy)
