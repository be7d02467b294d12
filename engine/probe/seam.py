"""Seam error: difference between a tile's pixels and those of the whole image, by distance from the tile's cut.

A picture is run whole, then without its top and left third, then without its bottom and right third. The difference at
distance h from a cut is the error of a tile with halo h, so two runs give the curve for every halo.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.plan.measured import SeamPoint

NEGLIGIBLE = 0.02
"""Largest error, in levels of 255, at which the curve ends."""

_STEP = 2
"""Smallest step between two halos of the curve, in LR pixels."""

_BAND = 2
"""Width of the strip along the cut whose mean and 99.9th percentile are taken, in LR pixels."""

RUNS = 3
"""Runs of the network on each picture: the whole picture, and two tiles of it."""

_CUT = 0.35
"""Share of each side that is cut off."""


def seam_curve(
    network: Callable[[Tensor], Tensor],
    content: Sequence[Tensor],
    scale: int,
    align: int,
    on_run: Callable[[], None] = lambda: None,
    *,
    on_picture: Callable[[Tensor], Callable[[Tensor], Tensor]] | None = None,
) -> tuple[tuple[SeamPoint, ...], list[Tensor]]:
    """Seam error by halo, over all pictures.

    Args:
        network: [1, 3, h, w] -> [1, 3, h * scale, w * scale].
        content: inputs of the stage, float32 [1, 3, h, w]; both sides are multiples of ``align``.
        scale: enlargement of the network.
        align: side of its window.
        on_run: called after each of the ``RUNS`` runs of the network on a picture.
        on_picture: the network for a picture and its tiles, in place of ``network`` for all.

    Returns:
        The curve, empty if every picture is a single window, which cannot be cut; and the outputs of the whole pictures.
    """
    errors, distances, outputs = [], [], []
    for picture in content:
        if on_picture is not None:
            network = on_picture(picture)
        with torch.inference_mode():
            whole = network(picture).clamp(0, 1)
            on_run()
            for error, distance in _cuts(network, picture, whole, scale, align):
                on_run()
                errors.append(error.flatten())
                distances.append(distance.flatten())
        outputs.append(whole)
    if not errors:
        return (), outputs
    return _curve(torch.cat(errors), torch.cat(distances), max(_STEP, align)), outputs


def far_effect(network: Callable[[Tensor], Tensor], picture: Tensor, scale: int, align: int) -> tuple[float, int]:
    """How much a network looks at the whole picture: the effect of the right half's negative on the left quarter.

    Args:
        network, scale, align: as for ``seam_curve``.
        picture: [1, 3, h, w].

    Returns:
        The largest change in levels, and the distance in LR pixels that it went.
    """
    width = picture.shape[3]
    half, quarter = (width // n // align * align for n in (2, 4))
    negative = picture.clone()
    negative[:, :, :, half:] = 1 - negative[:, :, :, half:]
    with torch.inference_mode():
        change = (network(negative) - network(picture))[:, :, :, : quarter * scale]
    return (float(change.abs().max()) * 255 if quarter else 0.0), half - quarter


def _cuts(
    network: Callable[[Tensor], Tensor], picture: Tensor, whole: Tensor, scale: int, align: int
) -> list[tuple[Tensor, Tensor]]:
    """(error in levels, distance from the cut in LR pixels), both [h, w], of the two tiles."""
    height, width = picture.shape[2:]
    if min(height, width) <= align:
        return []
    cy, cx = (max(align, int(n * _CUT) // align * align) for n in (height, width))
    lower = (slice(cy, None), slice(cx, None))
    upper = (slice(0, height - cy), slice(0, width - cx))
    results = []
    for (rows, columns), flip in ((lower, False), (upper, True)):
        tile = network(picture[:, :, rows, columns].contiguous(memory_format=torch.channels_last)).clamp(0, 1)
        expected = whole[:, :, _scaled(rows, scale), _scaled(columns, scale)]
        error = (tile - expected).abs().amax((0, 1)) * 255.0  # [h, w], largest over the channels
        results.append((error, _distance(error.shape, scale, flip=flip)))
    return results


def _scaled(part: slice, scale: int) -> slice:
    return slice(part.start * scale, None if part.stop is None else part.stop * scale)


def _distance(shape: Sequence[int], scale: int, *, flip: bool) -> Tensor:
    """Whole LR pixels from each output pixel to the nearer cut, at the top and left; if ``flip``, bottom and right."""
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
