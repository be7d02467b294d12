"""Render request: one frozen dataclass that is both the Python API and the flags of the commands."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter, Token

from engine.errors import UsageError, option
from engine.geometry import Box
from engine.plan.halo import SEAM_TOLERANCE, HaloPolicy
from engine.plan.plan import RENAMED_EXECUTORS

Size = tuple[int, int]

AUTO = "auto"
RAMPS = ("cosine", "linear")
MAX_BLEND = 512
MAX_SEED = (1 << 64) - 1

_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 1 << 10,
    "mi": 1 << 20,
    "gi": 1 << 30,
    "ti": 1 << 40,
}


def parse_size(text: str) -> Size:
    """Parse ``4096x3072`` (width x height) into (height, width).

    Raises:
        UsageError: the text has another form, or a side is 0.
    """
    match = re.fullmatch(r"(\d+)[xX](\d+)", text)
    if not match or not all(int(n) for n in match.groups()):
        raise UsageError(f"{option('size', text)}: not a size; write WIDTHxHEIGHT in pixels, such as 4096x3072")
    return int(match[2]), int(match[1])


def parse_box(text: str) -> Box:
    """Parse ``x,y,width,height`` into a box.

    Raises:
        UsageError: the text has another form.
    """
    if not re.fullmatch(r"\d+,\d+,\d+,\d+", text):
        raise UsageError(
            f"{option('roi', text)}: not a region; write X,Y,WIDTH,HEIGHT in pixels of the whole image, such as 1000,500,512,512"
        )
    x, y, width, height = (int(n) for n in text.split(","))
    return Box(y, x, y + height, x + width)


def parse_bytes(text: str, name: str = "memory") -> int:
    """Parse ``2GiB``, ``1.5g`` or ``800MB`` into a number of bytes.

    Args:
        text: number with an optional decimal (k, m, g, t) or binary (ki, mi, gi, ti) unit, in any case.
        name: option to name in the error.

    Raises:
        UsageError: the text has another form, or is less than one byte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    count = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if not count:
        raise UsageError(f"{option(name, text)}: not an amount of memory; write a number with a unit, such as 2GiB")
    return count


def flag(parse: Callable[[str], object], metavar: str) -> Parameter:
    """Describe an option of one token that ``parse`` converts; ``metavar`` stands for the token in the help."""

    def convert(_type: object, tokens: Sequence[Token]) -> object:
        return parse(tokens[0].value)

    return Parameter(
        converter=convert, metavar=metavar, n_tokens=1, accepts_keys=False, negative=(), allow_leading_hyphen=True
    )


_PARSERS: dict[str, Callable[[str], object]] = {
    "size": parse_size,
    "roi": parse_box,
    "memory": parse_bytes,
    "vram": partial(parse_bytes, name="vram"),
    "init": Path,
}


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Options of a render.

    The docstring of a field is also the help of its flag. In Python, sizes are (height, width), regions are ``Box``, memory
    is in bytes, and None selects the default. Texts as on the command line are accepted too: ``size="4096x3072"``,
    ``roi="1000,500,512,512"``, ``memory="2GiB"``, ``init="photo.jpg"``.

    Raises:
        UsageError: a value is out of range or unknown, or two values exclude each other.
    """

    size: Annotated[Size | None, flag(parse_size, "WxH")] = None
    """Size of the whole image, WIDTHxHEIGHT in pixels; default: base image times the scales of all steps."""

    seed: int = 0
    """Seed of the noise, from 0 to 2^64 - 1; each seed gives another image."""

    init: Path | None = None
    """Picture to start from, in place of the base image that step 1 generates."""

    roi: Annotated[Box | None, flag(parse_box, "X,Y,W,H")] = None
    """Region to render, X,Y,WIDTH,HEIGHT in pixels of the whole image. Its pixels equal those of a whole render with
    --overlap exact --precision fp32; otherwise the plan says how far they may differ."""

    stages: int | None = None
    """Number of super-resolution steps, starting with step 2; default: the number that suits the size."""

    executor: str = AUTO
    """Executor: tiles (with a halo), bands (rows, nothing computed twice), batched (tiles in batches, for a GPU; alias:
    stream) or auto (batched on a GPU, otherwise bands where the networks allow it)."""

    tile: int | None = None
    """Side of a tile without its halo, or width of a strip of bands, in low-resolution pixels; default: the largest that
    fits the memory."""

    overlap: str = "auto"
    """Halo of a tile: auto (smallest within the seam tolerance), exact (receptive field), erf:0.98 (effective receptive
    field, as in the paper) or a number of low-resolution pixels."""

    blend: int = 0
    """Width of the cross-fade between neighbouring tiles of the last step, 0 to 512 low-resolution pixels beyond the halo;
    not for bands."""

    ramp: str = "cosine"
    """Weight curve of the cross-fade: cosine or linear."""

    dither: Annotated[bool, Parameter(negative=())] = False
    """Ordered dither before rounding to 8 bits, against banding of gradients in print."""

    seam_tolerance: float = SEAM_TOLERANCE
    """Largest seam error for an automatic halo, in 8-bit levels."""

    device: str | None = None
    """Device: cpu, cuda, cuda:1, ...; default: a GPU if there is one."""

    precision: str = AUTO
    """Precision of the networks, fp32, bf16 or fp16, for all steps or one per step (fp32,bf16); auto: half precision where
    it is faster and its measured error is at most 0.3 levels on average and 2 levels for 99.9 % of the values."""

    memory: Annotated[int | None, flag(parse_bytes, "BYTES")] = None
    """Limit of host memory, such as 2GiB; default: half of the free memory."""

    vram: Annotated[int | None, flag(partial(parse_bytes, name="vram"), "BYTES")] = None
    """Limit of device memory, such as 8GiB; default: the free device memory."""

    def __post_init__(self) -> None:
        for name, parse in _PARSERS.items():  # Python callers may write a value as the command line does
            if isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, parse(value))
        if type(self.seed) is not int:
            raise UsageError(f"{option('seed', self.seed)}: must be a whole number")
        object.__setattr__(self, "executor", RENAMED_EXECUTORS.get(self.executor, self.executor))
        if not 0 <= self.seed <= MAX_SEED:
            raise UsageError(f"{option('seed', self.seed)}: must be from 0 to {MAX_SEED}")
        if self.tile is not None and self.tile < 1:
            raise UsageError(f"{option('tile', self.tile)}: must be at least 1 low-resolution pixel")
        if not 0 <= self.blend <= MAX_BLEND:
            raise UsageError(
                f"{option('blend', self.blend)}: must be from 0 (no cross-fade) to {MAX_BLEND} low-resolution pixels"
            )
        if self.ramp not in RAMPS:
            raise UsageError(f"{option('ramp', self.ramp)}: unknown weight curve; use one of {', '.join(RAMPS)}")
        _ = self.halo_policy  # raises UsageError for an unknown overlap or tolerance

    @property
    def halo_policy(self) -> HaloPolicy:
        """Policy that chooses the halo of each step from ``overlap`` and ``seam_tolerance``."""
        return HaloPolicy(self.overlap, self.seam_tolerance)
