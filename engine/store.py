"""A store of pixels as numpy regions: a finished render, one that still grows, or another program's OME-Zarr image."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import UsageError
from engine.exporters.pyramid import Pixels, Pyramid
from engine.geometry import Box


class Store:
    """An open store. Reads decode only the chunks that they meet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pyramid = Pyramid(path, allow_incomplete=True)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the image in pixels."""
        return self.levels[0]

    @property
    def levels(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of every level of the pyramid, the full image first."""
        return tuple(level.bounds.shape for level in self._pyramid.levels)

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Plan, model, licences, seam error and precision error of the render; empty for another program's store."""
        return self._pyramid.provenance

    @property
    def complete(self) -> bool:
        """Whether the render is finished. Shards that are missing read as black."""
        return not self.provenance or self.provenance.get("complete") is True

    def read(self, box: Box | None = None, level: int = 0) -> Pixels:
        """Pixels of a region, [h, w, 3].

        Args:
            box: region in pixels of the level; by default all of it.
            level: level of the pyramid; 0 is the full image.

        Raises:
            UsageError: there is no such level, or the region leaves it.
            InputError: a chunk is damaged.
        """
        if not 0 <= level < len(self.levels):
            raise UsageError(f"{self.path}: no such level ({level}); use 0 to {len(self.levels) - 1}")
        bounds = Box(0, 0, *self.levels[level])
        box = bounds if box is None else box
        if not bounds.contains(box):
            raise UsageError(
                f"{self.path}: {box} leaves level {level} ({bounds.width}x{bounds.height}); use a box inside it"
            )
        return self._pyramid.read(level, box)


def open_store(path: Path | str) -> Store:
    """Open a store to read. Raises InputError when it is none, or is damaged."""
    return Store(Path(path))
