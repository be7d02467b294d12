"""What the viewer shows: an image of several levels, cut into tiles, that may change while it is looked at."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.geometry import Box
from engine.growing import TILE, Kind, Pixels, Tile

__all__ = ["TILE", "Kind", "Pixels", "State", "Tile", "TileSource"]


@dataclass(frozen=True, slots=True)
class State:
    """What changes in a source while it grows."""

    complete: bool = True
    running: bool | None = None
    """Whether a process writes it; None where the system does not tell."""
    share: float = 1.0
    """Share of the work that is done, 0 to 1."""
    seconds_left: float | None = None
    """Forecast of the time to the end."""
    cells: tuple[int, int] = (1, 1)
    """(rows, columns) of the parts that are finished one by one."""
    cell: tuple[int, int] = (TILE, TILE)
    """(height, width) of such a part, in pixels of the full image."""
    finished: NDArray[np.bool_] = field(default_factory=lambda: np.ones((1, 1), bool))
    """Whether a part is finished, [rows, columns]."""
    epoch: int = 0
    """Number of times that all pixels have changed."""
    problems: tuple[str, ...] = ()
    """Sentences about damage."""
    resume: str | None = None
    """Command that continues a stopped render."""

    def to_json(self) -> dict[str, Any]:
        """The state for the page; ``finished`` as bits, row by row, in base64."""
        return {
            "complete": self.complete,
            "running": self.running,
            "share": round(self.share, 4),
            "secondsLeft": None if self.seconds_left is None else round(self.seconds_left, 1),
            "cells": list(self.cells),
            "cell": list(self.cell),
            "finished": base64.b64encode(np.packbits(self.finished.ravel()).tobytes()).decode(),
            "epoch": self.epoch,
            "problems": list(self.problems),
            "resume": self.resume,
        }


class TileSource(Protocol):
    """An image for the viewer: a store or a picture. A model fills a store (``engine.view.model``).

    Methods may be called from several threads. Level 0 is the full image, each further one is smaller. A tile covers ``TILE``
    pixels of its level, less at the right and lower border.
    """

    name: str
    """Name for the page, unique among the sources of a viewer."""

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(width, height) of every level."""
        ...

    @property
    def grows(self) -> bool:
        """Whether it may still change often."""
        ...

    def describe(self) -> dict[str, Any]:
        """Facts for the panel, as JSON: see ``Details`` in viewer/src/api.ts."""
        ...

    def version(self, level: int, x: int, y: int) -> str:
        """Short text that changes with the pixels of a tile; known without computing them."""
        ...

    def tile(self, level: int, x: int, y: int) -> Tile:
        """Pixels of a tile."""
        ...

    def read(self, box: Box) -> Pixels:
        """Finished pixels of the full image. Raises InputError where some are not finished or damaged."""
        ...

    def refresh(self) -> bool:
        """Look for changes; returns whether there are any. Raises InputError where the source is gone."""
        ...

    @property
    def state(self) -> State:
        """What it is like since the last ``refresh``."""
        ...


def tiles_of(size: tuple[int, int]) -> tuple[int, int]:
    """(columns, rows) of the tiles of a level of (width, height)."""
    return -(-size[0] // TILE), -(-size[1] // TILE)
