"""A photograph at the size of a step's output, cut at random: never whole in memory when it is large.

Knows libvips and a raw file that the system maps into memory; does not know networks or losses.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pyvips
import torch
from torch import Tensor

from engine.errors import InputError
from engine.training.data import Photo, Size, first_line

IN_MEMORY = 256 << 20  # bytes up to which a picture is held in memory; a larger one is mapped from a file


@dataclass(frozen=True, slots=True)
class Picture:
    """8-bit sRGB pixels. `size` is (height, width); `pixels` gives [H, W, 3], held in memory or mapped anew from a file.

    A mapping that stayed would in time bring the whole file into the process' memory; one of a single crop is let go.
    """

    size: Size
    pixels: Callable[[], np.ndarray]

    @classmethod
    def of(cls, array: np.ndarray) -> Self:
        """A picture in memory, uint8 [H, W, 3]."""
        return cls((array.shape[0], array.shape[1]), lambda: array)

    def crop(self, y: int, x: int, height: int, width: int) -> Tensor:
        """uint8 [3, height, width]; the box lies inside the picture."""
        return torch.from_numpy(self.pixels()[y : y + height, x : x + width].copy()).permute(2, 0, 1)


def open_picture(photo: Photo, size: Size, scratch: Path, in_memory: int = IN_MEMORY) -> Picture:
    """The photograph resampled (antialiased) to (height, width).

    A picture of more than `in_memory` bytes is written to the file `scratch`, row by row, and mapped.
    """
    height, width = size
    try:
        image = pyvips.Image.thumbnail(str(photo.path), width, height=height, size="force", fail_on="error")
        image = image.colourspace("srgb")
        image = image.extract_band(0, n=3) if image.bands > 3 else image
        image = image.cast("uchar")
        if height * width * 3 <= in_memory:
            return Picture.of(np.asarray(image.numpy()))
        image.rawsave(str(scratch))
    except pyvips.Error as error:
        raise InputError(f"{photo.path}: cannot be brought to {width}x{height}: {first_line(error)}") from None
    return Picture(size, lambda: np.memmap(scratch, np.uint8, "r", shape=(height, width, 3)))


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 -> float32 in [0, 1]."""
    return pixels.float() / 255
