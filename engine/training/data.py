"""A photograph as the pyramid that training compares with.

Knows how to read any picture file in bounded memory (libvips shrinks while it loads) and bring it to 8-bit sRGB.
Does not know networks or losses.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyvips
import torch
from torch import Tensor

from engine.errors import InputError

Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Photo:
    """A photograph that can be read, with its size as one sees it (after EXIF rotation)."""

    path: Path
    width: int
    height: int
    digest: str


def open_photo(path: Path, least_width: int = 256) -> Photo:
    """Look at the header and the bytes; refuse what cannot be trained on."""
    if not path.is_file():
        raise InputError(f"{path}: no such photograph")
    try:
        header = pyvips.Image.new_from_file(str(path))
        width, height, turned = header.width, header.height, _turned(header)
    except pyvips.Error as error:
        raise InputError(f"{path}: not a picture that libvips can read: {first_line(error)}") from None
    if turned:
        width, height = height, width
    if width < least_width:
        raise InputError(f"{path}: {width} px wide, at least {least_width} are needed: take a larger photograph")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Photo(path, width, height, digest)


def pyramid(photo: Photo, sizes: Sequence[Size]) -> tuple[Tensor, ...]:
    """The photograph at each (height, width), antialiased, as [1, 3, H, W] in [-1, 1].

    Every scale is made from the file itself: a chain of resizes would soften the small scales more than the large.
    """
    return tuple(_to_tensor(_thumbnail(photo, size)) for size in sizes)


def write_row(pictures: Sequence[Tensor], path: Path) -> None:
    """Pictures [3, H, W] in [0, 1] of one size, side by side, as a PNG."""
    row = torch.cat(list(pictures), dim=2).mul(255).round().clamp(0, 255).to(torch.uint8)
    pixels = row.permute(1, 2, 0).contiguous().numpy()
    height, width, bands = pixels.shape
    path.parent.mkdir(parents=True, exist_ok=True)
    pyvips.Image.new_from_memory(pixels.tobytes(), width, height, bands, "uchar").pngsave(str(path))


def _thumbnail(photo: Photo, size: Size) -> np.ndarray[Any, np.dtype[np.uint8]]:
    height, width = size
    try:
        image = pyvips.Image.thumbnail(str(photo.path), width, height=height, size="force", fail_on="error")
        image = image.colourspace("srgb")
        image = image.extract_band(0, n=3) if image.bands > 3 else image
        return np.asarray(image.cast("uchar").numpy())
    except pyvips.Error as error:
        raise InputError(f"{photo.path}: cannot be decoded: {first_line(error)}") from None


def _to_tensor(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
    picture = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
    return (picture.float() / 255 - 0.5) / 0.5


def _turned(header: pyvips.Image) -> bool:
    """Whether EXIF orientation swaps the sides."""
    return "orientation" in header.get_fields() and header.get("orientation") in (5, 6, 7, 8)


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[1] if len(lines) > 1 else (lines or ["unknown cause"])[0]
