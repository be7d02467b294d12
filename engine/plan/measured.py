"""What was measured about a stage, as plain data, and how a halo follows from it. Knows nothing of tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class SeamPoint:
    """Error of a tile against the whole image when ``halo`` LR pixels are cut away, in 8-bit levels.

    ``mean`` and ``p999`` are taken over the two LR pixels next to the cut, ``max`` over the whole core.
    """

    halo: int
    mean: float
    p999: float
    max: float


@dataclass(frozen=True, slots=True)
class StageProfile:
    """Everything ``engine probe`` measured about one stage. Radii are one-sided, in LR pixels.

    ``erf_abs`` and ``erf_square`` map an energy fraction ("0.98") to the radius of the disc that holds it, for the two
    definitions of the gradient's magnitude; a fraction that the probe's crop could not hold is absent.
    """

    content: str
    erf_abs: dict[str, int]
    erf_square: dict[str, int]
    seam: tuple[SeamPoint, ...]

    def halo_within(self, tolerance: float) -> SeamPoint | None:
        """Smallest measured halo whose largest error is at most ``tolerance`` levels."""
        return next((p for p in self.seam if p.max <= tolerance), None)

    def at(self, halo: int) -> SeamPoint | None:
        """The measured point with the largest halo up to ``halo``: an upper bound of the error there."""
        return max((p for p in self.seam if p.halo <= halo), key=lambda p: p.halo, default=None)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> StageProfile:
        """Raises KeyError, TypeError or ValueError when the data is damaged."""
        absolute, square = ({str(f): int(r) for f, r in dict(data[key]).items()} for key in ("erf_abs", "erf_square"))
        points = [SeamPoint(int(p["halo"]), *(float(p[key]) for key in ("mean", "p999", "max"))) for p in data["seam"]]
        if any(p.halo < 0 for p in points):
            raise ValueError("a halo is negative")
        return cls(str(data["content"]), absolute, square, tuple(points))


PRECISION_MEAN, PRECISION_P999 = 0.3, 2.0
"""Default tolerance of ``--precision auto`` against float32, in levels of 255."""


@dataclass(frozen=True, slots=True)
class PrecisionError:
    """How far a chain of stages in half precision is from one in float32, in 8-bit levels."""

    mean: float
    p999: float
    max: float

    @property
    def tolerable(self) -> bool:
        return self.mean <= PRECISION_MEAN and self.p999 <= PRECISION_P999


@dataclass(frozen=True, slots=True)
class Footprint:
    """Measured cost of running a network on a square tile of n LR pixels: bytes = fixed + per_pixel * n.

    Two warm-up shapes give the line. ``seconds_per_pixel`` comes from the larger one, after its first run.
    """

    fixed: int
    per_pixel: float
    seconds_per_pixel: float

    def bytes_at(self, pixels: int) -> int:
        return int(self.fixed + self.per_pixel * pixels)
