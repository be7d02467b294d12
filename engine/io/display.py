"""Pixels of any store as a screen shows them: 8-bit sRGB without transparency."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from engine.io.icc import load_profile
from engine.pixels import PixelFormat


class Display:
    """Rounds 16 bits to 8, repeats grey, converts colours to sRGB, and lays transparent pixels on white.

    Args:
        pixels: format of the store.
        profile: ICC profile of its colours; None for sRGB, and for grey without a profile. A damaged one is ignored.
    """

    def __init__(self, pixels: PixelFormat, profile: bytes | None) -> None:
        self._pixels = pixels
        self._transform: ImageCms.ImageCmsTransform | None = None
        srgb = load_profile("srgb")
        if profile is not None and profile != srgb:
            try:
                self._transform = ImageCms.buildTransform(
                    ImageCms.ImageCmsProfile(io.BytesIO(profile)),
                    ImageCms.ImageCmsProfile(io.BytesIO(srgb)),
                    "L" if pixels.colours == 1 else "RGB",
                    "RGB",
                    ImageCms.Intent.RELATIVE_COLORIMETRIC,
                )
            except (ImageCms.PyCMSError, OSError):
                self._transform = None

    def __call__(self, pixels: NDArray[Any]) -> NDArray[np.uint8]:
        """uint8 [H, W, 3] of pixels [H, W, C] of the store."""
        if self._pixels.depth == 16:
            pixels = ((pixels.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
        colours = pixels[..., : self._pixels.colours]
        if self._transform is not None:
            image = Image.fromarray(np.ascontiguousarray(colours[..., 0] if colours.shape[2] == 1 else colours))
            colours = np.asarray(ImageCms.applyTransform(image, self._transform))
        elif self._pixels.colours == 1:
            colours = np.repeat(colours, 3, 2)
        if self._pixels.has_alpha:
            alpha = pixels[..., -1:].astype(np.uint16)
            colours = ((colours * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
        return np.ascontiguousarray(colours)
