"""The base image: step 1's output, or a picture, from which the super-resolution steps start."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from torch import Tensor

from engine.archs.hpvaegan import BaseGenerator
from engine.errors import InputError
from engine.geometry import Box
from engine.io.first_look import MAX_SIDE, Pixels
from engine.io.original import OriginalPicture
from engine.io.photo import Source
from engine.kernels.noise import noise_torch
from engine.plan.plan import Plan

_LOOKED_AT = 1 << 14
"""Longest side of a picture that gives a first look: shrinking one takes up to 2.4 KB for each column of the file."""


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


def base_pixels(base: Source) -> Pixels:
    """The base image, uint8 [h, w, 3]."""
    pixels: Pixels = (base.read(Box(0, 0, *base.size)).permute(1, 2, 0) * 255).round().byte().numpy()
    return pixels


def first_look(plan: Plan, base: Source, picture: OriginalPicture | None) -> Pixels | None:
    """The base image of what is written, uint8 [h, w, 3], that of a picture small; None if it is costly or damaged."""
    if picture is None:
        return written_part(plan, base_pixels(base))
    height, width = base.size
    shrink = -(-max(height, width) // MAX_SIDE)
    try:
        if not picture.is_light or max(height, width) > _LOOKED_AT:
            return None
        pixels = picture.thumbnail((-(-height // shrink), -(-width // shrink)))
    except InputError:  # which the render meets where it reads
        return None
    return written_part(plan, pixels, shrink)


def written_part(plan: Plan, pixels: Pixels, shrink: int = 1) -> Pixels:
    """The part of a base image that is written: without its margin, and of a region alone.

    Args:
        plan: plan of the render.
        pixels: the whole base image, [h, w, 3].
        shrink: pixels of the base image for each of these.
    """
    scale = shrink * prod(stage.scale for stage in plan.stages)
    box = replace(plan.reduction, margin=(0, 0)).read(plan.roi).cover(scale)
    # The base image has no margin along axes that wrap.
    box = box.shift(*(0 if period else plan.margin for period in plan.stages[0].period))
    return pixels[box.clip(Box(0, 0, *pixels.shape[:2])).slices]
