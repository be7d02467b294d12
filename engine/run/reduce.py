"""Reduction of the last step's image, as a lazy image or as a stream of rows, by a separable Lanczos window.

Products are added tap by tap in a fixed order, so a pixel has the same bits whichever box it is read with.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from engine.geometry import Box
from engine.io.photo import Source
from engine.io.zarr_store import Array
from engine.kernels.trim import trim
from engine.plan.plan import Plan
from engine.plan.reduction import LOBES, ROWS, Axis, Reduction
from engine.run.rows import RowBlock, RowReader, RowSource


class ReducedImage:
    """An image that is reduced when it is read."""

    def __init__(self, source: Source, reduction: Reduction, *, dither: bool) -> None:
        """
        Args:
            source: image of the size ``reduction.source`` or larger, float32.
            reduction: sizes.
            dither: ordered dither before rounding to 8 bits.
        """
        self.size = reduction.target
        self._source, self._reduction, self._dither = source, reduction, dither

    def read(self, box: Box) -> Tensor:
        """Pixels of ``box``, uint8 [3, h, w]."""
        rows, columns = self._reduction.rows, self._reduction.columns
        result = torch.empty(3, *box.shape, dtype=torch.uint8)
        for top in range(box.y0, box.y1, ROWS):
            part = Box(top, box.x0, min(top + ROWS, box.y1), box.x1)
            read = self._reduction.read(part)
            narrow = _reduced_columns(self._source.read(read), columns, (part.x0, part.x1), read.x0)
            pixels = reduced(narrow, rows, (part.y0, part.y1), read.y0)
            result[:, part.y0 - box.y0 : part.y1 - box.y0] = _rounded(pixels, (part.y0, part.x0), self._dither)
        return result


def canvas_image(plan: Plan, image: Source) -> Source:
    """The image in canvas coordinates: that of the last stage, reduced where the plan says so."""
    if plan.reduction.is_identity:
        return image
    return ReducedImage(image, plan.reduction, dither=plan.stages[-1].dither)


class ReducedRows:
    """Columns of an image that is reduced while its rows stream by."""

    def __init__(self, source: RowSource, reduction: Reduction, columns: tuple[int, int], *, dither: bool) -> None:
        """
        Args:
            source: rows of the larger image in the columns behind ``columns``, float32.
            reduction: sizes.
            columns: half-open range of columns of the reduced image.
            dither: ordered dither before rounding to 8 bits.
        """
        self._source, self._reduction, self._columns, self._dither = source, reduction, columns, dither

    def rows(self, first: int) -> Iterator[RowBlock]:
        """Rows from ``first`` on, uint8."""
        rows, height = self._reduction.rows, self._reduction.target[0]
        left, _ = self._reduction.columns.read(*self._columns)
        top, _ = rows.read(first, first + 1)
        reader = RowReader(self._source.rows(top))
        narrow = torch.empty(3, 0, self._columns[1] - self._columns[0])  # source rows from ``top`` on, reduced in width
        for y in range(first, height, ROWS):
            bottom = min(y + ROWS, height)
            begin, end = rows.read(y, bottom)
            narrow, top = narrow[:, begin - top :], begin
            if (missing := end - top - narrow.shape[1]) > 0:
                fresh = _reduced_columns(reader.take(missing).pixels, self._reduction.columns, self._columns, left)
                narrow = torch.cat([narrow, fresh], 1)
            pixels = reduced(narrow, rows, (y, bottom), top)
            yield RowBlock(_rounded(pixels, (y, self._columns[0]), self._dither))


def reduced(pixels: Tensor, axis: Axis, target: tuple[int, int], offset: int) -> Tensor:
    """Target rows [first, last) of an image; ``_reduced_columns`` does the same to columns.

    Args:
        pixels: float32 [3, h, w], source rows from ``offset`` on.
        axis: sizes.
        target: half-open range of target rows.
        offset: first source row.

    Returns:
        float32 [3, last - first, w].
    """
    if axis.is_identity:
        first, last = axis.read(*target)
        return pixels[:, first - offset : last - offset]
    # In numpy: so many small operations of torch would spend their time in waking threads.
    source, (index, weights) = pixels.numpy(), _window(axis, *target)
    result = np.zeros((3, target[1] - target[0], source.shape[2]), np.float32)
    for taps, weight in zip(index - offset, weights, strict=True):
        part = source.take(taps, axis=1, mode="clip")
        part *= weight[:, None]
        result += part
    return torch.from_numpy(result)


def _reduced_columns(pixels: Tensor, axis: Axis, target: tuple[int, int], offset: int) -> Tensor:
    """Target columns [first, last) of an image. Transposed, since a selection of rows copies whole rows."""
    if axis.is_identity:
        first, last = axis.read(*target)
        return pixels[:, :, first - offset : last - offset]
    return reduced(pixels.transpose(1, 2).contiguous(), axis, target, offset).transpose(1, 2).contiguous()


@lru_cache(maxsize=8)
def _window(axis: Axis, first: int, last: int) -> tuple[Array, Array]:
    """(source pixels, weights) of the target pixels [first, last), each [taps, last - first]; weights sum to 1."""
    targets = range(first, last)
    index = np.array([axis.start(n) for n in targets]) + np.arange(axis.taps)[:, None]
    distance = (index - np.array([axis.centre(n) for n in targets])) / axis.width
    weights = np.where(np.abs(distance) < LOBES, np.sinc(distance) * np.sinc(distance / LOBES), 0.0)
    weights[(index < 0) | (index >= axis.read_size)] = 0.0
    weights /= weights.sum(0)
    return index, weights.astype(np.float32)


def _rounded(pixels: Tensor, origin: tuple[int, int], dither: bool) -> Tensor:
    """uint8 pixels of [3, h, w]; ``origin``: (y, x) in the image, which addresses the dither."""
    box = Box(0, 0, pixels.shape[1], pixels.shape[2])
    return trim(pixels[None], box, torch.uint8, origin=origin, dither=dither).pixels
