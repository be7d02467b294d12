"""A store as one export sees it: from a level on, a region of it, at 8 or 16 bits, with every level that the format needs.

A ``View`` reads like a ``Pyramid``. Levels that the store lacks, or whose pixels a region cuts in two, are computed when
they are first read: each halves the one before. Small ones are held in memory, others in a temporary file without a name.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.causes import naming
from engine.errors import UsageError, counted, option
from engine.exporters.pyramid import Level, Pixels, Pyramid
from engine.geometry import Box, Grid
from engine.io.halving import halve_interleaved
from engine.io.objects import Place
from engine.pixels import DEPTHS, PixelFormat

IN_MEMORY = 4 << 20
"""Largest computed level that is held in memory, in bytes."""

SQUARE = 512
"""Side in pixels of the squares that computed levels are made by."""


class View:
    """Part of an open store, as levels of interleaved pixels.

    Args:
        pyramid: the open store.
        level: first level; its pixels are the full size of the export.
        roi: region in pixels of level 0; None for the whole image.
        depth: bits per channel, 8 or 16; None keeps the store's.
        folder: place of temporary files.

    Attributes:
        pyramid: the open store.
        levels: resolutions from full size downwards.
        pixels: channels and depth.
        folder: place of temporary files.
        is_whole: whether the levels are the store's own, from level 0 on, bit for bit.

    Raises:
        UsageError: the level or the region is not in the image, or an unknown depth.
    """

    def __init__(
        self, pyramid: Pyramid, *, level: int = 0, roi: Box | None = None, depth: int | None = None, folder: Path
    ) -> None:
        if not 0 <= level < len(pyramid.levels):
            raise UsageError(
                f"{option('level')}: {level} is not in the store, which has {counted(len(pyramid.levels), 'level')}; "
                f"give 0 to {len(pyramid.levels) - 1}"
            )
        if depth is not None and depth not in DEPTHS:
            raise UsageError(f"{option('depth')}: {depth} is unknown; give 8 or 16")
        whole = pyramid.levels[0].bounds
        if roi is not None and not whole.contains(roi):
            raise UsageError(
                f"{option('roi')}: {roi} leaves the image ({whole.width} x {whole.height} pixels); give a region inside it"
            )
        self.pyramid, self._first, self.folder = pyramid, level, folder
        self.pixels = pyramid.pixels if depth is None else replace(pyramid.pixels, depth=depth)
        self._boxes = _boxes(pyramid.levels, level, roi)
        self._computed: dict[int, Plane] = {}
        self._lock = threading.RLock()  # of the computed levels, one of which is read to compute another
        self.levels = tuple(
            Level(stored.path, *box.shape, stored.cell)
            for stored, box in zip(pyramid.levels[level:], self._boxes, strict=False)
        )
        self.is_whole = level == 0 and roi is None and self.pixels == pyramid.pixels

    @property
    def width(self) -> int:
        """Width in pixels of the first level."""
        return self.levels[0].width

    @property
    def height(self) -> int:
        """Height in pixels of the first level."""
        return self.levels[0].height

    @property
    def store(self) -> Place:
        """Folder or URL of the store."""
        return self.pyramid.store

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Attributes that this engine recorded in the store."""
        return self.pyramid.provenance

    @property
    def profile(self) -> bytes | None:
        """ICC profile to embed; None for grey without a profile."""
        return self.pyramid.profile

    @property
    def dpi(self) -> tuple[float, float] | None:
        """(horizontal, vertical) resolution of the picture that was enlarged; None if it is not known."""
        return self.pyramid.dpi

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint8 or uint16."""
        return np.dtype(self.pixels.dtype)

    def keep(self, count: int) -> None:
        """Forget all levels but the first ones."""
        self.levels, self._boxes = self.levels[:count], self._boxes[:count]

    def drop(self, count: int) -> View:
        """This view without its first levels."""
        self.levels, self._boxes, self._first = self.levels[count:], self._boxes[count:], self._first + count
        self.is_whole &= not count
        return self

    def extend(self, smallest: int, *, exact: bool = False) -> None:
        """Add levels until one has at most ``smallest`` pixels on its longer side.

        Args:
            smallest: largest accepted side of the last level, in pixels.
            exact: also replace levels of the store that do not halve the one before, rounded up.
        """
        sizes = [self.levels[0]]
        for index, level in enumerate(self.levels[1:], start=1):
            if exact and level.bounds != self.levels[0].bounds.cover(2**index):
                break
            sizes.append(level)
        self._boxes = self._boxes[: len(sizes)]
        while max(sizes[-1].height, sizes[-1].width) > smallest:
            half = sizes[-1].bounds.cover(2)
            sizes.append(Level(str(self._first + len(sizes)), *half.shape, (SQUARE, SQUARE)))
        self.levels = tuple(sizes)

    def read(self, level: int, box: Box) -> Pixels:
        """Pixels of ``box``, which lies inside the level: [H, W, C]. They must not be changed."""
        assert self.levels[level].bounds.contains(box), f"{box} leaves {self.levels[level]}"
        if level >= len(self._boxes):
            with self._lock:
                return self._plane(level).read(box)
        origin = self._boxes[level]
        return to_depth(self.pyramid.read_once(self._first + level, box.shift(origin.y0, origin.x0)), self.dtype)

    def cell_rows(self, level: int, y: int) -> tuple[int, int]:
        """First row, and the row after the last, of the store's row of cells that holds row ``y``."""
        rows, origin = self.levels[level].cell[0], self._boxes[level].y0 if level < len(self._boxes) else 0
        top = (y + origin) // rows * rows - origin
        return max(0, top), min(top + rows, self.levels[level].height)

    def stored_bytes(self, level: int) -> int:
        """Bytes of the level in the store, as far as it is in the view: a measure of how well its pixels compress."""
        if level >= len(self._boxes):
            return self.stored_bytes(level - 1) // 4
        stored = self.pyramid.levels[self._first + level]
        share = self.levels[level].bounds.area * self.pixels.depth / (stored.bounds.area * self.pyramid.pixels.depth)
        return int(self.pyramid.stored_bytes(self._first + level) * share)

    @property
    def scratch(self) -> int:
        """Bytes of the levels that are computed into a temporary file."""
        sizes = (level.bounds.area * self.pixels.bytes for level in self.levels[len(self._boxes) :])
        return sum(size for size in sizes if size > IN_MEMORY)

    def check_unchanged(self) -> None:
        """Raise InputError unless the folder of this name is still the store that was opened."""
        self.pyramid.check_unchanged()

    def close(self) -> None:
        """Free the computed levels."""
        for plane in self._computed.values():
            plane.close()
        self._computed.clear()

    def _plane(self, level: int) -> Plane:
        if level not in self._computed:
            self._computed[level] = self._compute(level)
        return self._computed[level]

    def _compute(self, level: int) -> Plane:
        """The halves of the level before."""
        size, upper = self.levels[level], self.levels[level - 1].bounds
        plane = Plane((size.height, size.width), self.pixels, self.folder, IN_MEMORY)
        grid = Grid(size.height, size.width, (SQUARE, SQUARE))
        for at in grid.indices():
            box = grid.box(*at)
            plane.write(box, halve_interleaved(self.read(level - 1, box.scale(2).clip(upper))))
        return plane


