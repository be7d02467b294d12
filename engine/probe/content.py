"""Real content to measure stages on: what they will see in a render, or crops of a photograph.

Seams show most where there is detail, so the crops with the most detail are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from heapq import nlargest
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import InputError, option
from engine.geometry import Box
from engine.io.photo import StoredPicture, TensorSource
from engine.kernels.gather import Noise, gather_torch

CROP = 192
"""Side of a crop in LR pixels: a cut at a third leaves 64 pixels of context outside the tile and 128 inside."""

PICTURES = 2

MIN_CROP = CROP // 2
"""Smallest side of a crop, in LR pixels."""

SAMPLE_SEED = 0
"""Seed of samples and of their noise."""


def with_noise(picture: Tensor, sigma: float, noise_channels: int, position: int) -> Tensor:
    """``picture`` [1, 3, h, w] as the input of the network at this position, on the same device, channels-last."""
    box, noise = Box(0, 0, *picture.shape[2:]), Noise(sigma, SAMPLE_SEED, position, noise_channels)
    return gather_torch(picture[0], box, box, box.shape, noise)


def is_measurable(size: tuple[int, int], align: int) -> bool:
    """Whether a picture of (height, width) is large enough to cut crops from it."""
    return min(min(CROP, n) // align * align for n in size) >= MIN_CROP


def photograph_crops(path: Path, align: int, side: int = CROP) -> list[Tensor]:
    """The most detailed crops of a photograph at full resolution, [1, 3, side, side] or smaller.

    A plan measures on them, so they take neither the memory nor the temporary file of the decoded photograph.
    """
    source = StoredPicture(path)
    height, width = (min(side, n) // align * align for n in source.size)
    if not is_measurable(source.size, align):
        raise InputError(
            f"{path}: too small to measure on ({source.size[1]}x{source.size[0]}); "
            f"use one of at least {MIN_CROP + align - 1}x{MIN_CROP + align - 1}"
        )
    crops = source.crops(_candidates(source.size, (height, width)))
    return [_batch(crop) for crop in nlargest(PICTURES, crops, key=_detail)]


def detailed_crops(pictures: list[Tensor], align: int, side: int = CROP) -> list[Tensor]:
    """The most detailed crops of one or two pictures [1, 3, h, w]; a picture of less than twice ``side`` is taken whole."""
    crops = []
    for picture in pictures:
        size = (picture.shape[2], picture.shape[3])
        shape = tuple(min(side if n > 2 * side else n, n) // align * align for n in size)
        if not min(shape):
            raise InputError(
                f"a sample of {size[1]}x{size[0]} is smaller than the window of {align}; give a photograph with "
                f"{option('image')}, or use {option('overlap', 'exact')}"
            )
        crops += _detailed(TensorSource(picture[0]).read, size, (shape[0], shape[1]), PICTURES // len(pictures))
    return crops


def _detailed(read: Callable[[Box], Tensor], size: tuple[int, int], shape: tuple[int, int], count: int) -> list[Tensor]:
    boxes = sorted(_candidates(size, shape), key=lambda box: -_detail(read(box)))
    return [_batch(read(box)) for box in boxes[:count]]


def _batch(crop: Tensor) -> Tensor:
    return crop[None].contiguous(memory_format=torch.channels_last)


def _candidates(size: tuple[int, int], shape: tuple[int, int]) -> Iterator[Box]:
    """Crops on a grid of at most 8 x 8 that do not overlap, row by row."""
    steps = [max(s, (n - s) // 7 or s) for n, s in zip(size, shape, strict=True)]
    for y in range(0, size[0] - shape[0] + 1, steps[0]):
        for x in range(0, size[1] - shape[1] + 1, steps[1]):
            yield Box(y, x, y + shape[0], x + shape[1])


def _detail(crop: Tensor) -> float:
    return float(crop.diff(dim=1).abs().mean() + crop.diff(dim=2).abs().mean())
