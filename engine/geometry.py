"""Integer rectangles, and grids that divide an image into cells. Knows nothing of tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """Half-open rectangle [y0, y1) x [x0, x1) in pixels; row 0 is the top."""

    y0: int
    x0: int
    y1: int
    x1: int

    def __str__(self) -> str:
        """``X,Y,WIDTH,HEIGHT``, as the command line takes it."""
        return f"{self.x0},{self.y0},{self.width},{self.height}"

    @property
    def height(self) -> int:
        return self.y1 - self.y0

    @property
    def width(self) -> int:
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


@dataclass(frozen=True, slots=True)
class Grid:
    """Square cells of an image, from its upper left corner; cells at the right and bottom border are cropped."""

    height: int
    """Rows of the image, in pixels."""
    width: int
    """Columns of the image, in pixels."""
    cell: int
    """Side of a cell, in pixels."""

    @property
    def bounds(self) -> Box:
        """The whole image."""
        return Box(0, 0, self.height, self.width)

    @property
    def rows(self) -> int:
        """Number of rows of cells."""
        return -(-self.height // self.cell)

    @property
    def columns(self) -> int:
        """Number of columns of cells."""
        return -(-self.width // self.cell)

    def __len__(self) -> int:
        return self.rows * self.columns

    def box(self, row: int, column: int) -> Box:
        """Pixels of a cell."""
        c = self.cell
        return Box(row * c, column * c, (row + 1) * c, (column + 1) * c).clip(self.bounds)

    def indices(self, box: Box | None = None) -> Iterator[tuple[int, int]]:
        """(row, column) of every cell that overlaps ``box`` (default: the whole image), row by row."""
        box = self.bounds if box is None else box.clip(self.bounds)
        if not box.area:
            return
        for row in range(box.y0 // self.cell, -(-box.y1 // self.cell)):
            for column in range(box.x0 // self.cell, -(-box.x1 // self.cell)):
                yield row, column
