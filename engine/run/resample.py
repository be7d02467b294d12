"""Separable resampling with a windowed filter: the image to its size, and alpha to that of the image.

Products are added tap by tap in a fixed order, so a pixel has the same bits whichever box it is read with.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from engine.io.sink import Array
from engine.plan.reduction import LOBES, Axis


def resampled(pixels: Tensor, axis: Axis, target: tuple[int, int], offset: int) -> Tensor:
    """Target rows [first, last) of an image; ``resampled_columns`` does the same to columns.

    Args:
        pixels: float32 [C, h, w], source rows from ``offset`` on.
        axis: sizes.
        target: half-open range of target rows.
        offset: first source row.

    Returns:
        float32 [C, last - first, w].
    """
    if axis.is_identity:
        first, last = axis.read(*target)
        return pixels[:, first - offset : last - offset]
    # In numpy: so many small operations of torch would spend their time in waking threads.
    source, (index, weights) = pixels.numpy(), _window(axis, *target)
    result = np.zeros((source.shape[0], target[1] - target[0], source.shape[2]), np.float32)
    for taps, weight in zip(index - offset, weights, strict=True):
        part = source.take(taps, axis=1, mode="clip")
        part *= weight[:, None]
        result += part
    return torch.from_numpy(result)


def resampled_columns(pixels: Tensor, axis: Axis, target: tuple[int, int], offset: int) -> Tensor:
    """Target columns [first, last) of an image. Transposed, since a selection of rows copies whole rows."""
    if axis.is_identity:
        first, last = axis.read(*target)
        return pixels[:, :, first - offset : last - offset]
    return resampled(pixels.transpose(1, 2).contiguous(), axis, target, offset).transpose(1, 2).contiguous()


@lru_cache(maxsize=8)
def _window(axis: Axis, first: int, last: int) -> tuple[Array, Array]:
    """(source pixels, weights) of the target pixels [first, last), each [taps, last - first]; weights sum to 1."""
    targets = range(first, last)
    index = np.array([axis.start(n) for n in targets]) + np.arange(axis.taps)[:, None]
    distance = (index - np.array([axis.centre(n) for n in targets])) / axis.width
    if axis.lobes == LOBES:
        weights = np.where(np.abs(distance) < LOBES, np.sinc(distance) * np.sinc(distance / LOBES), 0.0)
    else:
        weights = _cubic(np.abs(distance))
    weights[(index < 0) | (index >= axis.read_size)] = 0.0
    weights /= weights.sum(0)
    return index, weights.astype(np.float32)


def _cubic(distance: Array) -> Array:
    """Weights of Catmull and Rom's cubic (a = -1/2) at distances in lobes."""
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights: Array = np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
    return weights
