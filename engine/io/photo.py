"""Photographs from disk, decoded in one way for rendering, scoring and training.

A decoded photograph is upright (EXIF orientation applied), in sRGB (embedded ICC profile converted) and opaque (alpha
flattened on white). ``PictureSource`` reads it region by region at up to 16 bits, ``resampled_photo`` shrinks it while it
loads. The module does not know networks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from engine.errors import InputError
from engine.geometry import Box
from engine.io.files import sha256

if TYPE_CHECKING:
    import pyvips

DISC_THRESHOLD = "32m"
"""Decoded size above which libvips keeps a picture in a temporary file instead of in memory."""


class Source(Protocol):
    """An image that is read box by box, as float32 [3, h, w] in [0, 1]."""

    size: tuple[int, int]
    """(height, width)."""

    def read(self, box: Box) -> Tensor:
        """Pixels of ``box``, which lies inside the image."""
        ...


class TensorSource:
    """An image in memory, such as step 1's output, which is small whatever the canvas."""

    def __init__(self, image: Tensor) -> None:
        self._image = image  # [3, H, W]
        self.size = (image.shape[1], image.shape[2])

    def read(self, box: Box) -> Tensor:
        rows, columns = box.slices
        return self._image[:, rows, columns]


class PictureSource:
    """A picture on disk that is read region by region, so that it may exceed the memory.

    Args:
        path: any file that libvips reads.
        size: (height, width) to resample to; None keeps the picture's own size.

    Attributes:
        size: (height, width).
        digest: sha256 of the file.

    Raises:
        InputError: no such file, or one that cannot be decoded. ``read`` raises it too, where damage shows only there.
    """

    def __init__(self, path: Path, size: tuple[int, int] | None = None) -> None:
        _check_exists(path, "picture")
        self.path = path
        with _decoding(path):
            image = _opaque_srgb(_open_upright(path))
            if size is not None and size != (image.height, image.width):
                image = _resampled(image, *size)
            image.crop(0, 0, 1, 1).numpy()  # decodes far enough to refuse most damaged files here
        self._image = image
        self._white = np.float32(_white(image))
        self.size = (image.height, image.width)
        self.digest = sha256(path)

    def resampled(self, size: tuple[int, int]) -> PictureSource:
        """The same picture at another size, (height, width)."""
        return PictureSource(self.path, size)

    def read(self, box: Box) -> Tensor:
        with _decoding(self.path):
            pixels = self._image.crop(box.x0, box.y0, box.width, box.height).numpy()  # [h, w, 3]
        return torch.from_numpy(pixels.astype(np.float32).transpose(2, 0, 1) / self._white)


@dataclass(frozen=True, slots=True)
class Photo:
    """A photograph whose header was read."""

    path: Path
    width: int
    """Width in pixels of the upright photograph."""
    height: int
    """Height in pixels of the upright photograph."""
    digest: str
    """sha256 of the file."""


def open_photo(path: Path, least_width: int = 256) -> Photo:
    """Read the header and the digest of a photograph.

    Raises:
        InputError: no such file, one that is no picture, or one of fewer than ``least_width`` pixels in width.
    """
    _check_exists(path, "photograph")
    with _decoding(path):
        image = _open_upright(path)
    if image.width < least_width:
        raise InputError(f"{path}: {image.width} px wide, at least {least_width} are needed; take a larger photograph")
    return Photo(path, image.width, image.height, sha256(path))


def resampled_photo(photo: Photo, size: tuple[int, int]) -> np.ndarray:
    """The photograph resampled (antialiased) to (height, width), as uint8 [H, W, 3].

    Memory is that of the result: libvips shrinks while it loads. Raises InputError when the file is damaged.
    """
    with _decoding(photo.path):
        return np.asarray(_thumbnail(photo.path, size).numpy())


def write_resampled_photo(photo: Photo, size: tuple[int, int], path: Path) -> None:
    """Write ``resampled_photo``'s pixels to a raw file, row by row: the memory does not grow with the height."""
    with _decoding(photo.path):
        _thumbnail(photo.path, size).rawsave(str(path))


@cache
def _vips() -> ModuleType:
    """libvips, imported at first use: most renders decode nothing. It reads its threshold from the environment, once."""
    os.environ.setdefault("VIPS_DISC_THRESHOLD", DISC_THRESHOLD)
    import pyvips

    pyvips.cache_set_max(
        0
    )  # its cache of operations goes by file names: a picture that changed would be read as it was
    return pyvips  # type: ignore[no-any-return]


def _check_exists(path: Path, kind: str) -> None:
    if not path.is_file():
        raise InputError(f"{path}: no such {kind}")


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    """Turn an error of libvips into an InputError of one line that names the file."""
    try:
        yield
    except _vips().Error as error:
        raise InputError(f"{path}: cannot be read as a picture ({' '.join(str(error).split())})") from error


def _open_upright(path: Path) -> pyvips.Image:
    """The picture with its EXIF orientation applied; its pixels are decoded later."""
    return _vips().Image.new_from_file(str(path), fail_on=_strictness(path)).autorot()


def _thumbnail(path: Path, size: tuple[int, int]) -> pyvips.Image:
    """The upright photograph at (height, width), in opaque 8-bit sRGB, shrunk while it is loaded."""
    height, width = size
    options = {"size": "force", "output_profile": "srgb", "fail_on": _strictness(path)}
    return _opaque_srgb(_vips().Image.thumbnail(str(path), width, height=height, **options)).colourspace("srgb")


def _strictness(path: Path) -> str:
    """The lowest severity at which decoding fails.

    libvips only warns about missing strips of a TIFF and fills them with noise. For other formats a warning is harmless.
    """
    loader = _vips().Image.new_from_file(str(path)).get("vips-loader")
    return "warning" if loader.startswith("tiff") else "error"


def _opaque_srgb(image: pyvips.Image) -> pyvips.Image:
    """The image in sRGB of 8 or 16 bits, flattened on white."""
    depth = 16 if image.format == "ushort" else 8
    if image.get_typeof("icc-profile-data"):
        image = image.icc_transform("srgb", embedded=True, depth=depth)
    else:
        image = image.colourspace("rgb16" if depth == 16 else "srgb")
    return image.flatten(background=_white(image)) if image.hasalpha() else image


def _white(image: pyvips.Image) -> int:
    return 65535 if image.format == "ushort" else 255


def _resampled(image: pyvips.Image, height: int, width: int) -> pyvips.Image:
    """The image at another size, corner on corner.

    libvips' ``resize`` shrinks that way. Where it enlarges one side it moves both by half a pixel, which also blurs the
    other side, so enlarging is done by ``affine``.
    """
    image = image.resize(min(1.0, width / image.width), vscale=min(1.0, height / image.height))
    x, y = width / image.width, height / image.height
    if x == y == 1:
        return image
    offset = {"odx": (x - 1) / 2, "ody": (y - 1) / 2, "oarea": [0, 0, width, height]}
    return image.affine([x, 0, 0, y], interpolate=_vips().Interpolate.new("bicubic"), extend="copy", **offset)
