"""Pixels of an image on paper, and sizes that 3D programs want. Knows nothing of tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.errors import UsageError, option
from engine.geometry import MAX_SIDE

DEFAULT_DPI = 300.0
"""Resolution of prints that are looked at from a hand's distance, in dots per inch."""

MM_PER_INCH = 25.4

_METRE_MM = 1000.0


@dataclass(frozen=True, slots=True)
class PrintSize:
    """An image on paper."""

    width_mm: float
    height_mm: float
    dpi: float

    @classmethod
    def of(cls, size: tuple[int, int], dpi: float | None) -> PrintSize:
        """The print of an image of (height, width) pixels; ``dpi`` None: ``DEFAULT_DPI``."""
        dpi = dpi or DEFAULT_DPI
        return cls(size[1] / dpi * MM_PER_INCH, size[0] / dpi * MM_PER_INCH, dpi)

    def __str__(self) -> str:
        """The sides in cm, or in metres from a metre on: "34.7 x 26.0 cm at 300 dpi"."""
        in_metres = max(self.width_mm, self.height_mm) >= _METRE_MM
        unit, divisor, digits = ("m", 1000, 2) if in_metres else ("cm", 10, 1)
        width, height = (f"{side / divisor:.{digits}f}" for side in (self.width_mm, self.height_mm))
        return f"{width} x {height} {unit} at {self.dpi:g} dpi"


def pixels_of_print(width_mm: float, dpi: float | None) -> int:
    """Pixels of a print's width. Raises UsageError for widths and resolutions that no print has."""
    dpi = dpi or DEFAULT_DPI
    pixels = round(width_mm / MM_PER_INCH * dpi) if math.isfinite(width_mm) and math.isfinite(dpi) else 0
    if not (width_mm > 0 and dpi > 0 and 1 <= pixels <= MAX_SIDE):
        raise UsageError(
            f"{option('width_mm', f'{width_mm:g}')}: is {pixels} pixels at {dpi:g} dpi; use 1 to {MAX_SIDE} pixels"
        )
    return pixels


def material_size(size: tuple[int, int], *, repeats: bool = False) -> tuple[int, int] | None:
    """The size (height, width) of powers of two nearest to a square image's, which 3D programs want.

    Args:
        size: (height, width) of the image.
        repeats: whether it is a material for sure, as it repeats, also where it is no square.

    Returns:
        None if the size is one of powers of two, or if the image is no material.
    """
    height, width = (1 << round(math.log2(side)) for side in size)
    return None if (height, width) == size or not (repeats or size[0] == size[1]) else (height, width)
