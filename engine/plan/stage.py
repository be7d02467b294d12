"""The cut of one super-resolution step into tiles, or into strips of bands. Knows nothing of tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from engine.errors import AlignmentError, UsageError, option
from engine.geometry import Box, Grid
from engine.plan.sides import Sides, sides_of, stored_sides
from engine.plan.writes import joined

MAX_INPUT = 1 << 30
"""Longest side of a stage's input, in pixels: a device reflects positions of 31 bits about the border."""

_FIRST_ENLARGEMENT = 2
"""Step 1 makes the base image; steps 2 to 4 enlarge it (paper, section 3)."""


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


def step_of(position: int) -> int:
    """The paper's number of the super-resolution step at an index of the chain."""
    return position + _FIRST_ENLARGEMENT
