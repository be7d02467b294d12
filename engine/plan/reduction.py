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
    margin: int = 0
    """Pixels before and behind the source's that are read as well, where the image repeats; 0 where it ends."""
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

    @property
    def reach(self) -> int:
        """Most pixels of a window that lie before the source's first pixel, or behind its last one."""
        return 0 if self.is_identity else math.ceil(self.lobes * self.width) + 1

    def centre(self, index: int) -> float:
        """Position of a target pixel's centre among the pixels that are read."""
        return (index + 0.5) * self.source / self.target - 0.5 + self.margin

    def start(self, index: int) -> int:
        """First source pixel of a target pixel's window; negative where the window begins outside of the image."""
        return math.floor(self.centre(index)) - math.ceil(self.lobes * self.width)

    def read(self, first: int, last: int) -> tuple[int, int]:
        """Half-open range of source pixels behind the target pixels [first, last)."""
        if self.is_identity:
            return first + self.margin, last + self.margin
        return max(0, self.start(first)), min(self.read_size, self.start(last - 1) + self.taps)

    @property
    def read_size(self) -> int:
        """Pixels that may be read."""
        return self.source + 2 * self.margin


@dataclass(frozen=True, slots=True)
class Reduction:
    """Reduction of an image of size ``source`` to ``target``, both (height, width)."""

    source: tuple[int, int]
    target: tuple[int, int]
    margin: tuple[int, int] = (0, 0)
    """Rows above and below, and columns left and right of the source that are read as well, where the image repeats."""

    @property
    def is_identity(self) -> bool:
        """Whether nothing is to be done."""
        return self.source == self.target

    @property
    def rows(self) -> Axis:
        """Vertical part."""
        return Axis(self.source[0], self.target[0], self.margin[0])

    @property
    def columns(self) -> Axis:
        """Horizontal part."""
        return Axis(self.source[1], self.target[1], self.margin[1])

    def read(self, box: Box) -> Box:
        """Box of the source behind a box of the target."""
        (y0, y1), (x0, x1) = self.rows.read(box.y0, box.y1), self.columns.read(box.x0, box.x1)
        return Box(y0, x0, y1, x1)
