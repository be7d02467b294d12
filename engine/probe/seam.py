"""Seam error: what cutting a tile out of an image does to its pixels, against the distance from the cut.

A picture is run whole, then without its top and left third, and again without its bottom and right third. At distance h
from a cut, the difference is what a tile with halo h would show: two runs give the curve for every halo at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from engine.plan.measured import SeamPoint

NEGLIGIBLE = 0.02
"""The curve ends where the largest error falls below this many levels of 255."""

_STEP = 2
_BAND = 2
_CUT = 0.35


def seam_curve(
    network: nn.Module, content: Sequence[Tensor], scale: int, align: int
) -> tuple[tuple[SeamPoint, ...], list[Tensor]]:
    """Error by halo over all pictures, and the pictures' whole outputs.

    ``content``: float32 [1, 3, h, w], both sides multiples of ``align``. Pictures of one window cannot be cut: no curve.
    """
    errors, distances, outputs = [], [], []
    for picture in content:
        with torch.inference_mode():
            whole = network(picture).clamp(0, 1)
            for error, distance in _cuts(network, picture, whole, scale, align):
                errors.append(error.flatten())
                distances.append(distance.flatten())
        outputs.append(whole)
    if not errors:
        return (), outputs
    return _curve(torch.cat(errors), torch.cat(distances), max(_STEP, align)), outputs


def _cuts(network: nn.Module, picture: Tensor, whole: Tensor, scale: int, align: int) -> list[tuple[Tensor, Tensor]]:
    height, width = picture.shape[2:]
    if min(height, width) <= align:
        return []
    cy, cx = (max(align, int(n * _CUT) // align * align) for n in (height, width))
    lower = (slice(cy, None), slice(cx, None))
    upper = (slice(0, height - cy), slice(0, width - cx))
    results = []
    for (rows, columns), flip in ((lower, False), (upper, True)):
        tile = network(picture[:, :, rows, columns].contiguous(memory_format=torch.channels_last)).clamp(0, 1)
        same = whole[:, :, _scaled(rows, scale), _scaled(columns, scale)]
        error = (tile - same).abs().amax((0, 1)) * 255.0  # [h, w], the worst channel
        results.append((error, _distance(error.shape, scale, flip)))
    return results


def _scaled(part: slice, scale: int) -> slice:
    return slice(part.start * scale, None if part.stop is None else part.stop * scale)


def _distance(shape: Sequence[int], scale: int, flip: bool) -> Tensor:
    """Whole LR pixels between an output pixel and the nearer cut: top and left, or bottom and right if flipped."""
    y, x = (torch.arange(n) // scale for n in shape)
    if flip:
        y, x = y.flip(0), x.flip(0)
    return torch.minimum(y[:, None], x[None, :])


def _curve(error: Tensor, distance: Tensor, step: int) -> tuple[SeamPoint, ...]:
    points = []
    for halo in range(0, int(distance.max()) - _BAND, step):
        band = error[(distance >= halo) & (distance < halo + _BAND)]
        rank = max(1, round(0.999 * band.numel()))
        worst = float(error[distance >= halo].max())
        points.append(
            SeamPoint(halo, round(float(band.mean()), 4), round(float(band.kthvalue(rank).values), 4), round(worst, 4))
        )
        if worst < NEGLIGIBLE:
            break
    return tuple(points)
