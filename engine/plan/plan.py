"""The plan of a render: canvas, tiles or strips, halos, shards. Knows nothing of tensors.

A ``Plan`` holds every field that decides a pixel and no other, so equal plans give equal bits (with the same
processor instructions and threads, which a store records) and a stored plan can be
compared on resume (docs/decisions/0005). Its cost is a ``Projection`` (engine.plan.cost), which differs between machines.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from engine.errors import AlignmentError, UsageError, option
from engine.geometry import Box, Grid
from engine.pixels import PLAIN, PixelFormat, pixels_of
from engine.plan.reduction import Reduction
from engine.plan.writes import Writes, joined, spans_of

MAX_SHARD = 2048
"""Largest side of a shard in pixels: three channels of 8 bits decode in about 12 MiB, which viewers handle well."""

MAX_CHUNK = 512
"""Largest side of an inner chunk in pixels: the unit of a partial read, and the usual tile size of viewers."""

REDUCED_SHARD, REDUCED_CHUNK = 1024, 512
"""Sides in pixels of the shards and chunks of an image that is made from float32: reduced, or not in 8-bit RGB."""

MAX_INPUT = 1 << 30
"""Longest side of a stage's input, in pixels: a device reflects positions of 31 bits about the border."""

_MIN_SHARD = 256
_MIN_CHUNK = 64

Sides = tuple[int, int]
"""(height, width) of a rectangle, in pixels."""

_FIRST_ENLARGEMENT = 2
"""Step 1 makes the base image; steps 2 to 4 enlarge it (paper, section 3)."""

RENAMED_EXECUTORS = {"stream": "batched"}
"""Former names of executors, in stored plans and in requests."""


