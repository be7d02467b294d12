"""Where the chain of stages begins: an image that can be read box by box as float32 [3, h, w] in [0, 1]."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from engine.errors import InputError
from engine.geometry import Box


class Source(Protocol):
    """``size`` is (height, width); ``read`` wants a box inside it."""

    size: tuple[int, int]

    def read(self, box: Box) -> Tensor: ...


class TensorSource:
    """An image held in memory: step 1's output, which is small whatever the canvas."""

    def __init__(self, image: Tensor) -> None:
        self._image = image  # [3, H, W]
        self.size = (image.shape[1], image.shape[2])

    def read(self, box: Box) -> Tensor:
        rows, columns = box.slices
        return self._image[:, rows, columns]


class PictureSource:
    """A picture on disk, converted to sRGB and read region by region.

    libvips decodes a large picture to a temporary file instead of memory, so a picture that exceeds memory can be read
    too. ``digest`` is the sha256 of the file. With ``size`` the picture is resampled to it.
    """

    def __init__(self, path: Path, size: tuple[int, int] | None = None) -> None:
        # libvips holds pictures below this size in memory and decodes larger ones to a temporary file.
        os.environ.setdefault("VIPS_DISC_THRESHOLD", "32m")
        import pyvips

        if not path.is_file():
            raise InputError(f"{path}: no such picture")
        self._path = path
        try:
            image = self._open(path).autorot()
            if image.hasalpha():
                image = image.flatten(background=65535 if image.format == "ushort" else 255)
            image = self._to_srgb(image)
            if size is not None and size != (image.height, image.width):
                image = _resampled(image, *size)
            image.crop(0, 0, 1, 1).numpy()
        except pyvips.Error as error:
            raise self._unreadable(error) from error
        self._image = image
        self._white = 65535.0 if image.format == "ushort" else 255.0
        self.size = (image.height, image.width)
        with path.open("rb") as file:
            self.digest = hashlib.file_digest(file, "sha256").hexdigest()

    def resampled(self, size: tuple[int, int]) -> PictureSource:
        """The same picture at another size, (height, width)."""
        return PictureSource(self._path, size)

    @staticmethod
    def _open(path: Path) -> Any:  # noqa: ANN401
        import pyvips

        image = pyvips.Image.new_from_file(str(path), fail_on="error")
        # Of a TIFF even missing strips are no more than a warning to libvips, which makes noise of them.
        is_tiff = image.get("vips-loader").startswith("tiff")
        return pyvips.Image.new_from_file(str(path), fail_on="warning") if is_tiff else image

    def _unreadable(self, error: Exception) -> InputError:
        return InputError(f"{self._path}: cannot be read as a picture ({' '.join(str(error).split())})")

    @staticmethod
    def _to_srgb(image: Any) -> Any:  # noqa: ANN401
        deep = image.format == "ushort"
        if image.get_typeof("icc-profile-data"):
            return image.icc_transform("srgb", embedded=True, depth=16 if deep else 8)
        return image.colourspace("rgb16" if deep else "srgb")

    def read(self, box: Box) -> Tensor:
        import pyvips

        try:
            pixels: np.ndarray = self._image.crop(box.x0, box.y0, box.width, box.height).numpy()  # [h, w, 3]
        except pyvips.Error as error:
            raise self._unreadable(error) from error
        return torch.from_numpy(pixels.astype(np.float32).transpose(2, 0, 1) / np.float32(self._white))


def _resampled(image: Any, height: int, width: int) -> Any:  # noqa: ANN401
    """The image at another size, corner on corner.

    libvips' resize shrinks so, but where it enlarges one side it moves both by half a pixel, which also blurs the other.
    """
    image = image.resize(min(1.0, width / image.width), vscale=min(1.0, height / image.height))
    x, y = width / image.width, height / image.height
    if x == y == 1:
        return image
    offset = {"odx": (x - 1) / 2, "ody": (y - 1) / 2, "oarea": [0, 0, width, height]}
    import pyvips

    return image.affine([x, 0, 0, y], interpolate=pyvips.Interpolate.new("bicubic"), extend="copy", **offset)
