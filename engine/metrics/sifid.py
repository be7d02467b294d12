"""SIFID: Frechet distance between the Inception features of two single images (Shaham et al., "SinGAN", ICCV 2019).

Every position of a feature map is one sample. Images keep their size, and x in [0, 1] becomes 2x - 1. The layers are the 5th
and the 13th of Inception-v3, as OUR-GAN reports them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.metrics.frechet import Gaussian, Moments
from engine.metrics.inception import InceptionPrefix
from engine.metrics.rows import StridedNetwork, StridedRowStream

LAYERS = {"5": 192, "13": 768}
"""Layer -> channels."""


class Inception:
    """Inception-v3's prefix on a device, in the dtype of its weights."""

    def __init__(self, network: InceptionPrefix, device: torch.device | None = None) -> None:
        self._network = network.eval().requires_grad_(False).to(device or torch.device("cpu"))
        self._rows = StridedNetwork(self._network)

    def start(self, size: tuple[int, int]) -> FeatureMoments:
        """Start an image of (height, width). Raises InputError when it is too small."""
        weight = self._network.Conv2d_1a_3x3.conv.weight
        return FeatureMoments(StridedRowStream(self._rows, size), weight.device, weight.dtype)


class FeatureMoments:
    """Consumes the rows of an image and accumulates the moments of its features."""

    def __init__(self, stream: StridedRowStream, device: torch.device, dtype: torch.dtype) -> None:
        self._stream, self._device, self._dtype = stream, device, dtype
        self._moments = tuple(Moments(channels) for channels in LAYERS.values())

    def add(self, rows: Tensor) -> None:
        """Add the next rows [3, r, W] in [0, 1]."""
        x = 2 * rows[None].to(self._device, self._dtype) - 1
        for moments, features in zip(self._moments, self._stream.push(x), strict=True):
            if features is not None:
                moments.add(features)

    def gaussians(self) -> tuple[Gaussian, ...]:
        """One Gaussian for each of ``LAYERS``."""
        return tuple(moments.gaussian() for moments in self._moments)
