"""What is scored: pictures and OME-Zarr stores as float32 rows in [0, 1], and folders of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.errors import InputError
from engine.exporters.pyramid import Pixels, Pyramid
from engine.geometry import Box
from engine.io.photo import PictureSource, Source

BAND = 64
"""Rows at a time. Inception's widest layer then takes 17 MB of a picture that is 4096 pixels wide."""

BASE_WIDTH = 256
"""Width of step 1's image, at which a picture's layout is compared unless its store names another base."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp")

Size = tuple[int, int]


class StoreSource:
    """The full-size level of a store. Holds one row of the store's cells, 512 rows by the whole width for our own."""

    def __init__(self, path: Path) -> None:
        self._pyramid = Pyramid(path, cache_bytes=1)  # a row of cells is kept here, once
        level = self._pyramid.levels[0]
        self.size = (level.height, level.width)
        self._step = level.cell[0]
        self._white = float(np.iinfo(self._pyramid.dtype).max)
        self._top, self._rows = -1, np.empty(0)

    @property
    def base(self) -> Size | None:
        """(height, width) of step 1's image, when this is a whole canvas of ours."""
        plan = self._pyramid.provenance.get("plan", {})
        try:
            return (int(plan["base"][0]), int(plan["base"][1])) if tuple(plan["canvas"]) == self.size else None
        except (KeyError, TypeError, ValueError, IndexError):
            return None

    def read(self, box: Box) -> Tensor:
        parts, y = [], box.y0
        while y < box.y1:
            top = y // self._step * self._step
            bottom = min(top + self._step, box.y1)
            parts.append(self._cells(top)[y - top : bottom - top, box.x0 : box.x1])
            y = bottom
        pixels = np.concatenate(parts).transpose(2, 0, 1)  # [3, h, w]
        return torch.from_numpy(pixels.astype(np.float32) / np.float32(self._white))

    def _cells(self, top: int) -> Pixels:
        if top != self._top:
            self._rows = self._pyramid.band(0, top, min(top + self._step, self.size[0]))
            self._top = top
        return self._rows


@dataclass(frozen=True, slots=True)
class Sample:
    """A picture or a store with its name."""

    name: str
    source: Source

    @property
    def size(self) -> Size:
        return self.source.size


def open_image(path: Path) -> Sample:
    """A picture file or a store. Raises InputError when it is neither, or a store that is not finished."""
    # Many pictures are open at once: all but the small ones are decoded to temporary files. libvips asks for this once.
    os.environ.setdefault("VIPS_DISC_THRESHOLD", "1m")
    if not path.exists():
        raise InputError(f"{path}: no such picture or store")
    return Sample(path.name, StoreSource(path) if path.is_dir() else PictureSource(path))


def expand(paths: Sequence[Path]) -> list[Path]:
    """The same paths with the pictures and stores of a folder in the folder's place, in the order of their names."""
    return [found for path in paths for found in (_inside(path) if _is_folder(path) else [path])]


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not _is_store(path)


def _is_store(path: Path) -> bool:
    return any((path / name).is_file() for name in ("zarr.json", ".zgroup"))


def _inside(folder: Path) -> list[Path]:
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES or _is_store(p))
    if not found:
        raise InputError(f"{folder}: no picture ({', '.join(SUFFIXES)}) and no store in this folder; name another")
    return found


def base_size(sample: Sample) -> Size:
    """(height, width) at which its layout is looked at: the base that a store of ours grew from, else 256 pixels wide."""
    base = sample.source.base if isinstance(sample.source, StoreSource) else None
    height, width = sample.size
    return base or (max(4, round(BASE_WIDTH * height / width)), BASE_WIDTH)


def bands(source: Source, rows: int = BAND) -> Iterator[Tensor]:
    """The picture from its top: float32 [3, rows, W], the last one with what is left."""
    height, width = source.size
    for y in range(0, height, rows):
        yield source.read(Box(y, 0, min(y + rows, height), width))
