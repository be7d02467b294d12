"""The boxes that a plan writes in one go, in order, without a list of them: a terapixel has a million. Knows nothing of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import overload

from engine.geometry import Box, Grid


@dataclass(frozen=True, slots=True)
class Writes(Sequence[Box]):
    """A range of a plan's writes: the cells of a grid, row by row, or column by column for strips of bands."""

    grid: Grid
    """All writes, in output pixels."""
    by_columns: bool
    """Whether a column of cells, which is a strip, follows another."""
    first: int
    """First write of the range."""
    last: int
    """Write after the last one of the range."""

    @classmethod
    def of(cls, grid: Grid, *, by_columns: bool) -> Writes:
        """All cells of a grid."""
        return cls(grid, by_columns, 0, len(grid))

    def __len__(self) -> int:
        return self.last - self.first

    @overload
    def __getitem__(self, index: int) -> Box: ...
    @overload
    def __getitem__(self, index: slice) -> Writes: ...
    def __getitem__(self, index: int | slice) -> Box | Writes:
        if isinstance(index, slice):
            first, last, step = index.indices(len(self))
            if step != 1:
                raise ValueError(f"step {step}: writes are ranges; use 1")
            return replace(self, first=self.first + first, last=self.first + max(first, last))
        line, place = divmod(range(self.first, self.last)[index], self._length)
        return self.grid.box(place, line) if self.by_columns else self.grid.box(line, place)

    def __iter__(self) -> Iterator[Box]:
        return (self[index] for index in range(len(self)))

    @property
    def area(self) -> int:
        """Number of pixels."""
        return sum(box.area for box in self.rectangles)

    @property
    def rectangles(self) -> list[Box]:
        """The same pixels in few boxes: one for each strip, or for a part of a row, the rows between, and a part of a row."""
        lines = self._length
        if self.by_columns:
            ends = range(self.first // lines, -(-self.last // lines))
            cuts = [(max(self.first, k * lines), min(self.last, (k + 1) * lines)) for k in ends]
        else:
            top, bottom = -(-self.first // lines) * lines, self.last // lines * lines
            cuts = [(self.first, min(top, self.last)), (top, bottom), (max(top, bottom), self.last)]
        corners = [(self._at(first), self._at(last - 1)) for first, last in cuts if first < last]
        return [Box(begin.y0, begin.x0, end.y1, end.x1) for begin, end in corners]

    def covers(self, box: Box) -> bool:
        """Whether the range has every pixel of ``box``, which lies in the image."""
        cells = self.grid.covered(box)
        y0, x0, y1, x1 = cells.y0, cells.x0, cells.y1 - 1, cells.x1 - 1
        corners = ((x0, y0), (x1, y1)) if self.by_columns else ((y0, x0), (y1, x1))
        low, high = (line * self._length + place for line, place in corners)
        return self.first <= low and high < self.last

    @property
    def _length(self) -> int:
        """Writes of a row of cells, or of a strip."""
        return self.grid.rows if self.by_columns else self.grid.columns

    def _at(self, number: int) -> Box:
        """The box of a number among all writes."""
        return self[number - self.first]


def spans_of(grid: Grid, boxes: Iterable[Box]) -> dict[int, list[tuple[int, int]]]:
    """Cells that overlap any of ``boxes``: for each row of cells the half-open ranges of columns, apart and in order."""
    rows: dict[int, list[tuple[int, int]]] = {}
    for box in boxes:
        if not box.area:
            continue
        cells = grid.covered(box)
        for row in range(cells.y0, cells.y1):
            spans = rows.setdefault(row, [])
            # Boxes that follow one another are joined at once, so that a list of a million takes no memory.
            if spans and spans[-1][0] <= cells.x0 <= spans[-1][1]:
                spans[-1] = (spans[-1][0], max(spans[-1][1], cells.x1))
            else:
                spans.append((cells.x0, cells.x1))
    return {row: joined(spans) for row, spans in rows.items()}


def joined(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sort half-open ranges, and merge those that overlap or touch."""
    result: list[tuple[int, int]] = []
    for first, last in sorted(spans):
        if result and first <= result[-1][1]:
            result[-1] = (result[-1][0], max(result[-1][1], last))
        else:
            result.append((first, last))
    return result
