"""A photograph as training compares with it: a pyramid of small images, or one large picture to crop from.

The module knows tensors and a raw file that the system maps into memory; ``engine.io.photo`` decodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from engine.io.files import replacing
from engine.io.photo import Photo, resampled_photo, write_resampled_photo

Size = tuple[int, int]
"""(height, width) in pixels."""

IN_MEMORY = 256 << 20
"""Size in bytes up to which a picture is held in memory; a larger one is mapped from a file."""


def pyramid(photo: Photo, sizes: Sequence[Size]) -> tuple[Tensor, ...]:
    """The photograph at each (height, width), antialiased, as float32 [1, 3, H, W] in [-1, 1].

    Every scale is computed from the file itself: a chain of resizes would soften the small scales more than the large.
    """
    return tuple(_to_tensor(resampled_photo(photo, size)) for size in sizes)


@dataclass(frozen=True, slots=True)
class Picture:
    """8-bit sRGB pixels to crop from."""

    size: Size
    """(height, width)."""
    pixels: Callable[[], np.ndarray]
    """Returns uint8 [H, W, 3], held in memory or newly mapped from a file.

    A mapping is dropped after each crop: one that stayed would bring the whole file into the process' memory.
    """

    @classmethod
    def of(cls, array: np.ndarray) -> Self:
        """A picture in memory, given as uint8 [H, W, 3]."""
        return cls((array.shape[0], array.shape[1]), lambda: array)

    def crop(self, y: int, x: int, height: int, width: int) -> Tensor:
        """uint8 [3, height, width]; the box lies inside the picture."""
        return torch.from_numpy(self.pixels()[y : y + height, x : x + width].copy()).permute(2, 0, 1)


def open_picture(photo: Photo, size: Size, scratch: Path, in_memory: int = IN_MEMORY) -> Picture:
    """The photograph resampled (antialiased) to (height, width).

    Args:
        photo: the photograph.
        size: (height, width) of the picture.
        scratch: raw file to write, row by row, and to map when the picture is large.
        in_memory: limit in bytes of a picture that is held in memory.

    Raises:
        InputError: the photograph is damaged.
    """
    height, width = size
    if height * width * 3 <= in_memory:
        return Picture.of(resampled_photo(photo, size))
    write_resampled_photo(photo, size, scratch)
    return Picture(size, lambda: np.memmap(scratch, np.uint8, "r", shape=(height, width, 3)))


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 -> float32 in [0, 1]."""
    return pixels.float() / 255


def write_row(pictures: Sequence[Tensor], path: Path) -> None:
    """Write pictures [3, H, W] in [0, 1] of one size, side by side, as a PNG."""
    row = torch.cat(list(pictures), dim=2).mul(255).round().clamp(0, 255).to(torch.uint8)
    pixels = row.permute(1, 2, 0).contiguous().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        Image.fromarray(pixels).save(part, "PNG")


def _to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 [H, W, 3] -> float32 [1, 3, H, W] in [-1, 1]."""
    picture = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
    return (picture.float() / 255 - 0.5) / 0.5
