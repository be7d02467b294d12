"""A picture as the viewer shows it, to compare a store with: decoded once into memory, with levels of halves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import InputError
from engine.geometry import Box
from engine.growing import TILE, Kind, Pixels, Tile
from engine.io.halving import halve_interleaved
from engine.io.picture_file import check_exists, decoding, open_header, open_upright
from engine.io.srgb import check_samples, opaque_srgb
from engine.view.source import State

MAX_PIXELS = 100_000_000
"""Pixels of the largest picture: 400 MB with its levels."""


class PictureSource:
    """A picture.

    Raises:
        InputError: no such file, one that cannot be decoded, or more than ``MAX_PIXELS``.
    """

    grows = False
    state = State()

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path = path
        self.name = name or path.name
        check_exists(path, "picture")
        with decoding(path):
            header = open_header(path).image
            check_samples(path, header)
            if header.width * header.height > MAX_PIXELS:
                raise InputError(
                    f"{path}: {header.width * header.height / 1e6:.0f} megapixels, at most {MAX_PIXELS // 10**6} are shown; "
                    "make it smaller"
                )
            pixels = np.ascontiguousarray(opaque_srgb(open_upright(path)).colourspace("srgb").numpy(), dtype=np.uint8)
        self._levels: list[Pixels] = [pixels]
        while max(self._levels[-1].shape[:2]) > TILE:
            self._levels.append(np.ascontiguousarray(halve_interleaved(self._levels[-1])))

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        return tuple((level.shape[1], level.shape[0]) for level in self._levels)

    def describe(self) -> dict[str, Any]:
        return {"kind": "picture"}

    def version(self, level: int, x: int, y: int) -> str:
        return "0"

    def tile(self, level: int, x: int, y: int) -> Tile:
        part = self._levels[level][y * TILE : (y + 1) * TILE, x * TILE : (x + 1) * TILE]
        return Tile(np.ascontiguousarray(part), Kind.FINISHED)

    def read(self, box: Box) -> Pixels:
        return self._levels[0][box.slices]

    def refresh(self) -> bool:
        return False
