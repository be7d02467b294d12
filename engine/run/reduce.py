"""Last step's float32 image as the image of the store, lazily or as a stream of rows: reduced if need be, and finished."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from engine.geometry import Box
from engine.io.photo import Source
from engine.plan.plan import Plan
from engine.plan.reduction import ROWS, Reduction
from engine.run.finish import Finish
from engine.run.resample import resampled, resampled_columns
from engine.run.rows import RowBlock, RowReader, RowSource


def canvas_image(plan: Plan, image: Source, finish: Finish) -> Source:
    """The image in canvas coordinates: that of the last stage, reduced and finished where the plan says so."""
    return image if plan.is_direct else ReducedImage(image, plan.reduction, finish)


class ReducedImage:
    """An image that is reduced and rounded when it is read."""

    def __init__(self, source: Source, reduction: Reduction, finish: Finish) -> None:
        """
        Args:
            source: image of the size ``reduction.source`` or larger, float32.
            reduction: sizes.
            finish: makes the pixels of the store.
        """
        self.size = reduction.target
        self._source, self._reduction, self._finish = source, reduction, finish

    def read(self, box: Box) -> Tensor:
        """Pixels of ``box``, [C, h, w]."""
        rows, columns = self._reduction.rows, self._reduction.columns
        result = torch.empty(self._finish.pixels.channels, *box.shape, dtype=self._finish.dtype)
        for top in range(box.y0, box.y1, ROWS):
            part = Box(top, box.x0, min(top + ROWS, box.y1), box.x1)
            read = self._reduction.read(part)
            narrow = resampled_columns(self._source.read(read), columns, (part.x0, part.x1), read.x0)
            pixels = resampled(narrow, rows, (part.y0, part.y1), read.y0)
            result[:, part.y0 - box.y0 : part.y1 - box.y0] = self._finish(pixels, (part.y0, part.x0))
        return result


class ReducedRows:
    """Columns of an image that is reduced and rounded while its rows stream by."""

    def __init__(self, source: RowSource, reduction: Reduction, columns: tuple[int, int], finish: Finish) -> None:
        """
        Args:
            source: rows of the larger image in the columns behind ``columns``, float32.
            reduction: sizes.
            columns: half-open range of columns of the reduced image.
            finish: makes the pixels of the store.
        """
        self._source, self._reduction, self._columns, self._finish = source, reduction, columns, finish

    def rows(self, first: int, last: int | None = None) -> Iterator[RowBlock]:
        """Rows from ``first`` on, up to ``last`` if it is given."""
        rows, height = self._reduction.rows, self._reduction.target[0] if last is None else last
        left, _ = self._reduction.columns.read(*self._columns)
        top, source_end = rows.read(first, height)
        reader = RowReader(self._source.rows(top, source_end))
        narrow = torch.empty(3, 0, self._columns[1] - self._columns[0])  # source rows from ``top`` on, reduced in width
        for y in range(first, height, ROWS):
            bottom = min(y + ROWS, height)
            begin, end = rows.read(y, bottom)
            narrow, top = narrow[:, begin - top :], begin
            if (missing := end - top - narrow.shape[1]) > 0:
                fresh = resampled_columns(reader.take(missing).pixels, self._reduction.columns, self._columns, left)
                narrow = torch.cat([narrow, fresh], 1)
            pixels = resampled(narrow, rows, (y, bottom), top)
            yield RowBlock(self._finish(pixels, (y, self._columns[0])))
