"""Gradient-based effective receptive field (Luo et al., "Understanding the effective receptive field", NIPS 2016).

One is back-propagated from an output pixel q (all channels); the magnitude of the gradient at every input pixel, summed
over channels, is binned by its Euclidean distance to q. R_f is the radius of the disc that holds the fraction f.
"Magnitude" is read in both ways in use: the absolute value, and the square (energy), which is the one that gives the
paper's 10 pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from engine.plan.halo import ERF_FRACTIONS

SIDE = 96
"""Side of the square of content that gradients are taken on, LR pixels: holds radii below 44."""

LARGE_SIDE = 176
"""Used when the smaller square does not hold 98 % of the magnitude."""

_PHASES = 4


def effective_radius(
    network: nn.Module, content: Sequence[Tensor], scale: int, align: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Radii in LR pixels by fraction, for the absolute and the squared gradient.

    ``content``: float32 [1, 3, h, w] inputs of the stage. Sixteen output pixels are averaged: every sub-pixel phase of
    a x4 stage once, spread over the window's phases and over the pictures. What a network draws from beyond the crop is
    not seen, so the radii are lower bounds; fractions that the crop does not hold are absent.
    """
    for side in (SIDE, LARGE_SIDE):
        histograms = _histograms(network, [_centre(c, side, align) for c in content], scale, align)
        absolute, square = (
            {f: r for f in ERF_FRACTIONS if (r := _radius(h, float(f))) is not None} for h in histograms
        )
        if "0.98" in absolute or all(min(c.shape[2:]) <= side for c in content):
            break
    return absolute, square


def _centre(picture: Tensor, side: int, align: int) -> Tensor:
    height, width = ((min(side, n) // align) * align for n in picture.shape[2:])
    y, x = (picture.shape[2] - height) // 2, (picture.shape[3] - width) // 2
    return picture[:, :, y : y + height, x : x + width]


def _histograms(network: nn.Module, crops: Sequence[Tensor], scale: int, align: int) -> tuple[Tensor, Tensor]:
    """Magnitude by distance, absolute and squared; the last bin collects what lies beyond the nearest border."""
    limit = min(min(c.shape[2:]) // 2 - align // 2 - 1 for c in crops)
    histograms = torch.zeros(2, limit + 2, dtype=torch.float64)
    for number, crop in enumerate(crops):
        crop = crop.clone().requires_grad_(True)
        output = network(crop).sum(1)[0]  # [H * scale, W * scale]
        samples = range(number, _PHASES * _PHASES, len(crops))
        for k in samples:
            q = _output_pixel(k, crop.shape[2:], scale, align)
            (gradient,) = torch.autograd.grad(output[q], crop, retain_graph=k != samples[-1])
            histograms += _bin(gradient[0], q, scale, limit)
    return histograms[0], histograms[1]


def _output_pixel(k: int, size: Sequence[int], scale: int, align: int) -> tuple[int, int]:
    """Sample k: sub-pixel phase (k // 4, k % 4), and a phase that runs through the window's rows and columns."""
    phase = (k // _PHASES * scale // _PHASES, k % _PHASES * scale // _PHASES)
    # 5 and 3 are prime to the window of 8: sixteen samples visit each row and each column of the window twice.
    window = ((5 * k) % align - align // 2, (3 * k + k // 8) % align - align // 2)
    y, x = ((n // 2 + w) * scale + p for n, w, p in zip(size, window, phase, strict=True))
    return y, x


def _bin(gradient: Tensor, q: tuple[int, int], scale: int, limit: int) -> Tensor:
    cy, cx = ((v + 0.5) / scale - 0.5 for v in q)
    y = torch.arange(gradient.shape[1], dtype=torch.float64)[:, None] - cy
    x = torch.arange(gradient.shape[2], dtype=torch.float64) - cx
    distance = torch.sqrt(y * y + x * x).ceil().long().clamp(max=limit + 1).flatten()
    gradient = gradient.double()
    magnitudes = torch.stack([gradient.abs().sum(0), gradient.square().sum(0)]).flatten(1)
    magnitudes /= magnitudes.sum(1, keepdim=True)  # every sample counts the same
    return torch.zeros(2, limit + 2, dtype=torch.float64).index_add_(1, distance, magnitudes)


def _radius(histogram: Tensor, fraction: float) -> int | None:
    """Smallest radius that holds the fraction, or None when it lies beyond the crop."""
    share = histogram.cumsum(0) / histogram.sum()
    radius = int((share < fraction - 1e-12).sum())
    return radius if radius < len(histogram) - 1 else None
