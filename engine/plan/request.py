"""Render request: one frozen dataclass that is both the Python API and the flags of the commands."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import partial
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypedDict, Unpack

from cyclopts import Parameter, Token

from engine.errors import UsageError, option
from engine.fields import describe_options
from engine.geometry import MAX_SIDE, Box, parse_box, parse_size, whole_number
from engine.pixels import DEPTHS, PROFILES
from engine.plan.halo import SEAM_TOLERANCE, HaloPolicy
from engine.plan.plan import RENAMED_EXECUTORS

AUTO = "auto"

RAMPS = ("cosine", "linear")
WRAPS = {"x": (False, True), "y": (True, False), "both": (True, True)}
"""Values of ``wrap``, and whether rows and columns wrap."""

Switch = Annotated[bool, Parameter(negative=())]
"""Type of an option that is given or not."""

MAX_BLEND = 512
MAX_SEED = (1 << 64) - 1

MAX_NOISE_GAIN = 4.0
"""Largest factor of noise channels; models have at most 2.4 (docs/decisions/0020)."""

MAX_SCALE = 64.0
"""Largest enlargement of a picture that is asked for as a factor: a network of x4, three times."""

LEAST_BYTES = 10**6
"""Least amount of memory that can be meant: smaller ones are mistaken units."""

_UNITS = {
    "b": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 1 << 10,
    "mi": 1 << 20,
    "gi": 1 << 30,
    "ti": 1 << 40,
}


def parse_bytes(text: object, name: str = "memory") -> int:
    """Parse ``2GiB``, ``1.5g`` or ``800MB`` into a number of bytes.

    Args:
        text: number with a decimal (k, m, g, t) or binary (ki, mi, gi, ti) unit, in any case; or the number of bytes itself.
        name: option to name in the error.

    Raises:
        UsageError: the text has another form or no unit, or is less than 1 MB.
    """
    if not isinstance(text, str):
        if (number := whole_number(text)) is None:
            raise UsageError(f"{option(name)}: {text!r} is not a number of bytes; give one, or a text such as 2GiB")
        return _plausible(number, name, number)
    match = re.fullmatch(r"(\d{1,30}(?:\.\d{1,30})?)\s*(b|([kmgt]i?)b?)?", text.strip().lower())
    if not match:
        raise UsageError(f"{option(name, text)}: not an amount of memory; write a number with a unit, such as 2GiB")
    if not match[2]:
        raise UsageError(
            f"{option(name, text)}: has no unit; write one, such as {text.strip()}GiB or {text.strip()}MiB"
        )
    return _plausible(int(float(match[1]) * _UNITS[match[3] or "b"]), name, text)


def _plausible(count: int, name: str, value: object) -> int:
    """The number of bytes. Raises UsageError for less than ``LEAST_BYTES``."""
    if count < LEAST_BYTES:
        raise UsageError(f"{option(name, value)}: too little to be meant (at least 1 MB); write an amount such as 2GiB")
    return count


def flag(parse: Callable[[str], object], metavar: str) -> Parameter:
    """Describe an option of one token that ``parse`` converts; ``metavar`` stands for the token in the help."""

    def convert(_type: object, tokens: Sequence[Token]) -> object:
        return parse(tokens[0].value)

    return Parameter(
        converter=convert, metavar=metavar, n_tokens=1, accepts_keys=False, negative=(), allow_leading_hyphen=True
    )


def _whole(value: object, name: str) -> int:
    if (number := whole_number(value)) is None:
        raise _wrong_type(value, name, "a whole number")
    return number


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise _wrong_type(value, name, "a number")
    return float(value)


def _switch(value: object, name: str) -> bool:
    if not isinstance(value, bool):
        raise _wrong_type(value, name, "True or False")
    return value


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise _wrong_type(value, name, "a text")
    return value


def _overlap(value: object, name: str) -> str:
    number = whole_number(value)
    return _text(value, name) if number is None else str(number)


def _tile(value: object, name: str) -> int | tuple[int, int]:
    if (side := whole_number(value)) is not None:
        if side < 1:
            raise UsageError(f"{option(name, side)}: must be at least 1 low-resolution pixel")
        return side
    try:
        width, height = parse_size(value, name)
    except UsageError as error:
        form = "a side such as 64, or WIDTHxHEIGHT such as 128x64, in low-resolution pixels"
        if isinstance(value, str):
            raise UsageError(f"{option(name, value)}: not a tile; write {form}") from error
        raise UsageError(f"{option(name)}: {value!r} is not a tile; give {form}") from error
    return width if width == height else (width, height)


def _gains(value: object, name: str) -> tuple[float, ...] | None:
    """Factors of noise channels; None where all are 1, which change nothing."""
    if isinstance(value, str):
        try:
            gains = tuple(float(part) for part in value.split(","))
        except ValueError as error:
            raise UsageError(f"{option(name, value)}: not a factor; write one, or one per step such as 1,2") from error
    elif isinstance(value, list | tuple):
        gains = tuple(_number(each, name) for each in value)
    else:
        gains = (_number(value, name),)
    for gain in gains:
        if not 0 <= gain <= MAX_NOISE_GAIN:
            raise UsageError(
                f"{option(name, f'{gain:g}')}: must be from 0 (silent) to {MAX_NOISE_GAIN:g}; give 1 to leave noise channels "
                "as they are"
            )
    return gains if any(gain != 1 for gain in gains) else None


def _path(value: object, name: str) -> Path:
    if not isinstance(value, str | os.PathLike):
        raise _wrong_type(value, name, "a path")
    return Path(value)


def _profile(value: object, name: str) -> Path | str:
    """A named profile as it is, anything else as a path."""
    return value if isinstance(value, str) and value in PROFILES else _path(value, name)


def _wrong_type(value: object, name: str, wanted: str) -> UsageError:
    return UsageError(f"{option(name)}: {value!r} is not {wanted}; give {wanted}")


_PARSERS: dict[str, Callable[[object, str], object]] = {
    "size": parse_size,
    "scale": _number,
    "width": _whole,
    "seed": _whole,
    "noise_gain": _gains,
    "init": _path,
    "roi": parse_box,
    "stages": _whole,
    "executor": _text,
    "tile": _tile,
    "overlap": _overlap,
    "blend": _whole,
    "ramp": _text,
    "dither": _switch,
    "depth": _whole,
    "profile": _profile,
    "wrap": _text,
    "seam_tolerance": _number,
    "accept_error": _switch,
    "device": _text,
    "precision": _text,
    "memory": parse_bytes,
    "vram": parse_bytes,
}
"""Check of every option of a request: (value, name of the option) -> value as it is kept."""


class RenderOptions(TypedDict, total=False):
    """Options of ``Request`` with the types that it accepts, for type checkers; ``Request`` documents them."""

    size: tuple[int, int] | str | None
    scale: float | None
    width: int | None
    seed: int
    noise_gain: float | Sequence[float] | str | None
    roi: tuple[int, int, int, int] | Box | str | None
    stages: int | None
    executor: str
    tile: int | tuple[int, int] | str | None
    overlap: str | int
    blend: int
    ramp: str
    dither: bool
    depth: int | None
    profile: Path | str | None
    wrap: str | None
    seam_tolerance: float
    accept_error: bool
    device: str | None
    precision: str
    memory: int | str | None
    vram: int | str | None


class RequestOptions(RenderOptions, total=False):
    """All options of ``Request``."""

    init: Path | str | None


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Options of a render, checked when it is made.

    Values may be written as on the command line (``size="4096x3072"``, ``roi="1000,500,512,512"``, ``memory="2GiB"``) or as
    numbers: sizes are (width, height), regions (x, y, width, height), memory is in bytes. None selects the default.

    Raises:
        UsageError: a value is out of range or unknown, or two values exclude each other.
    """

    size: Annotated[tuple[int, int] | None, flag(parse_size, "WxH")] = None
    """Size of the whole image, WIDTHxHEIGHT in pixels; default: base image times the scales of all steps. A size between
    two enlargements is reduced from the larger one."""

    scale: float | None = None
    """Enlargement of each side of a picture, 1 to 64, such as 2 or 3.5, in place of --size."""

    width: int | None = None
    """Width of the whole image in pixels, in place of --size; the height follows from the picture or the base image."""

    seed: int = 0
    """Seed of the noise, from 0 to 2^64 - 1; a seed shows the same scene at every size of one shape."""

    noise_gain: Annotated[tuple[float, ...] | None, flag(partial(_gains, name="noise_gain"), "G|G,G")] = None
    """Loudness of the networks' noise channels, 0 to 4 times that of the model: more gives more fine texture. One for all
    steps, or one per step (1,2), 1 for a step without noise channels. Neither step 1's noise nor
    that added to a step's input picture (sigma) changes."""

    init: Path | None = None
    """Picture to start from, in place of the base image that step 1 generates."""

    roi: Annotated[Box | None, flag(parse_box, "X,Y,W,H")] = None
    """Region to render, X,Y,WIDTH,HEIGHT in pixels of the whole image. Its pixels equal those of a whole render with
    --overlap exact --precision fp32; otherwise the plan says how far they may differ."""

    stages: int | None = None
    """Number of super-resolution steps, starting with step 2; default: the number that the size takes. If it is given, the
    base image fits the size, and a seed shows another scene."""

    executor: str = AUTO
    """Executor: tiles (with a halo), bands (rows, nothing computed twice), batched (tiles in batches, for a GPU; alias:
    stream) or auto (bands where the networks and the memory allow it, otherwise batched on a GPU and tiles on a CPU)."""

    tile: Annotated[int | tuple[int, int] | None, flag(partial(_tile, name="tile"), "N|WxH")] = None
    """Side of a tile without its halo, or WIDTHxHEIGHT, or width of a strip of bands, in low-resolution pixels; default: the
    tile with the least work that fits the memory."""

    overlap: str = "auto"
    """Halo of a tile: auto (smallest within the seam tolerance), exact (receptive field), erf:0.98 (effective receptive
    field, as in the paper) or a number of low-resolution pixels."""

    blend: int = 0
    """Width of the cross-fade between neighbouring tiles of the last step, 0 to 512 low-resolution pixels beyond the halo;
    not for bands."""

    ramp: str = "cosine"
    """Weight curve of the cross-fade: cosine or linear."""

    dither: Switch = False
    """Ordered dither before rounding, against banding of gradients in print."""

    depth: int | None = None
    """Bits of a sample, 8 or 16; default: those of the picture (16 for floats), and 8 without one."""

    profile: Annotated[Path | str | None, flag(partial(_profile, name="profile"), "NAME|FILE")] = None
    """Colours of the result of a picture: srgb, adobe-rgb, p3 or an ICC file of RGB, embedded in it; default: the profile of
    the picture, whose values are kept."""

    wrap: str | None = None
    """Axes along which the image repeats without a seam: x, y or both. A picture must repeat by itself."""

    seam_tolerance: float = SEAM_TOLERANCE
    """Largest seam error for an automatic halo, in 8-bit levels."""

    accept_error: Switch = False
    """Render in tiles where a network looks at the whole picture and its measured error is above --seam-tolerance."""

    device: str | None = None
    """Device: cpu, cuda, cuda:1, ...; default: a GPU if there is one."""

    precision: str = AUTO
    """Precision of the networks, fp32, bf16 or fp16, for all steps or one per step (fp32,bf16); auto: half precision where
    it is faster and its measured error is at most 0.3 levels on average and 2 levels for 99.9 % of the values."""

    memory: Annotated[int | None, flag(parse_bytes, "BYTES")] = None
    """Limit of host memory, such as 2GiB; default: half of the free memory."""

    vram: Annotated[int | None, flag(partial(parse_bytes, name="vram"), "BYTES")] = None
    """Limit of device memory, such as 8GiB; default: the free device memory."""

    if TYPE_CHECKING:

        def __init__(self, **options: Unpack[RequestOptions]) -> None: ...

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None or field.default is not None:
                object.__setattr__(self, field.name, _PARSERS[field.name](value, field.name))
        object.__setattr__(self, "executor", RENAMED_EXECUTORS.get(self.executor, self.executor))
        self._check_sizes()
        if not 0 <= self.seed <= MAX_SEED:
            raise UsageError(f"{option('seed', self.seed)}: must be from 0 to {MAX_SEED}")
        if self.depth not in (None, *DEPTHS):
            raise UsageError(f"{option('depth', self.depth)}: must be {' or '.join(map(str, DEPTHS))} bits")
        if not 0 <= self.blend <= MAX_BLEND:
            raise UsageError(
                f"{option('blend', self.blend)}: must be from 0 (no cross-fade) to {MAX_BLEND} low-resolution pixels"
            )
        if self.ramp not in RAMPS:
            raise UsageError(f"{option('ramp', self.ramp)}: unknown weight curve; use one of {', '.join(RAMPS)}")
        if self.wrap is not None and self.wrap not in WRAPS:
            raise UsageError(f"{option('wrap', self.wrap)}: unknown; use one of {', '.join(WRAPS)}")
        if self.wrap is not None and self.blend:
            raise UsageError(
                f"{option('blend', self.blend)}: stops at the sides, where {option('wrap')} would show a seam; use "
                f"{option('overlap', 'exact')} or leave one out"
            )
        _ = self.halo_policy  # raises UsageError for an unknown overlap or tolerance

    @property
    def halo_policy(self) -> HaloPolicy:
        """Policy that chooses the halo of each step from ``overlap`` and ``seam_tolerance``."""
        return HaloPolicy(self.overlap, self.seam_tolerance)

    @property
    def wraps(self) -> tuple[bool, bool]:
        """Whether the image repeats along (rows, columns)."""
        return WRAPS[self.wrap] if self.wrap is not None else (False, False)

    @property
    def core(self) -> tuple[int, int] | None:
        """(rows, columns) of a requested tile, as the planner takes it."""
        if self.tile is None or isinstance(self.tile, tuple):
            return self.tile and (self.tile[1], self.tile[0])
        return self.tile, self.tile

    def shape_for(self, native: tuple[int, int]) -> tuple[int, int] | None:
        """(height, width) of the whole image, as the planner takes it; None where no size is requested.

        Args:
            native: (height, width) of the picture, or of the base image that step 1 was trained at.
        """
        height, width = native
        if self.size is not None:
            return self.size[1], self.size[0]
        if self.width is not None:
            return max(1, round(Fraction(height * self.width, width))), self.width
        if self.scale is not None:
            return max(1, round(height * self.scale)), max(1, round(width * self.scale))
        return None

    def _check_sizes(self) -> None:
        """Raise UsageError for two sizes, or one that is out of range."""
        given = [name for name in ("size", "scale", "width") if getattr(self, name) is not None]
        if len(given) > 1:
            first, second = (option(name) for name in given[:2])
            raise UsageError(f"{first} and {second}: exclude each other; give one of them")
        if self.scale is not None and not 1 <= self.scale <= MAX_SCALE:
            raise UsageError(f"{option('scale', f'{self.scale:g}')}: must be from 1 to {MAX_SCALE:g}")
        if self.width is not None and not 1 <= self.width <= MAX_SIDE:
            raise UsageError(f"{option('width', self.width)}: must be from 1 to {MAX_SIDE} pixels")


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class PictureRequest(Request):
    """Options of a request that all pictures of a command share: the command names the pictures, and no regions of them."""

    size: Annotated[tuple[int, int] | None, flag(parse_size, "WxH")] = None
    """Size of the result, WIDTHxHEIGHT in pixels; default: the picture times the scales of the models. A size between two
    enlargements is reduced from the larger one."""

    scale: float | None = None
    """Enlargement of each side, 1 to 64, such as 2 or 3.5, in place of --size."""

    width: int | None = None
    """Width of the result in pixels, in place of --size; the height follows from the picture."""

    init: Annotated[Path | None, Parameter(parse=False)] = None
    roi: Annotated[Box | None, Parameter(parse=False)] = None
    stages: Annotated[int | None, Parameter(parse=False)] = None

    def of(self, picture: Path) -> Request:
        """The request of one picture."""
        return Request(**{field.name: getattr(self, field.name) for field in fields(Request)} | {"init": picture})


describe_options(Request, RequestOptions)
