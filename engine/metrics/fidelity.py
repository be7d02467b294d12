"""PSNR and SSIM of an image against a reference of the same size, row by row, in float64.

Both are computed for RGB in levels of 255, and for Y as super-resolution papers define it: BT.601 luma from 16 to 235
(MATLAB's ``rgb2ycbcr``), peak 255. SSIM follows Wang et al. 2004: an 11 x 11 Gaussian of 1.5 pixels where it fits inside,
K1 = 0.01, K2 = 0.03, and the mean over channels for RGB. No border is cropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.errors import InputError
from engine.io.photo import Source
from engine.metrics.images import bands
from engine.metrics.psnr import psnr

_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
_LUMA, _LUMA_OFFSET = (65.481, 128.553, 24.966), 16.0
_CHANNELS = 4  # R, G, B, Y


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Errors of an image against its reference."""

    mse_rgb: float
    """Mean squared error over the three channels, in squared levels."""

    mse_y: float
    """Mean squared error of Y, in squared levels."""

    ssim_rgb: float
    """Mean SSIM of the three channels."""

    ssim_y: float

    @property
    def psnr_rgb(self) -> float:
        """PSNR in dB; infinite for equal images."""
        return _psnr(self.mse_rgb)

    @property
    def psnr_y(self) -> float:
        """PSNR of Y in dB; infinite for equal images."""
        return _psnr(self.mse_y)

    def to_json(self) -> dict[str, Any]:
        """All values; None for an infinite PSNR, which JSON cannot express."""
        values = {"psnr_rgb": self.psnr_rgb, "psnr_y": self.psnr_y}
        return {**{k: v if math.isfinite(v) else None for k, v in values.items()}, **asdict(self)}


def compare(
    picture: Source, reference: Source, on_rows: Callable[[int], None] = lambda rows: None, name: str = "picture"
) -> Fidelity:
    """Compare an image with its reference.

    Args:
        picture: the image.
        reference: the image that it should equal.
        on_rows: called with the number of rows that were compared.
        name: name of the image in messages.

    Raises:
        InputError: the sizes differ or are smaller than SSIM's window.
    """
    height, width = picture.size
    if picture.size != reference.size:
        expected = f"{reference.size[1]}x{reference.size[0]}"
        raise InputError(f"{name}: {width}x{height}, but the reference is {expected}; PSNR needs equal sizes")
    if min(height, width) < _WINDOW:
        raise InputError(
            f"{name}: {width}x{height} is smaller than SSIM's window of {_WINDOW} pixels; use a larger image"
        )
    squares = torch.zeros(_CHANNELS, dtype=torch.float64)
    similarity = torch.zeros(_CHANNELS, dtype=torch.float64)
    pending = torch.empty(2, _CHANNELS, 0, width, dtype=torch.float64)  # rows of both that later windows need
    for rows, reference_rows in zip(bands(picture), bands(reference), strict=True):
        pair = torch.stack([_with_luma(rows), _with_luma(reference_rows)])
        squares += (pair[0] - pair[1]).square().sum((1, 2))
        pending = torch.cat([pending, pair], 2)
        if pending.shape[2] >= _WINDOW:
            similarity += _ssim(pending[0], pending[1]).sum((1, 2))
            pending = pending[:, :, -(_WINDOW - 1) :]
        on_rows(rows.shape[1])
    mse = squares / (height * width)
    ssim = similarity / ((height - _WINDOW + 1) * (width - _WINDOW + 1))
    return Fidelity(float(mse[:3].mean()), float(mse[3]), float(ssim[:3].mean()), float(ssim[3]))


def _psnr(mse: float) -> float:
    return float(psnr(torch.tensor(mse, dtype=torch.float64), peak=255))


def _with_luma(rows: Tensor) -> Tensor:
    """Convert [3, r, W] in [0, 1] to RGB and Y in levels, [4, r, W]."""
    rows = rows.double()
    luma = (rows * torch.tensor(_LUMA, dtype=torch.float64).view(3, 1, 1)).sum(0) + _LUMA_OFFSET
    return torch.cat([rows * 255, luma[None]])


def _ssim(a: Tensor, b: Tensor) -> Tensor:
    """SSIM map [C, r - 10, W - 10] of [C, r, W]."""
    maps = _blurred(torch.stack([a, b, a * a, b * b, a * b]))
    mean_a, mean_b, square_a, square_b, product = maps
    variance_a, variance_b = square_a - mean_a**2, square_b - mean_b**2
    covariance = product - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + _C1) / (mean_a**2 + mean_b**2 + _C1)
    result: Tensor = luminance * (2 * covariance + _C2) / (variance_a + variance_b + _C2)
    return result


def _blurred(maps: Tensor) -> Tensor:
    """Blur [N, C, r, W] by the Gaussian window to [N, C, r - 10, W - 10]."""
    at = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    kernel = torch.exp(-(at**2) / (2 * _SIGMA**2))
    kernel = kernel / kernel.sum()
    n, c, height, width = maps.shape
    x = F.conv2d(maps.reshape(n * c, 1, height, width), kernel.view(1, 1, -1, 1))
    x = F.conv2d(x, kernel.view(1, 1, 1, -1))
    return x.view(n, c, *x.shape[2:])
