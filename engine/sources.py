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
        try:
            image = pyvips.Image.new_from_file(str(path), fail_on="error").autorot()
            if image.hasalpha():
                image = image.flatten(background=255)
            image = self._to_srgb(image)
            if size is not None and size != (image.height, image.width):
                image = image.resize(size[1] / image.width, vscale=size[0] / image.height)
            image.crop(0, 0, 1, 1).numpy()
        except pyvips.Error as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{path}: cannot be read as a picture ({reason})") from error
        self._image = image
        self._white = 65535.0 if image.format == "ushort" else 255.0
        self.size = (image.height, image.width)
        with path.open("rb") as file:
            self.digest = hashlib.file_digest(file, "sha256").hexdigest()

    @staticmethod
    def _to_srgb(image: Any) -> Any:  # noqa: ANN401
        deep = image.format == "ushort"
        if image.get_typeof("icc-profile-data"):
            return image.icc_transform("srgb", embedded=True, depth=16 if deep else 8)
        return image.colourspace("rgb16" if deep else "srgb")

    def read(self, box: Box) -> Tensor:
        pixels: np.ndarray = self._image.crop(box.x0, box.y0, box.width, box.height).numpy()  # [h, w, 3]
        return torch.from_numpy(pixels.astype(np.float32).transpose(2, 0, 1) / np.float32(self._white))
