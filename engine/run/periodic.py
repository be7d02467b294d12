"""An image that repeats, as a window on the plane that repetition fills."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from engine.geometry import Box
from engine.io.photo import Source
from engine.plan.plan import StagePlan


class PeriodicImage:
    """The input of a chain's first stage: one period of an image, with context on both sides.

    Args:
        source: the image, whose sides are the periods of ``plan`` along the axes that wrap.
        plan: cut of the first stage, which says where on the plane its input begins.
    """

    def __init__(self, source: Source, plan: StagePlan) -> None:
        self.size = (plan.height, plan.width)
        self._source, self._plan = source, plan

    def read(self, box: Box) -> Tensor:
        """Pixels of ``box``, float32 [3, h, w]."""
        (rows, columns), (y, x) = self._plan.period, self._plan.start
        strips = []
        for top, bottom in _parts(box.y0, box.y1, y, rows):
            parts = _parts(box.x0, box.x1, x, columns)
            strips.append(torch.cat([self._source.read(Box(top, left, bottom, right)) for left, right in parts], 2))
        return torch.cat(strips, 1)


def base_of(plan: StagePlan, base: Source) -> Source:
    """Input of a chain's first stage: the base image, repeated where it wraps."""
    return PeriodicImage(base, plan) if any(plan.period) else base


def _parts(first: int, last: int, start: int, period: int) -> Iterator[tuple[int, int]]:
    """Half-open ranges of the image behind [first, last) of the window."""
    if not period:
        yield first, last
        return
    position, end = first + start, last + start
    while position < end:
        inside = position % period
        count = min(end - position, period - inside)
        yield inside, inside + count
        position += count
