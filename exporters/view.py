"""A store as one export sees it: from a level on, a region of it, at 8 or 16 bits, with every level that the format needs.

A ``View`` reads like a ``Pyramid``. Levels that the store lacks, or whose pixels a region cuts in two, are computed when
they are first read: each halves the one before. Small ones are held in memory, others in a temporary file without a name.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engine.causes import naming
from engine.errors import UsageError, counted, option
from engine.exporters.pyramid import Level, Pixels, Pyramid
from engine.geometry import Box, Grid

DEPTHS: dict[int, np.dtype[Any]] = {8: np.dtype(np.uint8), 16: np.dtype(np.uint16)}

_IN_MEMORY = 4 << 20
"""Largest computed level that is held in memory, in bytes."""

_BLOCK = 512
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
        dtype: uint8 or uint16.
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
        self.dtype: np.dtype[Any] = pyramid.dtype if depth is None else DEPTHS[depth]
        self._boxes = _boxes(pyramid.levels, level, roi)
        self._computed: dict[int, Plane] = {}
        self.levels = tuple(
            Level(stored.path, *box.shape, stored.cell)
            for stored, box in zip(pyramid.levels[level:], self._boxes, strict=False)
        )
        self.is_whole = level == 0 and roi is None and self.dtype == pyramid.dtype

    @property
    def store(self) -> Path:
        """Folder of the store."""
        return self.pyramid.store

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Attributes that this engine recorded in the store."""
        return self.pyramid.provenance

    @property
    def channels(self) -> int:
        """Number of channels: 1 grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha."""
        stored = getattr(self.pyramid, "pixels", None)
        return 3 if stored is None else int(stored.channels)

    @property
    def has_alpha(self) -> bool:
        """Whether the last channel is opacity."""
        return self.channels in (2, 4)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 (of the pyramid)
        """Facts of the store that no view changes, such as its profile."""
        if name.startswith("_") or name == "pyramid":
            raise AttributeError(name)
        return getattr(self.pyramid, name)

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
            sizes.append(Level(str(self._first + len(sizes)), *half.shape, (_BLOCK, _BLOCK)))
        self.levels = tuple(sizes)

    def read(self, level: int, box: Box) -> Pixels:
        """Pixels of ``box``, which lies inside the level: [H, W, C]."""
        assert self.levels[level].bounds.contains(box), f"{box} leaves {self.levels[level]}"
        if level >= len(self._boxes):
            return self._plane(level).read(box)
        origin = self._boxes[level]
        return to_depth(self.pyramid.read(self._first + level, box.shift(origin.y0, origin.x0)), self.dtype)

    def band(self, level: int, y0: int, y1: int) -> Pixels:
        """Rows y0 to y1 over the whole width."""
        return self.read(level, Box(y0, 0, y1, self.levels[level].width))

    def stored_bytes(self, level: int) -> int:
        """Bytes of the level in the store, as far as it is in the view: a measure of how well its pixels compress."""
        if level >= len(self._boxes):
            return self.stored_bytes(level - 1) // 4
        stored = self.pyramid.levels[self._first + level]
        share = self.levels[level].bounds.area / stored.bounds.area * self.dtype.itemsize / self.pyramid.dtype.itemsize
        return int(self.pyramid.stored_bytes(self._first + level) * share)

    @property
    def scratch(self) -> int:
        """Bytes of the levels that are computed into a temporary file."""
        sizes = (level.bounds.area * self.channels * self.dtype.itemsize for level in self.levels[len(self._boxes) :])
        return sum(size for size in sizes if size > _IN_MEMORY)

    def check_unchanged(self) -> None:
        """Raise InputError unless the folder of this name is still the store that was opened."""
        self.pyramid.check_unchanged()

    def close(self) -> None:
        """Free the computed levels."""
        for plane in self._computed.values():
            plane.close()
        self._computed.clear()

    def _plane(self, level: int) -> Plane:
        plane = self._computed.get(level)
        if plane is None:
            size, upper = self.levels[level], self.levels[level - 1].bounds
            plane = Plane((size.height, size.width, self.channels), self.dtype, self.folder, _IN_MEMORY)
            grid = Grid(size.height, size.width, (_BLOCK, _BLOCK))
            for at in grid.indices():
                box = grid.box(*at)
                plane.write(box, halve(self.read(level - 1, box.scale(2).clip(upper))))
            self._computed[level] = plane
        return plane


class Plane:
    """Pixels [H, W, C] in memory or, where they are many, in a temporary file that ends with the process."""

    def __init__(self, shape: tuple[int, int, int], dtype: np.dtype[Any], folder: Path, in_memory: int) -> None:
        self._shape, self._dtype, self._folder = shape, dtype, folder
        self._pixel = shape[2] * dtype.itemsize
        size = shape[0] * shape[1] * self._pixel
        self._array: Pixels = np.empty(shape if size <= in_memory else 0, dtype)
        with naming(folder):
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0) if size > in_memory else None  # noqa: SIM115

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

    def read(self, box: Box) -> Pixels:
        """Pixels of ``box``."""
        if self._file is None:
            return self._array[box.slices].copy()
        pixels = np.empty((*box.shape, self._shape[2]), self._dtype)
        for row, line in enumerate(pixels, start=box.y0):
            self._file.seek(self._offset(row, box.x0))
            self._file.readinto(line.data)
        return pixels

    def bytes(self, start: int, length: int) -> bytes:
        """Up to ``length`` bytes of the rows, one after another, from ``start`` on."""
        if self._file is None:
            return self._array.reshape(-1).view(np.uint8)[start : start + length].tobytes()
        self._file.seek(start)
        return self._file.read(length)

    def close(self) -> None:
        """Free the pixels."""
        if self._file is not None:
            self._file.close()

    def _offset(self, row: int, column: int) -> int:
        return (row * self._shape[1] + column) * self._pixel


def halve(pixels: Pixels) -> Pixels:
    """2x2 average of [H, W, C], halves rounded up as in the store; an odd last row or column is averaged with itself."""
    height, width, _ = pixels.shape
    if height % 2 or width % 2:
        pixels = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    wide = np.uint16 if pixels.dtype == np.uint8 else np.uint32
    rows: Pixels = pixels[::2].astype(wide) + pixels[1::2]
    mean: Pixels = ((rows[:, ::2] + rows[:, 1::2] + 2) >> 2).astype(pixels.dtype)
    return mean


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
