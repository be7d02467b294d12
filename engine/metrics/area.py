"""A picture at another size by averaging areas, row by row. Knows no files."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

Size = tuple[int, int]


class AreaMean:
    """Takes a picture's rows and gives the rows of the picture at ``target`` size that they complete, in float64.

    Every new pixel is the mean of the area that it covers, fractions of pixels included; so the mean of the whole picture
    stays as it is. Sizes are (height, width).
    """

    def __init__(self, source: Size, target: Size) -> None:
        (self._height, self._width), (self._rows, self._columns) = source, target
        self._seen = 0
        self._partial: Tensor | None = None  # [3, 1, columns]: what the row in work has got so far

    def add(self, rows: Tensor) -> Tensor:
        """[3, r, W] -> [3, k, columns], k >= 0."""
        narrow = self._narrowed(rows.double())
        first = self._seen * self._rows // self._height
        bottom = self._seen + rows.shape[1]
        done = bottom * self._rows // self._height - first
        last = -(-bottom * self._rows // self._height)
        made = self._weights(first, last, bottom).to(narrow.device) @ narrow  # [3, last - first, columns]
        if self._partial is not None:
            made[:, :1] += self._partial
        self._partial = made[:, done:] if last - first > done else None
        self._seen = bottom
        return made[:, :done]

    def _narrowed(self, rows: Tensor) -> Tensor:
        """The columns' means, as differences of running sums: no matrix as wide as the picture."""
        if self._columns == self._width:
            return rows
        sums = F.pad(rows.cumsum(2), (1, 0))
        edge = torch.arange(self._columns + 1, dtype=torch.float64, device=rows.device) * (self._width / self._columns)
        index = edge.long().clamp(max=self._width - 1)
        at = sums[:, :, index] + (edge - index) * (sums[:, :, index + 1] - sums[:, :, index])
        return (at[:, :, 1:] - at[:, :, :-1]) * (self._columns / self._width)

    def _weights(self, first: int, last: int, bottom: int) -> Tensor:
        """[last - first, rows]: the share of every source row in the target rows [first, last)."""
        step = self._height / self._rows
        y = torch.arange(self._seen, bottom, dtype=torch.float64)[None]
        top = (torch.arange(first, last, dtype=torch.float64) * step)[:, None]
        return (torch.minimum(y + 1, top + step) - torch.maximum(y, top)).clamp(min=0) / step


def resized(picture: Tensor, target: Size) -> Tensor:
    """A picture that is in memory, [3, H, W] -> [3, *target]."""
    return AreaMean((picture.shape[1], picture.shape[2]), target).add(picture)
