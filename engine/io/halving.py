"""The pyramid's arithmetic: each pixel of a level is the mean of four of the level below."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.geometry import Box, Grid

Pixels = NDArray[Any]
"""[C, h, w]."""


def halve(pixels: Pixels) -> Pixels:
    """2x2 average of uint8 or uint16 [C, h, w], halves rounded up; an odd last row or column is averaged with itself."""
    _, height, width = pixels.shape
    if height % 2 or width % 2:
        pixels = np.pad(pixels, ((0, 0), (0, height % 2), (0, width % 2)), mode="edge")
    rows: Any = pixels[:, ::2].astype(np.uint16 if pixels.dtype == np.uint8 else np.uint32) + pixels[:, 1::2]
    mean: Pixels = ((rows[:, :, ::2] + rows[:, :, 1::2] + 2) >> 2).astype(pixels.dtype)
    return mean


def halve_interleaved(pixels: Pixels) -> Pixels:
    """``halve`` of [h, w, C]."""
    return halve(pixels.transpose(2, 0, 1)).transpose(1, 2, 0)


def half_of(half: Pixels | None, part: Box, whole: Box) -> Pixels | None:
    """The half of a part of an image; None where there is none, or where a pixel of it would mix two parts.

    Args:
        half: the halved image, [C, ceil(h / 2), ceil(w / 2)].
        part, whole: pixels of the part and of the image.
    """
    inside = part.relative_to(whole)
    if half is None or inside.y0 % 2 or inside.x0 % 2:
        return None
    if (inside.y1 % 2 and part.y1 < whole.y1) or (inside.x1 % 2 and part.x1 < whole.x1):
        return None
    return half[(slice(None), *inside.cover(2).slices)]


def children(below: Grid, grid: Grid, index: tuple[int, int]) -> list[tuple[int, int]]:
    """Indices in ``below`` of the shards that a shard of ``grid`` halves."""
    return list(below.indices(grid.box(*index).scale(2).clip(below.bounds)))