@dataclass(frozen=True, slots=True)
class Tile:
    """One tile of a stage."""

    row: int
    """Row in the stage's grid."""
    column: int
    """Column in the stage's grid."""
    read: Box
    """The network's input, in LR pixels of the padded frame."""
    cell: Box
    """The tile's own cell of the output, in HR pixels."""
    output: Box
    """The cell plus its blend border (right and below), in HR pixels."""
    crop: Box
    """``output`` relative to the network's output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """Cut of one super-resolution step into tiles, or into strips of bands. Sizes are in low-resolution (LR) pixels.

    Tiles have ``tile`` columns and ``tile_rows`` rows, with ``halo`` on all sides. Strips are ``tile`` columns wide with
    ``halo`` on the left and right, and run from top to bottom in bands of ``band`` rows.
    """

    step: int
    """Number of the step in the paper: 2 for the first enlargement. It selects the input noise."""
    height: int
    """Rows of the input."""
    width: int
    """Columns of the input."""
    scale: int
    """Enlargement of the network."""
    align: int
    """Grid of tile origins: the network's attention window, or 1."""
    halo: int
    """Context around a tile, at least the receptive field if the result must be exact."""
    tile: int
    """Columns of a tile or of a strip, without halo."""
    sigma: float
    """Standard deviation of the input noise, relative to the range 0 to 1."""
    tile_rows: int = 0
    """Rows of a tile, without halo; 0 for a square and for strips."""
    band: int = 0
    """Rows of a band; 0 for tiles."""
    blend: int = 0
    """Width, beyond the halo, over which a tile is cross-faded with its right and lower neighbours."""
    ramp: str = "cosine"
    """Weight curve of the cross-fade: "cosine" or "linear"."""
    dither: bool = False
    """Ordered dither before the last step is rounded."""
    margin: int = 0
    """Pixels along each side of the input that are context only; the output and its grid begin behind them."""
    is_image: bool = False
    """Whether the output is the image itself, uint8 RGB; float32 if further stages, a reduction or another format follow."""
    period: Sides = (0, 0)
    """Rows and columns after which the input repeats; 0 along an axis that does not wrap. The input is a window on the plane
    that repetition fills: one period, and context on both sides."""
    start: Sides = (0, 0)
    """Position of the input's first pixel on that plane."""
    context: Sides = (0, 0)
    """``margin`` along the axes that wrap, at least the halo."""
    statistics: str = ""
    """Digest of the statistics of the whole picture that the network takes as constants; empty for none."""

    def __post_init__(self) -> None:
        if self.tile_rows == self.tile:  # equal cuts are equal plans
            object.__setattr__(self, "tile_rows", 0)

    @property
    def name(self) -> str:
        """The step in words."""
        return f"step {self.step}"

    @property
    def core(self) -> Sides:
        """(rows, columns) of a tile, without halo."""
        return self.tile_rows or self.tile, self.tile

    @property
    def core_text(self) -> str:
        """The tile as users write it: its side, or WIDTHxHEIGHT."""
        return f"{self.tile}x{self.tile_rows}" if self.tile_rows else f"{self.tile}"

    def with_core(self, core: Sides) -> StagePlan:
        """The stage in tiles of these (rows, columns), without halo."""
        return replace(self, tile_rows=core[0], tile=core[1])

    @property
    def margins(self) -> Sides:
        """Rows above and below, and columns left and right, that are context only."""
        return tuple(c if n else self.margin for n, c in zip(self.period, self.context, strict=True))  # type: ignore[return-value]

    @property
    def source_shape(self) -> Sides:
        """(height, width) of the source: of the input, or of one period."""
        return self.period[0] or self.height, self.period[1] or self.width

    @property
    def position(self) -> int:
        """Index in the chain of stages, from 0."""
        return self.step - _FIRST_ENLARGEMENT

    @property
    def padded(self) -> tuple[int, int]:
        """(height, width) of the frame, rounded up to the window grid. The added rows and columns are reflected."""
        return tuple(-(-n // self.align) * self.align for n in (self.height, self.width))  # type: ignore[return-value]

    @property
    def tile_shape(self) -> tuple[int, int]:
        """(height, width) of every tile's input. All are equal, so one mask and one recorded launch serve them."""
        sides = map(self._tile_side, self.core, self.grid.bounds.shape, self.padded, self.margins)
        return tuple(sides)  # type: ignore[return-value]

    def _tile_side(self, core: int, output: int, padded: int, margin: int) -> int:
        """Rows or columns of every tile's input, as many as the largest one needs.

        Args:
            core: of a tile, without halo.
            output: of the stage's output.
            padded: of the frame.
            margin: of the frame.
        """
        cells = -(-output // (core * self.scale))
        # With two cells, each has the frame's border on one side, where no halo is needed beyond the margin.
        outside = self.halo if cells > 2 else min(self.halo, margin)
        return min(core + outside + self.halo + self.blend, padded)

    @property
    def grid(self) -> Grid:
        """Cells of the output in HR pixels. The origin lies ``margins`` LR pixels inside the frame."""
        height, width = (
            (n - 2 * margin) * self.scale for n, margin in zip((self.height, self.width), self.margins, strict=True)
        )
        rows, columns = self.core
        return Grid(height, width, (rows * self.scale, columns * self.scale))

    def tile_at(self, row: int, column: int) -> Tile:
        """The tile of a cell. Its origin is clamped into the frame: a deeper inner halo replaces a synthetic border."""
        y, x = (
            min(max(margin + k * side - self.halo, 0), frame - size)
            for margin, k, side, frame, size in zip(
                self.margins, (row, column), self.core, self.padded, self.tile_shape, strict=True
            )
        )
        read = Box(y, x, y + self.tile_shape[0], x + self.tile_shape[1])
        cell, border = self.grid.box(row, column), self.blend * self.scale
        output = Box(cell.y0, cell.x0, cell.y1 + border, cell.x1 + border).clip(self.grid.bounds)
        network_output = read.shift(-self.margins[0], -self.margins[1]).scale(self.scale)
        return Tile(row, column, read, cell, output, output.relative_to(network_output))

    def blended_into(self, row: int, column: int) -> Iterator[tuple[int, int]]:
        """Cells whose tiles are cross-faded into this cell: left, above, and above left."""
        if self.blend:
            around = ((row - 1, column - 1), (row - 1, column), (row, column - 1))
            yield from (index for index in around if min(index) >= 0)

    def with_blended(self, rows: dict[int, list[tuple[int, int]]]) -> dict[int, list[tuple[int, int]]]:
        """Ranges of columns of cells by row, as ``spans_of`` gives them, with the cells that are cross-faded into them."""
        if not self.blend:
            return rows
        wide = {row: [(max(0, first - 1), last) for first, last in spans] for row, spans in rows.items()}
        around = sorted({row for below in rows for row in (below - 1, below) if row >= 0})
        return {row: joined([*wide.get(row, ()), *wide.get(row + 1, ())]) for row in around}

    def source_of(self, row: int, first: int, last: int) -> Box:
        """Pixels of the source that the tiles [first, last) of a row of cells read: tiles beside each other overlap."""
        begin, end = (self.tile_at(row, column).read for column in (first, last - 1))
        return self.source_box(Box(begin.y0, begin.x0, end.y1, end.x1))

    @property
    def borders_kept(self) -> int:
        """Number of tiles whose blend borders are kept: two rows of cells (a region's shards straddle rows) and a corner."""
        return 2 * self.grid.columns + 3 if self.blend else 0

    def tiles(self, box: Box) -> Iterator[Tile]:
        """Tiles that together cover ``box`` (HR pixels), row by row."""
        return (self.tile_at(*index) for index in self.grid.indices(box))

    def input_columns(self, x0: int, x1: int) -> tuple[int, int]:
        """Half-open range of LR columns of the padded frame that a strip reads for the HR columns [x0, x1).

        The margin is included, so a strip as wide as the image has no inner edge.
        """
        margin = self.margins[1]
        first = (margin + x0 // self.scale - self.halo) // self.align * self.align
        last = -(-(margin + -(-x1 // self.scale) + self.halo) // self.align) * self.align
        if self.period[1]:
            return max(0, first), min(last, self.padded[1])
        return (
            first if first > margin else 0,
            # An image that was cropped at the end leaves up to another margin.
            last if last < self.padded[1] - 2 * margin else self.padded[1],
        )

    def source_columns(self, columns: tuple[int, int]) -> tuple[int, int]:
        """Half-open range of source columns, inside the image, behind these LR columns of the padded frame."""
        source = self.source_box(Box(0, columns[0], self.padded[0], columns[1]))
        return source.x0, source.x1

    def source_box(self, read: Box) -> Box:
        """Pixels of the source that fill the input ``read`` of the padded frame.

        These are the pixels of ``read`` inside the image and, where it reaches into the padding, the pixels reflected there.
        """
        below, right = max(0, read.y1 - self.height), max(0, read.x1 - self.width)
        top, left = min(read.y0, self.height - 1 - below), min(read.x0, self.width - 1 - right)
        return Box(top, left, read.y1, read.x1).clip(Box(0, 0, self.height, self.width))

    def check(self) -> None:
        """Check that tiles, halos and bands fit the window grid.

        Raises:
            AlignmentError: a tile, strip, band, halo, cross-fade or margin is not a multiple of the window.
            UsageError: a cross-fade is wider than a tile, or the input is too large.
        """
        if (side := max(self.padded)) > MAX_INPUT:
            raise UsageError(
                f"{self.name}: a side of its input is too long ({side} pixels, limit {MAX_INPUT}); use a smaller image"
            )
        sizes = [("band", self.band)] if self.band else [("tile", side) for side in self.core]
        margins = [("margin", margin) for margin in self.margins]
        for what, value in (*sizes, ("halo", self.halo), ("cross-fade", self.blend), *margins):
            if value % self.align:
                limit = -(-value // self.align) * self.align
                raise AlignmentError(
                    f"{self.name}: {what} is not a multiple of the window ({value}, window {self.align}); use {limit}"
                )
        if self.blend > (side := min(self.core)):
            raise UsageError(
                f"{self.name}: cross-fade is wider than the tile ({self.blend}, tile {side}); "
                f"use {option('blend', side)} or less"
            )

    def to_json(self) -> dict[str, Any]:
        """Fields that decide pixels, under the keys of the stored format."""
        values = asdict(self)
        del values["step"], values["is_image"], values["tile"], values["tile_rows"]
        # Values of these fields are absent from the plans of earlier versions.
        if not any(self.period):
            del values["period"], values["start"], values["context"]
        if not self.statistics:
            del values["statistics"]
        return {"name": f"stage {self.position + 1}", "core": stored_sides(self.core), **values}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> StagePlan:
        """The cut of its stored form, also that of earlier versions. ``is_image`` is not stored.

        Raises:
            KeyError, TypeError, ValueError: the data is damaged.
        """
        values = {field.name: data[field.name] for field in fields(cls) if field.name in data}
        values |= {name: tuple(values[name]) for name in ("period", "start", "context") if name in values}
        rows, columns = sides_of(data["core"])
        step = step_of(int(str(data["name"]).removeprefix("stage ")) - 1)
        return cls(**values, step=step, tile=columns, tile_rows=rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Every field that decides the output's pixels. Sizes are (height, width) in pixels."""

    canvas: tuple[int, int]
    """Size of the whole image."""
    roi: Box
    """Region of interest that is written, in canvas pixels."""
    base: tuple[int, int]
    """Size of the base image: step 1's output, or the picture given instead, with its margin."""
    stages: tuple[StagePlan, ...]
    """Cut of every super-resolution step, first step first."""
    shard: Sides
    """(height, width) of a shard, in pixels."""
    chunk: Sides
    """(height, width) of an inner chunk, in pixels."""
    seed: int
    """Seed of all noise."""
    model_digest: str
    """SHA-256 of the model's contents that decide pixels."""
    precision: str
    """Precision of all stages, or of each, separated by commas."""
    backend: str
    """Device type and version of torch."""
    executor: str = "tiles"
    """Key of ``engine.plan.layouts.EXECUTORS``: a GPU may round a batch in another way than a single tile."""
    init_digest: str | None = None
    """SHA-256 of the picture that replaces step 1."""
    enlarged: tuple[int, int] | None = None
    """Size of the last step's image where it is reduced to the canvas; None if it is the canvas."""
    pixels: PixelFormat = PLAIN
    """Channels and depth of the written image."""
    profile: str | None = None
    """SHA-256 of the ICC profile of its colours; None for sRGB, and for grey without a profile."""
    noise_gain: tuple[float, ...] = ()
    """Factor of every step's noise channels, in addition to the model's own; empty if all are 1."""

    @property
    def reduction(self) -> Reduction:
        """Reduction of the last step's image to the canvas; the identity if there is none."""
        source, last = self.enlarged or self.canvas, self.stages[-1]
        margin = tuple(
            (n - m) // 2 if period else 0
            for n, m, period in zip(last.grid.bounds.shape, source, last.period, strict=True)
        )
        return Reduction(source, self.canvas, margin)  # type: ignore[arg-type]

    @property
    def is_direct(self) -> bool:
        """Whether the last step's rounded output is the image."""
        return self.reduction.is_identity and self.pixels.is_plain

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the written image: the region of interest, or the whole canvas."""
        return self.roi.shape

    @property
    def is_whole(self) -> bool:
        """Whether the whole canvas is written, not a region of it."""
        return self.roi == Box(0, 0, *self.canvas)

    @property
    def is_banded(self) -> bool:
        """Whether the stages run in bands, not in tiles."""
        return self.stages[-1].band > 0

    @property
    def needs_halos(self) -> bool:
        """Whether halos decide pixels: not in bands of one strip as wide as the canvas, which has no inner edge.

        An image that wraps continues at its sides, as far as the halos reach.
        """
        if self.wrap is not None:
            return True
        one_strip = self.is_banded and self.strip >= self.size[1]
        return not one_strip or self.roi.width != self.canvas[1]

    @property
    def wrap(self) -> str | None:
        """Axes along which the image repeats without a seam: x, y or both; None if there is none."""
        return wrap_name(self.stages[0].period)

    @property
    def scene(self) -> Sides:
        """(height, width) of the base image without its margin."""
        return tuple(
            n if period else n - 2 * self.margin for n, period in zip(self.base, self.stages[0].period, strict=True)
        )  # type: ignore[return-value]

    @property
    def margin(self) -> int:
        """Pixels along each side of the base image that lie outside the canvas."""
        pixels = 0
        for stage in reversed(self.stages):
            pixels = stage.margin + pixels // stage.scale
        return pixels

    @property
    def pyramid(self) -> tuple[tuple[int, int], ...]:
        """Sizes of the pyramid's levels: each half of the one before, rounded up, until one chunk holds it."""
        return pyramid_of(self.size, self.chunk)

    def grid(self, level: int = 0) -> Grid:
        """Shards of a level of the pyramid."""
        return Grid(*self.pyramid[level], self.shard)

    def writes(self) -> Writes:
        """Boxes that are written in one go, in output pixels, without a list of them.

        For bands: a row of shards of a strip, strip after strip. For tiles: whole tiles of the last stage, or whole shards
        of a region.
        """
        if self.is_banded:
            return Writes.of(Grid(*self.size, (self.shard[0], self.strip)), by_columns=True)
        cell = self.stages[-1].grid.cell if self.writes_tiles else self.shard
        return Writes.of(Grid(*self.size, cell), by_columns=False)

    @property
    def writes_tiles(self) -> bool:
        """Whether a write is a whole tile of the last stage."""
        return not self.is_banded and self.is_whole and self.is_direct

    @property
    def strip(self) -> int:
        """Output columns of a strip of bands: all, or whole shards."""
        enlarged = self.stages[-1].tile * self.stages[-1].scale
        if self.is_direct:
            return enlarged
        columns = enlarged * self.canvas[1] // self.reduction.source[1]
        return columns if columns >= self.size[1] else max(1, columns // self.shard[1]) * self.shard[1]

    def column_strips(self) -> Iterator[tuple[int, int]]:
        """Half-open range of output columns of every strip."""
        return ((x, min(x + self.strip, self.size[1])) for x in range(0, self.size[1], self.strip))

    def input_columns(self, strip: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        """Half-open range of LR columns that every stage, first stage first, reads for a strip of the output."""
        first, last = self.reduction.columns.read(*(x + self.roi.x0 for x in strip))
        columns = []
        for stage in reversed(self.stages):
            columns.append(stage.input_columns(first, last))
            first, last = stage.source_columns(columns[-1])
        return tuple(reversed(columns))

    def tiles_to_run(self, writes: Iterable[Box] | None = None) -> tuple[int, ...]:
        """Number of tiles that each stage runs, first stage first, for these boxes of whole writes; for all without."""
        if writes is None and self.is_whole:
            return self._all_tiles()
        written = self.writes().rectangles if writes is None else writes
        counts: list[int] = []
        boxes: Iterable[Box] = (self.reduction.read(box.shift(self.roi.y0, self.roi.x0)) for box in written)
        for stage in reversed(self.stages):
            rows = stage.with_blended(spans_of(stage.grid, boxes))
            counts.append(sum(last - first for spans in rows.values() for first, last in spans))
            boxes = [stage.source_of(row, *span) for row, spans in rows.items() for span in spans]
        return tuple(reversed(counts))

    def _all_tiles(self) -> tuple[int, ...]:
        """Counts without a list of tiles, so that an absurd size is refused at once.

        A whole image needs a box of its source that begins with its first tile's input and ends with its last tile's.
        """
        counts, box = [], self.reduction.read(Box(0, 0, *self.canvas))
        for stage in reversed(self.stages):
            cells = stage.grid.covered(box)
            counts.append(cells.area)
            first, last = (stage.source_of(row, cells.x0, cells.x1) for row in (cells.y0, cells.y1 - 1))
            box = Box(first.y0, first.x0, last.y1, last.x1)
        return tuple(reversed(counts))

    def to_json(self) -> dict[str, Any]:
        """The plan under the keys of the stored format."""
        values = {
            **asdict(self),
            "stages": [stage.to_json() for stage in self.stages],
            "shard": stored_sides(self.shard),
            "chunk": stored_sides(self.chunk),
        }
        # Values of these fields are absent from the plans of earlier versions.
        del values["pixels"]
        values |= self.pixels.to_json()
        for name in ("enlarged", "profile"):
            if values[name] is None:
                del values[name]
        if not self.noise_gain:
            del values["noise_gain"]
        if self.wrap is not None:
            values["wrap"] = self.wrap
        return json.loads(json.dumps(values))  # type: ignore[no-any-return]

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """The plan of its stored form, also that of earlier versions. Raises KeyError, TypeError or ValueError for damage."""
        enlarged, pixels = data.get("enlarged"), pixels_of(data)
        *inner, last = (StagePlan.from_json(stage) for stage in data["stages"])
        values = {field.name: data[field.name] for field in fields(cls) if field.name in data}
        values |= {name: sides_of(data[name]) for name in ("canvas", "base", "shard", "chunk")}
        return cls(
            **values
            | {
                "stages": (*inner, replace(last, is_image=enlarged is None and pixels.is_plain)),
                "roi": Box(**data["roi"]),
                "executor": executor_of(data),
                "enlarged": None if enlarged is None else sides_of(enlarged),
                "pixels": pixels,
                "noise_gain": tuple(data.get("noise_gain", ())),
            }
        )

    @property
    def digest(self) -> str:
        """SHA-256 of the stored form."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def differences(self, stored: dict[str, Any]) -> list[str]:
        """Names and values of the fields in which a stored plan differs from this one.

        Keys that this version does not store are ignored: earlier versions kept measurements in the plan. So are halos
        that decide no pixel.
        """
        later: dict[str, Any] = {"enlarged": None, "profile": None, "wrap": None}
        later |= {"channels": PLAIN.channels, "depth": PLAIN.depth, "noise_gain": [1.0] * len(self.stages)}
        here, there = {**later, **self.to_json()}, {**later, **stored, "executor": executor_of(stored)}
        stages = there.get("stages")
        if isinstance(stages, list) and len(stages) == len(self.stages):
            here["stages"] = [{"statistics": "", **stage} for stage in here["stages"]]
            stages = [{"statistics": "", **stage} if isinstance(stage, dict) else stage for stage in stages]
            there["stages"] = [_only(old, new) for old, new in zip(stages, here["stages"], strict=True)]
            if not self.needs_halos:
                for stage in (*here["stages"], *(s for s in there["stages"] if isinstance(s, dict))):
                    stage.pop("halo", None)
        return [f"{k}: {_difference(there.get(k), v)}" for k, v in here.items() if there.get(k) != v]


def wrap_name(axes: Sequence[object]) -> str | None:
    """Name of the axes (rows, columns) that are true: y, x or both; None if none is."""
    return {(True, True): "both", (True, False): "y", (False, True): "x"}.get((bool(axes[0]), bool(axes[1])))


def executor_of(stored: dict[str, Any]) -> str:
    """Name of the executor in a stored plan, by its present name."""
    name = str(stored.get("executor"))
    return RENAMED_EXECUTORS.get(name, name)


def _only(stage: object, keys: dict[str, Any]) -> object:
    return {k: v for k, v in stage.items() if k in keys} if isinstance(stage, dict) else stage


def _difference(there: object, here: object) -> str:
    """Two values; for two lists of stages, whose text is long, the first field that differs."""
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for index, (old, new) in enumerate(zip(there, here, strict=True)):
            if isinstance(old, dict) and isinstance(new, dict) and old != new:
                key = next(k for k in {**new, **old} if old.get(k) != new.get(k))
                step = index + _FIRST_ENLARGEMENT
                return f"{key} of step {step} {_brief(old.get(key))} there, {_brief(new.get(key))} here"
    return f"{_brief(there)} there, {_brief(here)} here"


def _brief(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def step_of(position: int) -> int:
    """The paper's number of the super-resolution step at an index of the chain."""
    return position + _FIRST_ENLARGEMENT


def stored_sides(sides: Sides) -> int | list[int]:
    """The stored form of a rectangle: the side of a square, as earlier versions had only squares, else [height, width]."""
    return sides[0] if sides[0] == sides[1] else list(sides)


def sides_of(stored: object) -> Sides:
    """(height, width) of a stored rectangle. Raises ValueError when it is none."""
    sides = [stored, stored] if type(stored) is int else stored
    if not (isinstance(sides, list) and len(sides) == 2 and all(type(side) is int and side > 0 for side in sides)):
        raise ValueError(f"{stored!r} is neither a side nor a height and a width")
    return sides[0], sides[1]


def pyramid_of(size: Sides, chunk: Sides) -> tuple[Sides, ...]:
    """Sizes (height, width) of the levels below ``size``, as ``Plan.pyramid`` has them."""
    sizes = [size]
    while sizes[-1][0] > chunk[0] or sizes[-1][1] > chunk[1]:
        sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
    return tuple(sizes)


def shards_of(tile: Sides) -> tuple[Sides, Sides]:
    """(height, width) of (shard, chunk) for tiles of these output pixels."""
    rows, columns = (shard_of(side) for side in tile)
    return (rows[0], columns[0]), (rows[1], columns[1])


def shard_of(tile: int, largest: int = MAX_SHARD) -> tuple[int, int]:
    """Sides (shard, chunk) in pixels for a side of ``tile`` output pixels: a shard divides the tile, a chunk the shard.

    A shard is even, so that its half in the pyramid lies on whole pixels. A tile without a divisor of a useful size is one
    shard; a shard without one is one chunk.
    """
    shard = next((d for d in range(min(tile, largest), _MIN_SHARD - 1, -1) if tile % d == 0 and d % 2 == 0), tile)
    chunk = next((d for d in range(min(shard, MAX_CHUNK), _MIN_CHUNK - 1, -1) if shard % d == 0), shard)
    return shard, chunk
