"""Photographs from disk, decoded in one way for rendering, scoring and training.

A decoded photograph is upright (EXIF orientation applied), in sRGB (embedded ICC profile converted) and opaque (alpha
flattened on white). ``PictureSource`` reads it region by region at up to 16 bits, ``StoredPicture`` once from top to bottom,
``resampled_photo`` shrinks it while it loads. ``notes`` tell the user what the conversion changes. The module does not know
networks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from engine.errors import InputError
from engine.geometry import Box
from engine.io.files import sha256
from engine.io.picture_file import (
    DISC_THRESHOLD,
    Header,
    check_exists,
    decoding,
    open_header,
    open_rows,
    open_thumbnail,
    open_top,
    open_upright,
    vips,
)
from engine.io.srgb import check_samples, notes, opaque_srgb, white

if TYPE_CHECKING:
    import pyvips


SUFFIXES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Files of a folder that count as pictures."""

_FETCHED = 1 << 20
"""Bytes of whole rows that are fetched at once, for crops of some columns of them; one row where rows are longer."""


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
        path: a picture of 8 or 16 bits; docs/input.md lists the formats.
        size: (height, width) to resample to; None keeps the picture's own size.

    Opening it reads the header, and a picture that is decoded in little memory as far as its first pixel. Others are decoded
    when they are first read: in ``memory`` bytes, and through a temporary file of ``temporary`` bytes.

    Attributes:
        size: (height, width).
        digest: sha256 of the file.
        notes: one sentence about each change of the pixels on the way to 8-bit sRGB.
        memory: upper bound of the bytes that decoding holds; 0 if it goes region by region.
        temporary: bytes of the temporary file that decoding writes; 0 without one.
        tiles: tiles of the file, of which a read decodes whole rows and columns; None if it has none.

    Raises:
        InputError: no such file, one that cannot be decoded, or samples of unknown meaning. ``read`` raises it too, where
            damage shows only there.
    """

    def __init__(self, path: Path, size: tuple[int, int] | None = None) -> None:
        check_exists(path, "picture")
        self.path = path
        with decoding(path):
            header = open_header(path)
            check_samples(path, header.image)
            self._own_size = (header.image.height, header.image.width)
            self._prepare(header)
        self.memory, self.temporary, self.tiles = header.memory, header.temporary, header.tiles
        self.size = size or self._own_size
        self.digest = sha256(path)
        if self.is_light:
            self.read(Box(0, 0, 1, 1))  # decodes far enough to refuse most damaged files here

    @property
    def is_light(self) -> bool:
        """Whether decoding takes little memory and no temporary file."""
        return self.memory <= 4 * DISC_THRESHOLD and not self.temporary

    @cached_property
    def _image(self) -> pyvips.Image:
        image = self._converted(open_upright(self.path))
        return image if self.size == self._own_size else self._at_size(image)

    def _prepare(self, header: Header) -> None:
        """Note what the header says of the samples."""
        self.notes = _notes(header)
        self._white = np.float32(white(self._converted(header.image)))

    def _at_size(self, image: pyvips.Image) -> pyvips.Image:
        """The converted image at ``size``."""
        return resampled(image, *self.size)

    def _converted(self, image: pyvips.Image) -> pyvips.Image:
        """The samples that are read."""
        return opaque_srgb(image)

    def sample(self, side: int) -> Tensor:
        """Up to ``side`` x ``side`` pixels, [3, h, w]: the middle, or the top where the middle takes a temporary file."""
        if not self.temporary:
            (height, width), (y, x) = self._own_size, (max(0, n - side) // 2 for n in self._own_size)
            return self.read(Box(y, x, min(y + side, height), min(x + side, width)))
        with decoding(self.path):
            return self._tensor(self._converted(open_top(self.path, side)))

    def resampled(self, size: tuple[int, int]) -> PictureSource:
        """The same picture at another size, (height, width)."""
        return PictureSource(self.path, size)

    def thumbnail(self, size: tuple[int, int]) -> np.ndarray:
        """The whole picture at (height, width), uint8 [h, w, 3], shrunk while it is loaded."""
        with decoding(self.path):
            return np.asarray(_thumbnail(self.path, size).numpy())

    def read(self, box: Box) -> Tensor:
        with decoding(self.path):
            return self._tensor(self._image.crop(box.x0, box.y0, box.width, box.height))

    def _tensor(self, image: pyvips.Image) -> Tensor:
        return torch.from_numpy(image.numpy().astype(np.float32).transpose(2, 0, 1) / self._white)


class StoredPicture:
    """A picture as it is stored, read once from top to bottom: in the memory of some rows, without a temporary file.

    Args:
        path: a picture as ``PictureSource`` reads it; its EXIF orientation is not applied.

    Attributes:
        size: (height, width).

    Raises:
        InputError: as ``PictureSource`` does.
    """

    def __init__(self, path: Path) -> None:
        check_exists(path, "picture")
        self.path = path
        with decoding(path):
            image = open_rows(path)
            check_samples(path, image)
            image = opaque_srgb(image)
            self._region = vips().Region.new(image)  # an image itself is read ahead, beyond the rows that come next
        self.size = (image.height, image.width)
        self._dtype = np.dtype(np.uint16 if image.format == "ushort" else np.uint8)
        self._white = np.float32(white(image))
        self._rows_at_once = max(1, _FETCHED // (image.width * 3 * self._dtype.itemsize))

    def crops(self, boxes: Iterable[Box]) -> Iterator[Tensor]:
        """Pixels of boxes, float32 [3, h, w]. Those of the same rows come together, and each row of boxes below the last."""
        for (y0, y1), row in groupby(boxes, key=lambda box: (box.y0, box.y1)):
            crops = [(box, np.empty((3, y1 - y0, box.width), np.float32)) for box in row]
            for top in range(y0, y1, self._rows_at_once):
                rows = self._fetch(top, min(top + self._rows_at_once, y1))
                for box, crop in crops:
                    part = rows[:, box.x0 : box.x1].transpose(2, 0, 1)
                    crop[:, top - y0 : top - y0 + len(rows)] = part / self._white
            yield from (torch.from_numpy(crop) for _, crop in crops)

    def _fetch(self, y0: int, y1: int) -> np.ndarray:
        """Rows [y0, y1) of all columns, [h, w, 3]."""
        with decoding(self.path):
            rows = self._region.fetch(0, y0, self.size[1], y1 - y0)
        return np.frombuffer(rows, self._dtype).reshape(y1 - y0, self.size[1], 3)


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
    notes: tuple[str, ...]
    """One sentence about each change of the pixels on the way to 8-bit sRGB."""


def open_photo(path: Path, least_width: int = 256) -> Photo:
    """Read the header and the digest of a photograph.

    Raises:
        InputError: no such file, no picture, samples of unknown meaning, or fewer than ``least_width`` columns.
    """
    check_exists(path, "photograph")
    with decoding(path):
        header = open_header(path)
        check_samples(path, header.image)
        image, sentences = header.image, _notes(header)
    if image.width < least_width:
        raise InputError(f"{path}: {image.width} px wide, at least {least_width} are needed; take a larger photograph")
    return Photo(path, image.width, image.height, sha256(path), sentences)


def resampled_photo(photo: Photo, size: tuple[int, int]) -> np.ndarray:
    """The photograph resampled (antialiased) to (height, width), as uint8 [H, W, 3].

    Memory is that of the result: libvips shrinks while it loads. Raises InputError when the file is damaged.
    """
    with decoding(photo.path):
        return np.asarray(_thumbnail(photo.path, size).numpy())


def write_resampled_photo(photo: Photo, size: tuple[int, int], path: Path) -> None:
    """Write ``resampled_photo``'s pixels to a raw file, row by row: the memory does not grow with the height."""
    with decoding(photo.path):
        _thumbnail(photo.path, size).rawsave(str(path))


