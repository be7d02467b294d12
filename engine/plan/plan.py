"""Decides, before anything runs, what a render will do: canvas, tiles, halos, shards. Knows nothing of tensors.

A ``Plan`` holds everything that decides a pixel and nothing else, so that two equal plans give equal bits and a stored
plan can be compared on resume. What it costs is a ``Projection`` (engine.plan.cost), which differs between machines.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from engine.errors import AlignmentError, UsageError
from engine.geometry import Box, Grid

MAX_SHARD = 2048
"""Largest shard side in pixels: three channels of it decode in about 12 MiB, which a viewer still takes at ease."""

MAX_CHUNK = 512
"""Largest inner chunk side in pixels: the unit of a partial read, and the customary tile of viewers."""

TILES, BANDS, STREAM = "tiles", "bands", "stream"
"""Executors. ``STREAM`` runs tiles, too; a name of its own because a GPU may round another way for a batch."""

_MIN_SHARD = 256
_MIN_CHUNK = 64


@dataclass(frozen=True, slots=True)
class Tile:
    """One cell of a stage: ``read`` in LR pixels of the padded frame, ``write`` in HR pixels. ``made``: what it makes, which is
    its cell and, to the right and below, what is blended with its neighbours; ``core`` = made within the output of read."""

    row: int
    column: int
    read: Box
    write: Box
    made: Box
    core: Box


@dataclass(frozen=True, slots=True)
class StagePlan:
    """How one super-resolution stage is cut. Sizes in LR pixels.

    Tiles are ``core`` x ``core`` with ``halo`` on all sides. Bands (``band`` rows at a time, 0 for tiles) run down strips that
    are ``core`` wide, with ``halo`` on the left and on the right. ``seam_error``: 8-bit levels, 0.0 when exact, None when
    it was not measured. ``blend``: how far a tile, its halo besides, reaches into those to the right and below, to which it
    fades along ``ramp``. ``dither``: of the last stage, before its values are rounded. ``margin``: so many pixels along the
    sides of the input are context and not enlarged; what is made, and the grid, begin behind them.
    """

    name: str
    height: int
    width: int
    scale: int
    align: int
    halo: int
    core: int
    sigma: float
    seam_error: float | None
    band: int = 0
    blend: int = 0
    ramp: str = "cosine"
    dither: bool = False
    margin: int = 0

    @property
    def padded(self) -> tuple[int, int]:
        """The frame rounded up to the window grid; the rest is reflected, once, for the whole image."""
        return tuple(-(-n // self.align) * self.align for n in (self.height, self.width))  # type: ignore[return-value]

    @property
    def tile_shape(self) -> tuple[int, int]:
        """(height, width) of every input tile: all are equal, so one mask and one graph serve them."""
        full = self.core + 2 * self.halo + self.blend
        return min(full, self.padded[0]), min(full, self.padded[1])

    @property
    def grid(self) -> Grid:
        """The cells of the output, whose origin lies ``margin`` LR pixels inside the frame."""
        height, width = ((n - 2 * self.margin) * self.scale for n in (self.height, self.width))
        return Grid(height, width, self.core * self.scale)

    def tile(self, row: int, column: int) -> Tile:
        """Tile of a cell. Its origin is clamped into the frame: a deeper inner halo instead of a synthetic outer one."""
        y, x = (
            min(max(self.margin + k * self.core - self.halo, 0), frame - size)
            for k, frame, size in zip((row, column), self.padded, self.tile_shape, strict=True)
        )
        read = Box(y, x, y + self.tile_shape[0], x + self.tile_shape[1])
        write, more = self.grid.box(row, column), self.blend * self.scale
        made = Box(write.y0, write.x0, write.y1 + more, write.x1 + more).clip(self.grid.bounds)
        seen = read.shift(-self.margin, -self.margin).scale(self.scale)
        return Tile(row, column, read, write, made, made.relative_to(seen))

    def before(self, row: int, column: int) -> Iterator[tuple[int, int]]:
        """The cells whose tiles reach into this one: to the left, above, and between them."""
        if self.blend:
            around = ((row - 1, column - 1), (row - 1, column), (row, column - 1))
            yield from (index for index in around if min(index) >= 0)

    @property
    def strips_kept(self) -> int:
        """Of how many tiles the strips are kept that others are blended with: two rows of cells, as a region's shards
        straddle them, and a corner."""
        return 2 * self.grid.columns + 3 if self.blend else 0

    def tiles(self, box: Box) -> Iterator[Tile]:
        """The tiles that together cover ``box`` (HR pixels)."""
        return (self.tile(*index) for index in self.grid.indices(box))

    def columns(self, x0: int, x1: int) -> tuple[int, int]:
        """What a strip that makes the HR columns [x0, x1) reads of the padded frame: [first, last) LR columns. Of the
        margin all, so that a strip as wide as the image has no edge.
        """
        first = (self.margin + x0 // self.scale - self.halo) // self.align * self.align
        last = -(-(self.margin + -(-x1 // self.scale) + self.halo) // self.align) * self.align
        return (
            first if first > self.margin else 0,
            # An image that was cropped at the end leaves up to another margin.
            last if last < self.padded[1] - 2 * self.margin else self.padded[1],
        )

    def inside(self, columns: tuple[int, int]) -> tuple[int, int]:
        """The columns of the level below, inside the image, that these LR columns of the padded frame are made of."""
        needed = self.needs(Box(0, columns[0], self.padded[0], columns[1]))
        return needed.x0, needed.x1

    def needs(self, read: Box) -> Box:
        """What a tile's input ``read`` (of the padded frame) takes from the level below, in LR pixels: the pixels inside
        the image and, where it reaches into the padding, those that are reflected there."""
        below, right = max(0, read.y1 - self.height), max(0, read.x1 - self.width)
        top, left = min(read.y0, self.height - 1 - below), min(read.x0, self.width - 1 - right)
        return Box(top, left, read.y1, read.x1).clip(Box(0, 0, self.height, self.width))

    def check(self) -> None:
        """Raise AlignmentError unless every tile, or every strip and band, starts on the window grid; UsageError where a
        tile reaches further than its neighbours."""
        step = ("band", self.band) if self.band else ("tile core", self.core)
        for what, value in (step, ("halo", self.halo), ("blend width", self.blend), ("margin", self.margin)):
            if value % self.align:
                limit = -(-value // self.align) * self.align
                raise AlignmentError(
                    f"{self.name}: {what} {value} is not a multiple of the window {self.align}; use {limit}"
                )
        if self.blend > self.core:
            raise UsageError(
                f"{self.name}: a blend of {self.blend} reaches past the next tile of {self.core}; use at most {self.core}"
            )


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that decides the output's pixels. Sizes are (height, width); ``roi`` is in canvas pixels."""

    canvas: tuple[int, int]
    roi: Box
    base: tuple[int, int]
    stages: tuple[StagePlan, ...]
    shard: int
    chunk: int
    seed: int
    model_digest: str
    precision: str
    overlap: str
    backend: str
    executor: str = TILES
    init_digest: str | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the written image: the region of interest, or the whole canvas."""
        return self.roi.shape

    @property
    def is_whole(self) -> bool:
        """Whether the whole canvas is written, not a region of it."""
        return self.roi == Box(0, 0, *self.canvas)

    @property
    def margin(self) -> int:
        """Pixels of the base along its sides that lie outside the canvas."""
        pixels = 0
        for stage in reversed(self.stages):
            pixels = stage.margin + pixels // stage.scale
        return pixels

    @property
    def levels(self) -> tuple[tuple[int, int], ...]:
        """Sizes of the pyramid, each half of the one before, rounded up, until one chunk holds it."""
        sizes = [self.size]
        while max(sizes[-1]) > self.chunk:
            sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
        return tuple(sizes)

    def grid(self, level: int = 0) -> Grid:
        """The shards of a pyramid level."""
        return Grid(*self.levels[level], self.shard)

    def writes(self) -> Iterator[Box]:
        """What is written in one go, in output pixels: a row of shards of a strip, strip after strip; or whole tiles of
        the last stage; or whole shards of a region.
        """
        if self.executor == BANDS:
            height, width = self.size
            for x0, x1 in self.strips():
                for y in range(0, height, self.shard):
                    yield Box(y, x0, min(y + self.shard, height), min(x1, width))
            return
        cell = self.stages[-1].core * self.stages[-1].scale if self.is_whole else self.shard
        grid = Grid(*self.size, cell)
        yield from (grid.box(*index) for index in grid.indices())

    def strips(self) -> Iterator[tuple[int, int]]:
        """[first, last) output columns of every strip."""
        step = self.stages[-1].core * self.stages[-1].scale
        return ((x, min(x + step, self.size[1])) for x in range(0, self.size[1], step))

    def reads(self, strip: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        """The LR columns that every stage, first stage first, reads for a strip of the output."""
        first, last = (x + self.roi.x0 for x in strip)
        reads = []
        for stage in reversed(self.stages):
            reads.append(stage.columns(first, last))
            first, last = stage.inside(reads[-1])
        return tuple(reversed(reads))

    def tiles_to_run(self, writes: Sequence[Box] | None = None) -> tuple[int, ...]:
        """How many tiles each stage runs, first stage first, for these writes; for all of them without."""
        if writes is None and self.is_whole:
            return self._all_tiles()
        boxes = [w.shift(self.roi.y0, self.roi.x0) for w in (self.writes() if writes is None else writes)]
        counts = []
        for stage in reversed(self.stages):
            indices = {(t.row, t.column) for box in boxes for t in stage.tiles(box)}
            indices |= {before for index in indices for before in stage.before(*index)}
            counts.append(len(indices))
            boxes = [stage.needs(stage.tile(*index).read) for index in indices]
        return tuple(reversed(counts))

    def _all_tiles(self) -> tuple[int, ...]:
        """Without listing them, so that an absurd size is refused and not counted: what a whole image needs of the
        level below begins with its first tile and ends with its last.
        """
        counts, box = [], Box(0, 0, *self.canvas)
        for stage in reversed(self.stages):
            met = box.cover(stage.grid.cell)
            counts.append(met.area)
            first, last = (
                stage.needs(stage.tile(*index).read) for index in ((met.y0, met.x0), (met.y1 - 1, met.x1 - 1))
            )
            box = Box(first.y0, first.x0, last.y1, last.x1)
        return tuple(reversed(counts))

    @property
    def seam_error(self) -> float | None:
        """Largest seam error of any stage in 8-bit levels; None when a halo was given by hand without a measurement."""
        return largest_seam_error(self.stages)

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Names and values of the fields in which a stored plan differs from this one."""
        mine = self.to_json()
        return [f"{k}: {_difference(other.get(k), v)}" for k, v in mine.items() if other.get(k) != v]


