"""The base image: step 1's output, or a picture, from which the super-resolution steps start."""

from __future__ import annotations

from torch import Tensor

from engine.archs.hpvaegan import BaseGenerator
from engine.geometry import Box
from engine.kernels.noise import noise_torch


def base_image(
    generator: BaseGenerator,
    seed: int,
    size: tuple[int, int] | None = None,
    wraps: tuple[bool, bool] = (False, False),
) -> Tensor:
    """Step 1's image for a seed, float32 [3, h, w] in [0, 1].

    Args:
        generator: network of step 1.
        seed: seed of the noise, which is addressed by position.
        size: (height, width); by default the size that the network was trained at.
        wraps: whether the image repeats along (rows, columns).
    """

    def noise(scale: int, shape: tuple[int, int, int]) -> Tensor:
        channels, height, width = shape
        return noise_torch(seed, scale, Box(0, 0, height, width), channels)

    return generator.wrapped(wraps).sample(noise, size)
