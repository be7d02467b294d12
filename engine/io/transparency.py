"""Colours of transparent pixels, which a network sees: they continue the visible ones.

Files hold anything there, mostly black or white. A network would draw it into the visible side of an edge as a fringe. The
module knows arrays alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from engine.geometry import Box

Samples = np.ndarray[Any, np.dtype[Any]]

REACH = 32
"""Pixels around a transparent one among which visible ones are looked for: beyond, no network reaches a visible pixel with
more than a trace."""

_RADII = (1, 2, 4, 8, 16, REACH)
_BLOCK = (256, 1024)
"""Rows and columns that are filled at a time, which bounds the memory."""


def filled(read: Callable[[Box], Samples], box: Box, bounds: Box) -> Samples:
    """Samples of a box, [h, w, C] without alpha.

    A pixel whose alpha is zero gets the mean of the visible pixels in the smallest square around it that has any, weighted
    by their alpha; half of white where there are none. All sums are of integers, so a pixel has the same value in any box.

    Args:
        read: reads a box of the picture: unsigned integers [h, w, C + 1], alpha last.
        box: inside ``bounds``.
        bounds: the picture.
    """
    parts = []
    for rows in _cuts(box.y0, box.y1, _BLOCK[0]):
        row = [_block(read, Box(rows[0], x0, rows[1], x1), bounds) for x0, x1 in _cuts(box.x0, box.x1, _BLOCK[1])]
        parts.append(row[0] if len(row) == 1 else np.concatenate(row, 1))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _cuts(first: int, last: int, step: int) -> Iterator[tuple[int, int]]:
    return ((n, min(n + step, last)) for n in range(first, last, step))


def _block(read: Callable[[Box], Samples], box: Box, bounds: Box) -> Samples:
    samples = read(box)
    colours = samples[..., :-1]
    ys, xs = np.nonzero(samples[..., -1] == 0)
    if not len(ys):
        return colours
    result = colours.copy()
    around = Box(box.y0 - REACH, box.x0 - REACH, box.y1 + REACH, box.x1 + REACH).clip(bounds)
    sums = _sums(read(around))
    below, right = ys + box.y0 - around.y0, xs + box.x0 - around.x0
    result[ys, xs] = np.iinfo(samples.dtype).max // 2
    for radius in _RADII:
        y0, y1 = np.maximum(below - radius, 0), np.minimum(below + radius + 1, around.height)
        x0, x1 = np.maximum(right - radius, 0), np.minimum(right + radius + 1, around.width)
        weights = sums[y1, x1, -1] - sums[y0, x1, -1] - sums[y1, x0, -1] + sums[y0, x0, -1]
        seen = weights > 0
        corners = [(a[seen], b[seen]) for a, b in ((y1, x1), (y0, x1), (y1, x0), (y0, x0))]
        totals = [sums[..., :-1][corner] for corner in corners]
        weight = weights[seen][:, None]
        result[ys[seen], xs[seen]] = (totals[0] - totals[1] - totals[2] + totals[3] + weight // 2) // weight
        ys, xs, below, right = ys[~seen], xs[~seen], below[~seen], right[~seen]
    return result


def _sums(samples: Samples) -> Samples:
    """Sums over all pixels above and to the left, int64 [h + 1, w + 1, C + 1]: of colours times alpha, and of alpha."""
    height, width, channels = samples.shape
    sums = np.zeros((height + 1, width + 1, channels), np.int64)
    inner = sums[1:, 1:]
    inner[...] = samples
    inner[..., :-1] *= inner[..., -1:]
    np.cumsum(inner, 0, out=inner)
    np.cumsum(inner, 1, out=inner)
    return sums