def largest_seam_error(stages: Sequence[StagePlan]) -> float | None:
    """In 8-bit levels; None when one is not known."""
    errors = [s.seam_error for s in stages]
    return None if any(e is None for e in errors) else max(e for e in errors if e is not None)


def _difference(there: object, here: object) -> str:
    """Two values; of two lists of stages, whose text is long and alike, the first field that differs."""
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for old, new in zip(there, here, strict=True):
            if isinstance(old, dict) and isinstance(new, dict) and old != new:
                key = next(k for k in {**new, **old} if old.get(k) != new.get(k))
                return f"{key} of {new.get('name')} {_brief(old.get(key))} there, {_brief(new.get(key))} here"
    return f"{_brief(there)} there, {_brief(here)} here"


def _brief(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def shard_of(tile: int, most: int = MAX_SHARD) -> tuple[int, int]:
    """(shard, chunk) for a tile of ``tile`` output pixels: a shard of at most ``most`` divides the tile, a chunk the shard.

    A shard is even, so that its half in the next level lies on whole pixels. A tile without a divisor of a useful size
    is one shard, a shard without one is one chunk.
    """
    shard = next((d for d in range(min(tile, most), _MIN_SHARD - 1, -1) if tile % d == 0 and d % 2 == 0), tile)
    chunk = next((d for d in range(min(shard, MAX_CHUNK), _MIN_CHUNK - 1, -1) if shard % d == 0), shard)
    return shard, chunk