class Plane:
    """Pixels [H, W, C] in memory or, where they are many, in a temporary file that ends with the process."""

    def __init__(self, size: tuple[int, int], pixels: PixelFormat, folder: Path, in_memory: int) -> None:
        self._size, self._pixels, self._folder = size, pixels, folder
        count = size[0] * size[1] * pixels.bytes
        self._array: Pixels = np.empty((*size, pixels.channels) if count <= in_memory else 0, pixels.dtype)
        with naming(folder):
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0) if count > in_memory else None  # noqa: SIM115

    def write(self, box: Box, pixels: Pixels) -> None:
        """Set the pixels of ``box``."""
        if self._file is None:
            self._array[box.slices] = pixels
            return
        with naming(self._folder):
            for row, line in enumerate(np.ascontiguousarray(pixels), start=box.y0):
                self._file.seek(self._offset(row, box.x0))
                data = line.data.cast("B")
                while data:
                    data = data[self._file.write(data) :]

    def write_bytes(self, start: int, data: bytes) -> None:
        """Set a part of the rows' bytes, one row after another, from ``start`` on."""
        if self._file is None:
            self._array.reshape(-1).view(np.uint8)[start : start + len(data)] = np.frombuffer(data, np.uint8)
            return
        with naming(self._folder):
            self._file.seek(start)
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]

    def read(self, box: Box) -> Pixels:
        """Pixels of ``box``."""
        if self._file is None:
            return self._array[box.slices].copy()
        pixels = np.empty((*box.shape, self._pixels.channels), self._pixels.dtype)
        for row, line in enumerate(pixels, start=box.y0):
            self._file.seek(self._offset(row, box.x0))
            self._file.readinto(line.data)
        return pixels

    def close(self) -> None:
        """Free the pixels."""
        if self._file is not None:
            self._file.close()

    def _offset(self, row: int, column: int) -> int:
        return (row * self._size[1] + column) * self._pixels.bytes


def to_depth(pixels: Pixels, dtype: np.dtype[Any]) -> Pixels:
    """Pixels as uint8 or uint16, rounded to the nearest."""
    if pixels.dtype == dtype:
        return pixels
    if dtype == np.uint16:
        return pixels.astype(np.uint16) * np.uint16(257)
    return ((pixels.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def _boxes(levels: tuple[Level, ...], first: int, roi: Box | None) -> list[Box]:
    """Rectangles of the view on the levels from ``first`` on: as far as their pixels halve those of the view exactly."""
    if roi is None:
        return [level.bounds for level in levels[first:]]
    box = roi.cover(2**first).clip(levels[first].bounds)
    boxes = [box]
    for index, level in enumerate(levels[first + 1 :], start=1):
        factor, part = 2**index, box.cover(2**index)
        is_exact = level.bounds == levels[first].bounds.cover(factor) and not (box.y0 % factor or box.x0 % factor)
        if not is_exact or part.area == 0:
            break
        boxes.append(part)
    return boxes
