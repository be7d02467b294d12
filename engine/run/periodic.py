"""An image that repeats, as a window on the plane that repetition fills."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.geometry import Box, repeated
from engine.io.photo import Source
from engine.plan.sides import Sides
from engine.plan.stage import StagePlan


class PeriodicImage:
    """A window on the plane that an image fills by repetition.

    Args:
        source: the image, whose sides are the periods along the axes that wrap.
        size: (height, width) of the window.
        period: rows and columns after which the image repeats; 0 along an axis that does not wrap.
        start: position of the window's first pixel on the plane.
    """

    def __init__(self, source: Source, size: Sides, period: Sides, start: Sides) -> None:
        self.size = size
        self._source, self._period, self._start = source, period, start

    def read(self, box: Box) -> Tensor:
        """Pixels of ``box``, float32 [C, h, w]."""
        box = box.shift(*self._start)
        strips = []
        for top, bottom in repeated(box.y0, box.y1, self._period[0]):
            parts = repeated(box.x0, box.x1, self._period[1])
            strips.append(torch.cat([self._source.read(Box(top, left, bottom, right)) for left, right in parts], 2))
        return torch.cat(strips, 1)


def base_of(plan: StagePlan, base: Source) -> Source:
    """Input of a chain's first stage: the base image, repeated where it wraps, with context on both sides."""
    if not any(plan.period):
        return base
    return PeriodicImage(base, (plan.height, plan.width), plan.period, plan.start)