def pages_note(header: Header) -> list[str]:
    """A sentence about further pages, if there are any."""
    return [f"only the first of {header.pages} pages or frames is read"] if header.pages > 1 else []


def _notes(header: Header) -> tuple[str, ...]:
    """Changes of the samples by their conversion to opaque sRGB."""
    return (*pages_note(header), *notes(header.image))


def _thumbnail(path: Path, size: tuple[int, int]) -> pyvips.Image:
    """The upright photograph at (height, width), in opaque 8-bit sRGB, shrunk while it is loaded."""
    return opaque_srgb(open_thumbnail(path, size)).colourspace("srgb")


def resampled(image: pyvips.Image, height: int, width: int) -> pyvips.Image:
    """The image at another size, corner on corner.

    libvips' ``resize`` shrinks that way. Where it enlarges one side it moves both by half a pixel, which also blurs the
    other side, so enlarging is done by ``affine``.
    """
    image = image.resize(min(1.0, width / image.width), vscale=min(1.0, height / image.height))
    x, y = width / image.width, height / image.height
    if x == y == 1:
        return image
    offset = {"odx": (x - 1) / 2, "ody": (y - 1) / 2, "oarea": [0, 0, width, height]}
    return image.affine([x, 0, 0, y], interpolate=vips().Interpolate.new("bicubic"), extend="copy", **offset)
