"""Step 1's image of a model."""

from __future__ import annotations

from torch import Tensor

from engine.archs.hpvaegan import BaseGenerator
from engine.geometry import Box
from engine.kernels.noise import noise_torch


def base_image(structure: BaseGenerator, seed: int, size: tuple[int, int] | None = None) -> Tensor:
    """Step 1's image for a seed, float32 [3, h, w] in [0, 1]; its noise is addressed by position as everywhere."""

    def noise(scale: int, shape: tuple[int, int, int]) -> Tensor:
        channels, height, width = shape
        return noise_torch(seed, scale, Box(0, 0, height, width), channels)

    return structure.sample(noise, size)
