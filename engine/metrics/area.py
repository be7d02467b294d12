"""Reduction of an image by area averaging, row by row."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

Size = tuple[int, int]
"""(height, width) in pixels."""


class AreaMean:
    """Consumes the rows of an image and returns completed rows of the reduced image, in float64.

    Each new pixel is the mean of the area that it covers, fractions of pixels included. The mean of the whole image stays the
    same.
    """

    def __init__(self, source: Size, target: Size) -> None:
        (self._height, self._width), (self._rows, self._columns) = source, target
        self._seen = 0
        self._partial: Tensor | None = None  # [3, 1, columns]: sum of the incomplete row so far

    def add(self, rows: Tensor) -> Tensor:
        """Add the next rows [3, r, W] and return the rows [3, k, columns], k >= 0, that they complete."""
        narrow = self._reduce_columns(rows.double())
        first = self._seen * self._rows // self._height
        bottom = self._seen + rows.shape[1]
        done = bottom * self._rows // self._height - first
        last = -(-bottom * self._rows // self._height)
        output = self._weights(first, last, bottom).to(narrow.device) @ narrow  # [3, last - first, columns]
        if self._partial is not None:
            output[:, :1] += self._partial
        self._partial = output[:, done:] if last - first > done else None
        self._seen = bottom
        return output[:, :done]

    def _reduce_columns(self, rows: Tensor) -> Tensor:
        """Means of columns as differences of running sums, without a matrix as wide as the image."""
        if self._columns == self._width:
            return rows
        sums = F.pad(rows.cumsum(2), (1, 0))
        edge = torch.arange(self._columns + 1, dtype=torch.float64, device=rows.device) * (self._width / self._columns)
        index = edge.long().clamp(max=self._width - 1)
        at = sums[:, :, index] + (edge - index) * (sums[:, :, index + 1] - sums[:, :, index])
        return (at[:, :, 1:] - at[:, :, :-1]) * (self._columns / self._width)

    def _weights(self, first: int, last: int, bottom: int) -> Tensor:
        """Share of every new source row in the target rows [first, last): [last - first, rows]."""
        step = self._height / self._rows
        y = torch.arange(self._seen, bottom, dtype=torch.float64)[None]
        top = (torch.arange(first, last, dtype=torch.float64) * step)[:, None]
        return (torch.minimum(y + 1, top + step) - torch.maximum(y, top)).clamp(min=0) / step
