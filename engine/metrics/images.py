"""Images to score: files, OME-Zarr stores and folders of them, read as float32 rows in [0, 1]."""

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
from engine.io.objects import Place, as_place, local_copy
from engine.io.photo import SUFFIXES, PictureSource, Source
from engine.metrics.area import Size

BAND = 64
"""Rows at a time. Inception's widest layer then takes 17 MB for an image of 4096 columns."""

LAYOUT_WIDTH = 256
"""Width at which layouts are compared, unless the store records the size of step 1's image."""


class StoreSource:
    """The full-size level of a store. Memory: one row of cells, which is 512 rows for our own stores."""

    def __init__(self, path: Place) -> None:
        self._pyramid = Pyramid(path, cache_bytes=1)  # this class keeps the current row of cells itself
        level = self._pyramid.levels[0]
        self.size = (level.height, level.width)
        self._step = level.cell[0]
        self._pixels = self._pyramid.pixels
        self._white = float(np.iinfo(self._pyramid.dtype).max)
        self._top, self._rows = -1, np.empty(0)

    @property
    def base(self) -> Size | None:
        """Size of step 1's image if the store holds a whole canvas of this engine."""
        plan = self._pyramid.provenance.get("plan", {})
        try:
            return (int(plan["base"][0]), int(plan["base"][1])) if tuple(plan["canvas"]) == self.size else None
        except (KeyError, TypeError, ValueError, IndexError):
            return None

    def read(self, box: Box) -> Tensor:
        """float32 [3, h, w] in [0, 1], flattened on white; the box lies inside the image."""
        parts, y = [], box.y0
        while y < box.y1:
            top = y // self._step * self._step
            bottom = min(top + self._step, box.y1)
            parts.append(self._cells(top)[y - top : bottom - top, box.x0 : box.x1])
            y = bottom
        pixels = np.concatenate(parts).transpose(2, 0, 1)  # [C, h, w]
        values = torch.from_numpy(pixels.astype(np.float32) / np.float32(self._white))
        colours = values[: self._pixels.colours].expand(3, -1, -1)
        return colours * values[-1:] + (1 - values[-1:]) if self._pixels.has_alpha else colours

    def _cells(self, top: int) -> Pixels:
        if top != self._top:
            self._rows = self._pyramid.band(0, top, min(top + self._step, self.size[0]))
            self._top = top
        return self._rows


@dataclass(frozen=True, slots=True)
class Sample:
    """A named image."""

    name: str
    source: Source

    @property
    def size(self) -> Size:
        return self.source.size

    @property
    def notes(self) -> tuple[str, ...]:
        """What reading it as sRGB changes."""
        return self.source.notes if isinstance(self.source, PictureSource) else ()


def open_image(path: Path) -> Sample:
    """Open an image file or a store.

    Raises:
        InputError: it is neither, or the store is unfinished.
    """
    # Many images are open at once, so all but small ones are decoded to temporary files. libvips reads this once.
    os.environ.setdefault("VIPS_DISC_THRESHOLD", "1m")
    place = as_place(path)
    if not place.exists():
        raise InputError(f"{place}: no such picture or store; check the path")
    return Sample(place.name, StoreSource(place) if place.is_dir() else PictureSource(local_copy(path)))


def expand(paths: Sequence[Path]) -> list[Path]:
    """Replace every folder by its images and stores, sorted by name.

    Raises:
        InputError: a folder holds neither.
    """
    return [image for path in paths for image in (_inside(path) if _is_folder(path) else [path])]


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not _is_store(path)


def _is_store(path: Path) -> bool:
    return any((path / name).is_file() for name in ("zarr.json", ".zgroup"))


def _inside(folder: Path) -> list[Path]:
    images = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES or _is_store(p))
    if not images:
        raise InputError(f"{folder}: no picture ({', '.join(SUFFIXES)}) and no store in this folder; name another")
    return images


def layout_size(sample: Sample) -> Size:
    """Size at which the layout is compared: step 1's image of our own store, otherwise ``LAYOUT_WIDTH`` columns."""
    base = sample.source.base if isinstance(sample.source, StoreSource) else None
    height, width = sample.size
    return base or (max(4, round(LAYOUT_WIDTH * height / width)), LAYOUT_WIDTH)


def bands(source: Source, rows: int = BAND) -> Iterator[Tensor]:
    """Bands [3, rows, W] from the top; the last one may be lower."""
    height, width = source.size
    for y in range(0, height, rows):
        yield source.read(Box(y, 0, min(y + rows, height), width))
