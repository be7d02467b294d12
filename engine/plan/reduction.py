"""Reduction of the last step's image to the size of the image, and enlargement of its alpha. Knows nothing of tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.geometry import Box

LOBES = 3
"""Lobes of the Lanczos window, on each side."""

ROWS = 16
"""Rows of the image that are reduced at a time."""


@dataclass(frozen=True, slots=True)
class Axis:
    """``source`` pixels resampled to ``target`` pixels along one axis, by a window that grows with the ratio of a reduction."""

    source: int
    target: int
    lobes: int = LOBES
    """3: Lanczos' window. 2: a cubic one, whose ringing a clamp removes beside opaque and transparent pixels."""

    @property
    def is_identity(self) -> bool:
        """Whether nothing is to be done."""
        return self.source == self.target

    @property
    def width(self) -> float:
        """Source pixels of a lobe of the window."""
        return max(1.0, self.source / self.target)

    @property
    def taps(self) -> int:
        """Source pixels of a window."""
        return 2 * math.ceil(self.lobes * self.width) + 1

    def centre(self, index: int) -> float:
        """Position of a target pixel's centre among the source's pixels."""
        return (index + 0.5) * self.source / self.target - 0.5

    def start(self, index: int) -> int:
        """First source pixel of a target pixel's window; negative where the window begins outside of the image."""
        return math.floor(self.centre(index)) - math.ceil(self.lobes * self.width)

    def read(self, first: int, last: int) -> tuple[int, int]:
        """Half-open range of source pixels behind the target pixels [first, last)."""
        if self.is_identity:
            return first, last
        return max(0, self.start(first)), min(self.source, self.start(last - 1) + self.taps)


@dataclass(frozen=True, slots=True)
class Reduction:
    """Reduction of an image of size ``source`` to ``target``, both (height, width)."""

    source: tuple[int, int]
    target: tuple[int, int]

    @property
    def is_identity(self) -> bool:
        """Whether nothing is to be done."""
        return self.source == self.target

    @property
    def rows(self) -> Axis:
        """Vertical part."""
        return Axis(self.source[0], self.target[0])

    @property
    def columns(self) -> Axis:
        """Horizontal part."""
        return Axis(self.source[1], self.target[1])

    def read(self, box: Box) -> Box:
        """Box of the source behind a box of the target."""
        (y0, y1), (x0, x1) = self.rows.read(box.y0, box.y1), self.columns.read(box.x0, box.x1)
        return Box(y0, x0, y1, x1)
