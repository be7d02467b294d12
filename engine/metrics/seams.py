"""The seam of an image that should repeat: its jump across opposite sides against the jumps between neighbours inside.

Reads an image once, band by band. The memory is a band and two rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import InputError
from engine.metrics.images import Sample, bands

_WHITE = 255.0

_QUANTILE = 0.99
"""Share of the jumps inside that are ordinary: textures have lines, such as joints, across which all rows or columns jump."""

_SLACK = 1.25
"""Factor on the largest ordinary jump: the sides of an image that repeats may fall on one of its lines."""

LEAST_SIDE = 3
"""Smallest side in pixels, where two jumps lie inside."""

Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Seam:
    """Jumps along one axis: mean absolute differences of neighbouring rows or columns, in levels of 255."""

    axis: str
    """x (columns) or y (rows)."""
    jump: float
    """Jump from the last row or column to the first one."""
    typical: float
    """Median of the jumps inside."""
    largest: float
    """Largest jump that is ordinary inside: their 99th percentile."""

    @property
    def ratio(self) -> float:
        """``jump`` by ``typical``; near 1 without a seam."""
        if not self.typical:
            return 1.0 if not self.jump else float("inf")
        return self.jump / self.typical

    @property
    def is_visible(self) -> bool:
        """Whether the jump stands out from those inside."""
        return self.jump > _SLACK * self.largest

    def to_json(self) -> dict[str, Any]:
        """The measurement for machines; a ratio without a finite value is None."""
        return {
            "axis": self.axis,
            "jump_levels": self.jump,
            "typical_levels": self.typical,
            "largest_levels": self.largest,
            "ratio": self.ratio if self.typical or not self.jump else None,
            "seam": self.is_visible,
        }


def measure_seams(
    sample: Sample, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[Seam, Seam]:
    """Seams along x and y of an image that is laid beside and below itself.

    Args:
        sample: the image.
        on_progress: called with (done, total) rows.

    Raises:
        InputError: the image is too small, or damaged.
    """
    height, width = sample.size
    if min(height, width) < LEAST_SIDE:
        raise InputError(
            f"{sample.name}: too small to show a seam ({width}x{height}); use at least {LEAST_SIDE}x{LEAST_SIDE}"
        )
    columns, rows, across, done = np.zeros(width - 1), [np.empty(0)], 0.0, 0
    first = above = np.empty(0)
    for band in bands(sample.source):
        pixels = band.numpy().astype(np.float64) * _WHITE  # [3, h, W]
        columns += np.abs(np.diff(pixels, axis=2)).mean(0).sum(0)
        across += float(np.abs(pixels[:, :, 0] - pixels[:, :, -1]).mean(0).sum())
        joined = np.concatenate([above, pixels], 1) if done else pixels
        rows.append(np.abs(np.diff(joined, axis=1)).mean((0, 2)))
        first = first if done else pixels[:, :1].copy()
        above = pixels[:, -1:].copy()
        done += pixels.shape[1]
        on_progress(done, height)
    down = float(np.abs(first - above).mean())
    return _seam("x", across / height, columns / height), _seam("y", down, np.concatenate(rows))


def _seam(axis: str, jump: float, inside: Values) -> Seam:
    return Seam(axis, jump, float(np.median(inside)), float(np.quantile(inside, _QUANTILE)))
