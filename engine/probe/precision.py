"""Half precision: how far its picture is from float32's, through the whole chain of stages.

An error of an early stage is enlarged and amplified by the later ones, while nearly all of the work is the last stage's:
so the question is from which stage on half precision may begin.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.archs import Upscaler
from engine.geometry import Box
from engine.plan.measured import PrecisionError
from engine.probe.content import with_noise

CROP = 64
"""Side of a crop in LR pixels: 196,608 values of output."""


@torch.inference_mode()
def chain_errors(
    full: Sequence[Upscaler], half: Sequence[Upscaler], sigmas: Sequence[float], content: Tensor, align: int
) -> list[PrecisionError]:
    """The error of the last stage's output when the stages from k on run in half precision: one for every k.

    ``content``: float32 [1, 3, h, w], what the first stage takes; between the stages the most detailed crop goes on.
    """
    exact = _at_least(content, align)
    paths: list[Tensor] = []
    for index, (network, fast, sigma) in enumerate(zip(full, half, sigmas, strict=True)):
        crop = _most_detailed(exact, align)
        # The last one begins to be half precision here.
        inputs = [with_noise(_cut(x, crop), sigma, network.noise_channels, index) for x in (exact, *paths, exact)]
        exact, *paths = network(inputs[0]).clamp(0, 1), *(fast(x).float().clamp(0, 1) for x in inputs[1:])
    return [_error((path - exact).abs().flatten() * 255) for path in paths]


def _at_least(picture: Tensor, align: int) -> Tensor:
    """A picture smaller than one window, extended to it."""
    below, right = (max(0, align - n) for n in picture.shape[2:])
    return F.pad(picture, (0, right, 0, below), mode="replicate")


def _most_detailed(picture: Tensor, align: int) -> Box:
    height, width = (max(align, min(CROP, n) // align * align) for n in picture.shape[2:])
    boxes = [
        Box(y, x, y + height, x + width)
        for y in range(0, picture.shape[2] - height + 1, height)
        for x in range(0, picture.shape[3] - width + 1, width)
    ]
    return max(boxes, key=lambda box: float(_cut(picture, box).diff(dim=2).abs().mean()))


def _cut(picture: Tensor, box: Box) -> Tensor:
    rows, columns = box.slices
    return picture[:, :, rows, columns].contiguous(memory_format=torch.channels_last)


def _error(levels: Tensor) -> PrecisionError:
    rank = max(1, round(0.999 * levels.numel()))
    numbers = (levels.mean(), levels.kthvalue(rank).values, levels.max())
    return PrecisionError(*(round(float(n), 3) for n in numbers))
