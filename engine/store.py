"""A store of pixels as numpy regions: a finished render, one that still grows, or another program's OME-Zarr image."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import EllipsisType
from typing import Any

from engine.errors import UsageError
from engine.exporters.pyramid import Pixels, Pyramid
from engine.geometry import Box, Region, parse_box


class Store:
    """An open store, as ``engine.open`` returns it. Reads decode only the chunks that they meet.

    Attributes:
        path: folder of the store.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pyramid = Pyramid(path, allow_incomplete=True)

    def __repr__(self) -> str:
        width, height = self.size
        return f"<Store {self.path}: {width}x{height}{'' if self.complete else ', not complete'}>"

    def __fspath__(self) -> str:
        """The folder, so that ``engine.export`` takes an open store."""
        return str(self.path)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the image in pixels."""
        return self.levels[0]

    @property
    def levels(self) -> tuple[tuple[int, int], ...]:
        """(width, height) of every level of the pyramid, the full image first."""
        return tuple((level.width, level.height) for level in self._pyramid.levels)

    @property
    def profile(self) -> bytes | None:
        """ICC profile of the colours; None for grey without a profile."""
        return self._pyramid.profile

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Plan, model, licences, seam error and precision error of the render; empty for another program's store."""
        return self._pyramid.provenance

    @property
    def complete(self) -> bool:
        """Whether the render is finished. Shards that are missing read as black."""
        return not self.provenance or self.provenance.get("complete") is True

    def read(self, region: Region | None = None, level: int = 0) -> Pixels:
        """Pixels of a region as an array [height, width, channels] of uint8 or uint16.

        Channels are grey or RGB, and then alpha, by which colours are not multiplied.

        Args:
            region: (x, y, width, height) in pixels of the level, a ``Box`` or a text; by default all of the level.
            level: level of the pyramid; 0 is the full image.

        Raises:
            UsageError: there is no such level, or the region leaves it.
            InputError: a chunk is damaged.
        """
        if not 0 <= level < len(self.levels):
            raise UsageError(f"{self.path}: no such level ({level}); use 0 to {len(self.levels) - 1}")
        bounds = self._pyramid.levels[level].bounds
        box = bounds if region is None else parse_box(region, "region")
        if not bounds.contains(box):
            raise UsageError(
                f"{self.path}: the region {box.x0},{box.y0},{box.width},{box.height} leaves level {level} "
                f"({bounds.width}x{bounds.height}); use X,Y,WIDTH,HEIGHT inside it"
            )
        return self._pyramid.read(level, box)

    def __getitem__(self, index: slice | EllipsisType | tuple[slice, slice]) -> Pixels:
        """Pixels of the full image by slices of rows and columns, ``store[y0:y1, x0:x1]``, as an array [height, width, channels].

        Raises:
            UsageError: the index is not one or two slices without a step.
        """
        index = slice(None) if index is ... else index
        slices = index if isinstance(index, tuple) else (index, slice(None))
        if len(slices) != 2 or not all(isinstance(s, slice) and s.step in (None, 1) for s in slices):
            raise UsageError(f"{self.path}: no such index ({index!r}); use slices of rows and columns, [y0:y1, x0:x1]")
        rows, columns = slices
        width, height = self.size
        (y0, y1, _), (x0, x1, _) = rows.indices(height), columns.indices(width)
        return self._pyramid.read(0, Box(y0, x0, max(y0, y1), max(x0, x1)))


def open_store(path: Path | str) -> Store:
    """Open a store to read: its size, levels and provenance, and its pixels region by region.

    Args:
        path: folder of a render, finished or not, or of another program's OME-Zarr image.

    Raises:
        InputError: the folder is no such image, or is damaged.
    """
    return Store(Path(path))
