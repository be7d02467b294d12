"""Gradient-based effective receptive field (Luo et al., "Understanding the effective receptive field", NIPS 2016).

The gradient of an output pixel (the sum of its channels) w.r.t. the input is taken; its magnitude at every input pixel,
summed over channels, is binned by Euclidean distance. R_f is the radius of the disc that holds the fraction f of the
magnitude. Both definitions in use are computed: the absolute value, and the square (energy), which gives the 10 pixels of
the OUR-GAN paper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from engine.plan.halo import ERF_FRACTIONS

SIDE = 96
"""Side of the square crops of content, in LR pixels; holds radii below 44."""

LARGE_SIDE = 176
"""Side of the crops if the smaller ones do not hold 98 % of the magnitude."""

_PHASES = 4
"""Sub-pixel phases per axis: one sample per phase pair."""

SAMPLES = _PHASES**2
"""Output pixels whose gradient is taken."""


def effective_radius(
    network: nn.Module,
    content: Sequence[Tensor],
    scale: int,
    align: int,
    largest: int = LARGE_SIDE,
    on_sample: Callable[[], None] = lambda: None,
) -> tuple[dict[str, int], dict[str, int]]:
    """Effective receptive field of a stage, as radii in LR pixels by fraction.

    Sixteen output pixels are averaged: every sub-pixel phase of a x4 stage once, spread over the phases of the window and
    over the pictures. Gradients beyond the crop are unknown, so the radii are lower bounds.

    Args:
        network: [1, 3, h, w] -> [1, 3, h * scale, w * scale].
        content: inputs of the stage, float32 [1, 3, h, w].
        scale: enlargement of the network.
        align: side of its window.
        largest: side of the largest crop that the memory permits, in LR pixels.
        on_sample: called after each of the ``SAMPLES`` gradients of a pass; there are one or two passes.

    Returns:
        Radii for the absolute and for the squared gradient. A fraction that the crop does not hold is absent.
    """
    for side in (min(SIDE, largest), largest):
        histograms = _histograms(network, [_centre(c, side, align) for c in content], scale, align, on_sample)
        absolute, square = (
            {f: r for f in ERF_FRACTIONS if (r := _radius(h, float(f))) is not None} for h in histograms
        )
        if "0.98" in absolute or all(min(c.shape[2:]) <= side for c in content):
            break
    return absolute, square


def _centre(picture: Tensor, side: int, align: int) -> Tensor:
    """Crop of at most ``side`` x ``side`` pixels from the middle, a multiple of ``align``."""
    height, width = ((min(side, n) // align) * align for n in picture.shape[2:])
    y, x = (picture.shape[2] - height) // 2, (picture.shape[3] - width) // 2
    return picture[:, :, y : y + height, x : x + width]


def _histograms(
    network: nn.Module, crops: Sequence[Tensor], scale: int, align: int, on_sample: Callable[[], None]
) -> tuple[Tensor, Tensor]:
    """Absolute and squared magnitude by distance; the last bin holds all distances beyond the nearest border."""
    limit = min(min(c.shape[2:]) // 2 - align // 2 - 1 for c in crops)
    histograms = torch.zeros(2, limit + 2, dtype=torch.float64)
    for number, crop in enumerate(crops):
        crop = crop.clone().requires_grad_(True)
        output = network(crop).sum(1)[0]  # [H * scale, W * scale]
        samples = range(number, SAMPLES, len(crops))
        for k in samples:
            q = _output_pixel(k, crop.shape[2:], scale, align)
            (gradient,) = torch.autograd.grad(output[q], crop, retain_graph=k != samples[-1])
            histograms += _bin(gradient[0], q, scale, limit)
            on_sample()
    return histograms[0], histograms[1]


def _output_pixel(k: int, size: Sequence[int], scale: int, align: int) -> tuple[int, int]:
    """Output pixel of sample k: its sub-pixel phase is (k // 4, k % 4), its phase in the window depends on k as well."""
    phase = (k // _PHASES * scale // _PHASES, k % _PHASES * scale // _PHASES)
    # 5 and 3 are coprime to a window of 8, so 16 samples visit each of its rows and columns twice.
    window = ((5 * k) % align - align // 2, (3 * k + k // 8) % align - align // 2)
    y, x = ((n // 2 + w) * scale + p for n, w, p in zip(size, window, phase, strict=True))
    return y, x


def _bin(gradient: Tensor, q: tuple[int, int], scale: int, limit: int) -> Tensor:
    """[2, limit + 2]: share of the absolute and of the squared gradient [3, h, w] by distance to output pixel ``q``."""
    cy, cx = ((v + 0.5) / scale - 0.5 for v in q)
    y = torch.arange(gradient.shape[1], dtype=torch.float64)[:, None] - cy
    x = torch.arange(gradient.shape[2], dtype=torch.float64) - cx
    distance = torch.sqrt(y * y + x * x).ceil().long().clamp(max=limit + 1).flatten()
    gradient = gradient.cpu().double()  # the distances are the host's, and MPS has no float64
    magnitudes = torch.stack([gradient.abs().sum(0), gradient.square().sum(0)]).flatten(1)
    magnitudes /= magnitudes.sum(1, keepdim=True)  # equal weight for every sample
    return torch.zeros(2, limit + 2, dtype=torch.float64).index_add_(1, distance, magnitudes)


def _radius(histogram: Tensor, fraction: float) -> int | None:
    """Smallest radius that holds the fraction; None if it lies beyond the crop."""
    share = histogram.cumsum(0) / histogram.sum()
    radius = int((share < fraction - 1e-12).sum())
    return radius if radius < len(histogram) - 1 else None
