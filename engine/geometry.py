"""Integer rectangles, grids that divide an image into cells, and sizes and regions as users write them.

Users write the width first, as on the command line: (width, height) and (x, y, width, height). Inside, as in arrays, the
rows come first. ``parse_size`` and ``parse_box`` are the border between the two. Knows nothing of tensors.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from engine.errors import UsageError, option

UNBOUNDED = 1 << 30
"""Radius of a network whose receptive field is not known, in pixels."""


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """Half-open rectangle [y0, y1) x [x0, x1) in pixels; row 0 is the top."""

    y0: int
    """First row."""
    x0: int
    """First column."""
    y1: int
    """Row after the last one."""
    x1: int
    """Column after the last one."""

    def __str__(self) -> str:
        """``X,Y,WIDTH,HEIGHT``, as the command line takes it."""
        return f"{self.x0},{self.y0},{self.width},{self.height}"

    @property
    def height(self) -> int:
        """Number of rows."""
        return self.y1 - self.y0

    @property
    def width(self) -> int:
        """Number of columns."""
        return self.x1 - self.x0

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width)."""
        return self.height, self.width

    @property
    def area(self) -> int:
        """Number of pixels."""
        return max(0, self.height) * max(0, self.width)

    @property
    def slices(self) -> tuple[slice, slice]:
        """Index of the rectangle in an array [H, W]."""
        return slice(self.y0, self.y1), slice(self.x0, self.x1)

    def shift(self, dy: int, dx: int) -> Box:
        """The rectangle moved down by ``dy`` and right by ``dx``."""
        return Box(self.y0 + dy, self.x0 + dx, self.y1 + dy, self.x1 + dx)

    def relative_to(self, outer: Box) -> Box:
        """The same rectangle in coordinates whose origin is the corner of ``outer``."""
        return self.shift(-outer.y0, -outer.x0)

    def scale(self, factor: int) -> Box:
        """The same rectangle on an image that is ``factor`` times larger."""
        return Box(self.y0 * factor, self.x0 * factor, self.y1 * factor, self.x1 * factor)

    def cover(self, factor: int) -> Box:
        """Smallest rectangle on an image ``factor`` times smaller that covers this one."""
        return Box(self.y0 // factor, self.x0 // factor, -(-self.y1 // factor), -(-self.x1 // factor))

    def clip(self, outer: Box) -> Box:
        """Intersection with ``outer``; its area is 0 if they do not overlap."""
        y0, x0 = max(self.y0, outer.y0), max(self.x0, outer.x0)
        return Box(y0, x0, max(y0, min(self.y1, outer.y1)), max(x0, min(self.x1, outer.x1)))

    def contains(self, other: Box) -> bool:
        """Whether ``other`` lies within this rectangle."""
        return self.y0 <= other.y0 and self.x0 <= other.x0 and other.y1 <= self.y1 and other.x1 <= self.x1


Region: TypeAlias = tuple[int, int, int, int] | Box | str
"""A region as users write it, in pixels: (x, y, width, height), a box, or a text such as ``1000,500,512,512``."""


def repeated(first: int, last: int, period: int) -> Iterator[tuple[int, int]]:
    """Half-open ranges of positions in [0, period) that follow one another in [first, last) of an axis that repeats.

    Args:
        first, last: range, which may begin before 0.
        period: positions after which the axis repeats; 0 if it does not, which leaves the range as it is.
    """
    if not period:
        yield first, last
        return
    while first < last:
        inside = first % period
        count = min(last - first, period - inside)
        yield inside, inside + count
        first += count


@dataclass(frozen=True, slots=True)
class Grid:
    """Equal cells of an image, from its upper left corner; cells at the right and bottom border are cropped."""

    height: int
    """Rows of the image, in pixels."""
    width: int
    """Columns of the image, in pixels."""
    cell: tuple[int, int]
    """(height, width) of a cell, in pixels."""

    @property
    def bounds(self) -> Box:
        """The whole image."""
        return Box(0, 0, self.height, self.width)

    @property
    def rows(self) -> int:
        """Number of rows of cells."""
        return -(-self.height // self.cell[0])

    @property
    def columns(self) -> int:
        """Number of columns of cells."""
        return -(-self.width // self.cell[1])

    def __len__(self) -> int:
        return self.rows * self.columns

    def box(self, row: int, column: int) -> Box:
        """Pixels of a cell."""
        height, width = self.cell
        y, x = row * height, column * width
        return Box(y, x, y + height, x + width).clip(self.bounds)

    def indices(self, box: Box | None = None) -> Iterator[tuple[int, int]]:
        """(row, column) of every cell that overlaps ``box`` (default: the whole image), row by row."""
        box = self.bounds if box is None else box.clip(self.bounds)
        if not box.area:
            return
        cells = self.covered(box)
        for row in range(cells.y0, cells.y1):
            for column in range(cells.x0, cells.x1):
                yield row, column

    def covered(self, box: Box) -> Box:
        """Rows and columns of the cells that overlap ``box``, which lies in the image."""
        height, width = self.cell
        return Box(box.y0 // height, box.x0 // width, -(-box.y1 // height), -(-box.x1 // width))


MAX_SIDE = 2**31 - 1
"""Largest side of an image in pixels, as in TIFF readers and libvips."""


@dataclass(frozen=True, slots=True)
class PictureTiles:
    """Tiles of a picture file: a read decodes and holds all that it touches, up to a number."""

    tile: tuple[int, int]
    """(height, width) of a tile, in pixels."""
    count: tuple[int, int]
    """Rows and columns of tiles."""
    most: int
    """Tiles that are held at most."""
    pixel_bytes: int
    """Bytes of a decoded pixel."""

    def bytes_of(self, rows: int, columns: int) -> int:
        """Upper bound of the decoded tiles of a box of ``rows`` x ``columns`` pixels, wherever it begins."""
        sides = zip((rows, columns), self.tile, self.count, strict=True)
        touched = math.prod(min(count, -(-(side - 1) // tile) + 1) for side, tile, count in sides)
        return min(touched, self.most) * math.prod(self.tile) * self.pixel_bytes


def parse_size(size: object, name: str = "size") -> tuple[int, int]:
    """(width, height) from such a pair, or from a text such as ``4096x3072``.

    Raises:
        UsageError: the value has another form, or a side is 0.
    """
    form = "WIDTHxHEIGHT in pixels, such as 4096x3072"
    if isinstance(size, str):
        text = size if re.fullmatch(r"\d+[xX]\d+", size) else ""
        sides = _whole_numbers(text.lower().split("x"))
    else:
        sides = _whole_numbers(size)
    if len(sides) == 2 and min(sides) > 0:
        if max(sides) > MAX_SIDE:
            raise UsageError(f"{option(name)}: a side is too long (more than {MAX_SIDE} pixels); use a smaller size")
        return sides[0], sides[1]
    if isinstance(size, str):
        raise UsageError(f"{option(name, size)}: not a size; write {form}")
    raise UsageError(f"{option(name)}: {size!r} is not a size; give (width, height), or {form}")


def parse_box(region: object, name: str = "roi") -> Box:
    """Box from a ``Region``: (x, y, width, height), a text such as ``1000,500,512,512``, or a box.

    Args:
        region: value to parse.
        name: option to name in the error.

    Raises:
        UsageError: the value has another form, or the region is empty.
    """
    form = "X,Y,WIDTH,HEIGHT in pixels of the whole image, such as 1000,500,512,512"
    if isinstance(region, Box):
        return region
    if isinstance(region, str):
        text = region if re.fullmatch(r"\d+(,\d+)*", region) else ""
        numbers = _whole_numbers(text.split(","))
    else:
        numbers = _whole_numbers(region)
    if len(numbers) == 4 and min(numbers) >= 0 and numbers[2] and numbers[3]:
        if max(numbers) > MAX_SIDE:
            raise UsageError(f"{option(name)}: beyond any image ({MAX_SIDE} pixels); write {form}")
        x, y, width, height = numbers
        return Box(y, x, y + height, x + width)
    if isinstance(region, str):
        raise UsageError(f"{option(name, region)}: not a region; write {form}")
    raise UsageError(f"{option(name)}: {region!r} is not a region; give (x, y, width, height), a Box, or {form}")


def whole_number(value: object) -> int | None:
    """An integer of Python or numpy, or digits, as an integer; None for any other value, also for True and False."""
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"\d{1,1000}", value) else None  # Python refuses texts of more than 4,300
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def _whole_numbers(values: object) -> list[int]:
    """The numbers of a sequence; empty if any is no whole number."""
    numbers = [whole_number(value) for value in values] if isinstance(values, Iterable) else []
    whole = [number for number in numbers if number is not None]
    return whole if len(whole) == len(numbers) else []
