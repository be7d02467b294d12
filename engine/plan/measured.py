"""Measurements that a plan follows from, as frozen data. Knows nothing of tensors."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from engine.geometry import PictureTiles
from engine.pixels import PLAIN, PixelFormat
from engine.plan.canvas import Canvas
from engine.plan.limits import SATURATING

PRECISION_MEAN = 0.3
"""Tolerance of the automatic precision: mean error against float32, in levels of 255."""

PRECISION_P999 = 2.0
"""Tolerance of the automatic precision: 99.9th percentile of the error against float32, in levels of 255."""


Reach: TypeAlias = Literal["local", "statistics", "whole"]
"""How far a network looks: as far as its receptive field, at the whole picture through small statistics, or at all of it."""


@dataclass(frozen=True, slots=True)
class SeamPoint:
    """Error of a tile against the whole image at one halo, in levels of 255."""

    halo: int
    """Context that was cut away, in LR pixels."""
    mean: float
    """Mean over the two LR pixels next to the cut."""
    p999: float
    """99.9th percentile over the two LR pixels next to the cut."""
    max: float
    """Largest error of the whole tile."""


@dataclass(frozen=True, slots=True)
class StageProfile:
    """Receptive field and seam errors of a stage. Radii are one-sided, in LR pixels."""

    content: str
    """Description of the pictures that were measured on."""
    erf_abs: dict[str, int]
    """Energy fraction ("0.98") -> radius of the disc that holds it, for the absolute gradient.

    A fraction that the probe's crop could not hold is absent.
    """
    erf_square: dict[str, int]
    """The same for the squared gradient, the paper's definition."""
    seam: tuple[SeamPoint, ...]
    """Seam errors, smallest halo first; where there are statistics, with those of the whole content as constants."""
    statistics: int = 0
    """Operations that look at the whole picture through a small statistic, such as an average."""
    is_local: bool = True
    """Whether the far part of a picture changes nothing, with these statistics as constants."""

    @property
    def reach(self) -> Reach:
        """How far the network looks."""
        return "whole" if not self.is_local else "statistics" if self.statistics else "local"

    def halo_within(self, tolerance: float) -> SeamPoint | None:
        """Point of the smallest measured halo whose largest error is at most ``tolerance`` levels."""
        return next((p for p in self.seam if p.max <= tolerance), None)

    def at(self, halo: int) -> SeamPoint | None:
        """Point of the largest measured halo up to ``halo``: an upper bound of the error there."""
        return max((p for p in self.seam if p.halo <= halo), key=lambda p: p.halo, default=None)

    def to_json(self) -> dict[str, Any]:
        """The profile as it is stored in model files and caches."""
        values = asdict(self)
        if self.reach == "local":  # as in the files of earlier versions
            del values["statistics"], values["is_local"]
        return values

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> StageProfile:
        """The profile of its stored form. Raises KeyError, TypeError or ValueError when the data is damaged."""
        absolute, square = ({str(f): int(r) for f, r in dict(data[key]).items()} for key in ("erf_abs", "erf_square"))
        points = [SeamPoint(int(p["halo"]), *(float(p[key]) for key in ("mean", "p999", "max"))) for p in data["seam"]]
        if any(p.halo < 0 for p in points):
            raise ValueError("a halo is negative")
        looks = int(data.get("statistics", 0)), bool(data.get("is_local", True))
        return cls(str(data["content"]), absolute, square, tuple(points), *looks)


@dataclass(frozen=True, slots=True)
class WholeError:
    """Error of tiles against the whole picture, for a network that looks at all of it, in levels of 255."""

    mean: float
    max: float
    shape: tuple[int, int]
    """(height, width) of the part of the picture that was measured, in LR pixels."""
    halo: int
    """Halo of the tiles."""


@dataclass(frozen=True, slots=True)
class PrecisionError:
    """Error of a chain of stages in half precision against float32, in levels of 255."""

    mean: float
    p999: float
    """99.9th percentile."""
    max: float

    @property
    def tolerable(self) -> bool:
        """Whether the automatic precision accepts the error."""
        return self.mean <= PRECISION_MEAN and self.p999 <= PRECISION_P999


@dataclass(frozen=True, slots=True)
class Footprint:
    """Cost of running a network on a square tile of n LR pixels: fixed + per_pixel * n bytes, linear in time."""

    fixed: int
    """Bytes that do not depend on the tile."""
    per_pixel: float
    """Bytes for each LR pixel."""
    seconds_per_pixel: float
    """Seconds for each LR pixel, after the first run."""

    def bytes_at(self, lr_pixels: int) -> int:
        """Bytes of a tile of ``lr_pixels`` LR pixels."""
        return int(self.fixed + self.per_pixel * lr_pixels)


@dataclass(frozen=True, slots=True)
class BandCost:
    """Cost of streaming a network in bands. Temporary buffers are bounded in wide strips and grow in narrow ones."""

    band: int
    """Rows of a band, in LR pixels."""
    bytes_per_column: float
    """Bytes for each LR column of a wide strip."""
    seconds_per_pixel: float
    """Seconds for each LR pixel."""
    fixed: int = 0
    """Bytes of a wide strip that do not depend on its width."""
    narrow_bytes_per_column: float = math.inf
    """Bytes for each LR column of a narrow strip."""
    beyond: float | None = None
    """LR rows that a band computes above the needed ones, or below them, on average; None: half a band."""
    context: float | None = None
    """LR rows above the first output row that operations compute, or below the last one, on average; None: half the radius."""

    def bytes_at(self, columns: int) -> int:
        """Bytes of a strip of ``columns`` LR columns."""
        return int(min(self.narrow_bytes_per_column * columns, self.fixed + self.bytes_per_column * columns))


