"""From the last step's float32 pixels to those of the store: grey, depth and alpha."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from engine.geometry import Box
from engine.io.photo import Source
from engine.kernels.trim import thresholds
from engine.pixels import PLAIN, PixelFormat
from engine.plan.plan import Plan
from engine.plan.reduction import Axis
from engine.run.periodic import PeriodicImage
from engine.run.resample import resampled, resampled_columns

_CUBIC = 2
"""Lobes of alpha's filter."""

_DTYPES = {8: torch.uint8, 16: torch.uint16}


class Finish:
    """Rounds pixels to the store's depth, makes grey of three equal channels, and adds alpha.

    Args:
        pixels: format of the store.
        dither: ordered dither before rounding; alpha has none.
        alpha: alpha of the image, float32 [1, h, w] in [0, 1]; None without.
    """

    def __init__(self, pixels: PixelFormat = PLAIN, *, dither: bool = False, alpha: Source | None = None) -> None:
        self.pixels = pixels
        self.dtype = _DTYPES[pixels.depth]
        self._dither, self._alpha = dither, alpha

    def __call__(self, values: Tensor, origin: tuple[int, int]) -> Tensor:
        """Pixels [C, h, w] of the store.

        Args:
            values: float32 [3, h, w], on the host.
            origin: (y, x) in the canvas, which addresses the dither and alpha.
        """
        if self.pixels.colours == 1:  # three channels differ by the rounding of their network, or by a little more
            values = ((values[0] + values[1] + values[2]) / 3)[None]
        colours = self._rounded(values, origin, dither=self._dither)
        if not self.pixels.has_alpha:
            return colours
        assert self._alpha is not None
        (y, x), (height, width) = origin, values.shape[1:]
        alpha = self._rounded(self._alpha.read(Box(y, x, y + height, x + width)), origin, dither=False)
        result = colours.new_empty(self.pixels.channels, height, width)
        result[:-1], result[-1:] = colours, alpha
        return result

    def _rounded(self, values: Tensor, origin: tuple[int, int], *, dither: bool) -> Tensor:
        levels = values.clamp(0.0, 1.0) * float(self.pixels.white)
        if dither:
            levels = levels + thresholds(origin, (values.shape[1], values.shape[2]), values.device)
        return levels.round().to(self.dtype)


class EnlargedAlpha:
    """A picture's alpha at the size of the image, read box by box.

    Args:
        source: alpha of the picture, float32 [1, h, w].
        plan: sizes.
    """

    def __init__(self, source: Source, plan: Plan) -> None:
        self.size = plan.canvas
        enlarged = plan.reduction.target
        if plan.reduction.is_identity:  # the enlarged picture, of which the canvas may be a crop
            scale = 1
            for stage in plan.stages:
                scale *= stage.scale
            enlarged = (source.size[0] * scale, source.size[1] * scale)
        period = plan.stages[0].period
        axes = [Axis(*sides, lobes=_CUBIC) for sides in zip(source.size, enlarged, strict=True)]
        self._rows, self._columns = (
            replace(axis, margin=axis.reach) if n else axis for axis, n in zip(axes, period, strict=True)
        )
        if any(period):
            sides, start = (self._rows.read_size, self._columns.read_size), (-self._rows.margin, -self._columns.margin)
            source = PeriodicImage(source, sides, period, start)
        self._source = source

    def read(self, box: Box) -> Tensor:
        """Alpha of a box of the canvas, float32 [1, h, w]."""
        (y0, y1), (x0, x1) = self._rows.read(box.y0, box.y1), self._columns.read(box.x0, box.x1)
        values = self._source.read(Box(y0, x0, y1, x1))
        narrow = resampled_columns(values, self._columns, (box.x0, box.x1), x0)
        return resampled(narrow, self._rows, (box.y0, box.y1), y0)