@dataclass(frozen=True, slots=True)
class Fallback:
    """Memory of a stage in float32 on an accelerator: a tile or row of shards that half precision cannot represent."""

    weights: int
    """Bytes of the weights, which come beside those in half precision."""
    tiles: Footprint
    """Memory of tiles, counted; no time."""
    bands: BandCost | None
    """Memory of bands, counted; None if the network cannot be streamed or bands are not considered."""


class MissingMeasurement(Exception):  # noqa: N818 (no error: the measurement is made, and the plan asked for again)
    """A plan needs a measurement that was not made yet.

    Plans that need few measurements are then made after few: bands in one strip need neither halos nor the cost of tiles.
    """

    def __init__(self, kind: Literal["tile costs", "profiles", "statistics"]) -> None:
        super().__init__(kind)
        self.kind = kind


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredStage:
    """One super-resolution step: properties of its network, and its cost on this machine."""

    scale: int
    """Enlargement."""
    align: int
    """Grid of tile origins, in LR pixels."""
    radius: int
    """Theoretical receptive field: one-sided, in LR pixels."""
    inputs: int = 3
    """Channels of the input: the picture and the noise channels."""
    sigma: float = 0.0
    """Standard deviation of the input noise."""
    tiles: Footprint | None = None
    """Cost of tiles; None if it was not measured yet."""
    bands: BandCost | None = None
    """Cost of bands; None if the network cannot be streamed or bands are not considered."""
    on_device: bool = False
    """Whether the network's memory is that of an accelerator."""
    fp32: Fallback | None = None
    """Memory of the stage in float32 beside half precision; None in float32, and where no accelerator's memory is planned."""
    profile: StageProfile | None = None
    """Receptive field and seam errors; None if they were not measured yet."""
    statistics: str = ""
    """Digest of the recorded statistics; empty if there are none, or if they were not recorded yet."""
    whole_error: WholeError | None = None
    """Error of tiles against the whole picture; None if it was not measured."""

    @property
    def reach(self) -> Reach:
        """How far the network looks, if it was measured."""
        return self.profile.reach if self.profile is not None else "local"

    @property
    def footprint(self) -> Footprint:
        """Cost of tiles. Raises MissingMeasurement when it was not measured yet."""
        if self.tiles is None:
            raise MissingMeasurement("tile costs")
        return self.tiles


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits in bytes."""

    host: int
    """Resident memory of the process."""
    device: int | None
    """Memory of the accelerator; None without one."""
    disk: int
    """Free disk at the output, or at the cache for a store that lies elsewhere."""
    holds_store: bool = True
    """Whether the store lies on that disk; spilled tiles always do."""

    @property
    def networks(self) -> int:
        """Limit of the memory that networks run in: the accelerator's, or the host's."""
        return self.host if self.device is None else self.device


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Facts about a model, a request and a machine from which ``engine.plan.make.make_plan`` makes a plan."""

    canvas: Canvas
    """Size of the image, and the base image that leads to it."""
    stages: tuple[MeasuredStage, ...]
    """Super-resolution steps, first step first."""
    base: Footprint | None
    """Cost of step 1 on the host; None if a picture replaces it."""
    baseline: int
    """Resident bytes of the idle process with the model loaded."""
    measuring: int = 0
    """Peak of the process's resident bytes while it measured; 0 if an earlier peak was higher."""
    device_baseline: int = 0
    """Bytes of the accelerator that are taken before the work."""
    budget: Budget
    """Limits of memory, VRAM and disk."""
    precisions: tuple[str, ...]
    """Precision of every stage."""
    precision_error: PrecisionError | None = None
    """Error of the chain against float32; None if all stages run in float32, or if it was not measured."""
    device: str = "cpu"
    """Type of the device."""
    saturating: int = SATURATING
    """LR pixels that occupy the whole accelerator, to which small tiles are batched."""
    backend: str = "cpu"
    """Device type and version of torch, as the plan records it."""
    model_digest: str = ""
    """SHA-256 of the model's contents that decide pixels."""
    noise_gain: tuple[float, ...] = ()
    """Factor of every step's noise channels, which that model has not; empty if all are 1."""
    picture_digest: str | None = None
    """SHA-256 of the picture that replaces step 1."""
    picture_bytes: int = 0
    """Bytes of a pixel of that picture while it is read, in rows or regions; 0 without a picture."""
    picture_tiles: PictureTiles | None = None
    """Tiles of that picture; None where it has none, or is decoded as a whole."""
    pixels: PixelFormat = PLAIN
    """Channels and depth of the image."""
    profile: str | None = None
    """SHA-256 of the ICC profile of its colours; None for sRGB, and for grey without a profile."""

    @property
    def is_direct(self) -> bool:
        """Whether the last step's rounded output is the image."""
        return self.canvas.reduction.is_identity and self.pixels.is_plain
