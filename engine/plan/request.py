"""What a user can ask of a render: one dataclass that is both the API and the flags of the commands."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter, Token

from engine.errors import UsageError
from engine.geometry import Box
from engine.plan.halo import SEAM_TOLERANCE, HaloPolicy

Size = tuple[int, int]

AUTO = "auto"
EXECUTORS = (AUTO, "tiles", "bands", "stream")
RAMPS = ("cosine", "linear")
MOST_BLEND = 512

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
    """ "4096x3072" (width x height) -> (height, width)."""
    match = re.fullmatch(r"(\d+)[xX](\d+)", text)
    if not match or not all(int(n) for n in match.groups()):
        raise UsageError(f"size '{text}': write WIDTHxHEIGHT in pixels, for instance 4096x3072")
    return int(match[2]), int(match[1])


def parse_box(text: str) -> Box:
    """ "x,y,w,h" -> Box."""
    if not re.fullmatch(r"\d+,\d+,\d+,\d+", text):
        raise UsageError(
            f"region '{text}': write X,Y,WIDTH,HEIGHT in pixels of the whole canvas, for instance 1000,500,512,512"
        )
    x, y, width, height = (int(n) for n in text.split(","))
    return Box(y, x, y + height, x + width)


def parse_bytes(text: str) -> int:
    """ "2GiB", "1.5g", "800MB" -> bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    count = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if not count:
        raise UsageError(f"memory '{text}': write a number with a unit, for instance 2GiB or 800MB")
    return count


def _converter(parse: Any) -> Any:  # noqa: ANN401
    def convert(_type: object, tokens: Sequence[Token]) -> object:
        return parse(tokens[0].value)

    return convert


def _flag(parse: Any, metavar: str, help_text: str) -> Parameter:  # noqa: ANN401
    return Parameter(
        converter=_converter(parse), metavar=metavar, n_tokens=1, accepts_keys=False, negative=(), help=help_text
    )


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Sizes are (height, width), memory is in bytes; None means: choose."""

    size: Annotated[Size | None, _flag(parse_size, "WxH", "Size of the image, WIDTHxHEIGHT in pixels.")] = None
    seed: Annotated[int, Parameter(help="Which image: every seed gives another one.")] = 0
    init: Annotated[Path | None, Parameter(help="Start from this picture instead of step 1.")] = None
    roi: Annotated[
        Box | None, _flag(parse_box, "X,Y,W,H", "Render only X,Y,WIDTH,HEIGHT of the canvas; the same pixels.")
    ] = None
    stages: Annotated[int | None, Parameter(help="Number of super-resolution stages; by default the size decides.")] = (
        None
    )
    executor: Annotated[
        str,
        Parameter(
            help="tiles (core and halo), bands (rows; computes nothing twice), stream (tiles in batches, for a GPU), or auto: "
            "stream on a GPU, else bands where they can be had."
        ),
    ] = AUTO
    tile: Annotated[
        int | None,
        Parameter(
            help="Tile core, or width of a strip of bands, in low-resolution pixels; by default the memory decides."
        ),
    ] = None
    overlap: Annotated[
        str,
        Parameter(help="auto (smallest halo within the tolerance), exact, erf:0.98 (the paper) or a number of pixels."),
    ] = "auto"
    blend: Annotated[
        int,
        Parameter(
            help="Let neighbouring tiles of the last stage fade into each other over so many low-resolution pixels, their halo "
            "besides; tiles and stream only, as bands have no seams but a strip's."
        ),
    ] = 0
    ramp: Annotated[str, Parameter(help="How they fade: cosine or linear.")] = "cosine"
    dither: Annotated[
        bool, Parameter(negative=(), help="Ordered dither before values are rounded to 8 bits: for gradients in print.")
    ] = False
    seam_tolerance: Annotated[float, Parameter(help="For auto: largest seam error in levels of 255.")] = SEAM_TOLERANCE
    device: Annotated[str | None, Parameter(help="cpu, cuda, cuda:1, ...; by default a GPU when there is one.")] = None
    precision: Annotated[
        str,
        Parameter(
            help="fp32, bf16 or fp16, for all stages or one for each (fp32,bf16); auto: half precision from the stage on "
            "where its measured error stays within 0.3 levels on average and 2 levels for 99.9 %, if that is faster."
        ),
    ] = AUTO
    memory: Annotated[
        int | None,
        _flag(parse_bytes, "BYTES", "Memory the process may take, such as 2GiB; by default half of what is free."),
    ] = None
    vram: Annotated[int | None, _flag(parse_bytes, "BYTES", "Device memory it may take; by default what is free.")] = (
        None
    )

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 64:
            raise UsageError(f"--seed {self.seed}: must be from 0 to {(1 << 64) - 1}")
        if self.executor not in EXECUTORS:
            raise UsageError(f"--executor {self.executor}: use one of {', '.join(EXECUTORS)}")
        if self.tile is not None and self.tile < 1:
            raise UsageError(f"--tile {self.tile}: needs at least 1 low-resolution pixel")
        if not 0 <= self.blend <= MOST_BLEND:
            raise UsageError(f"--blend {self.blend}: needs 0 (no blending) to {MOST_BLEND} low-resolution pixels")
        if self.blend and self.executor == "bands":
            raise UsageError(
                f"--blend {self.blend}: bands have no tiles to blend; use --executor tiles, or leave it out"
            )
        if self.ramp not in RAMPS:
            raise UsageError(f"--ramp {self.ramp}: use one of {', '.join(RAMPS)}")
        _ = self.halo_policy

    @property
    def halo_policy(self) -> HaloPolicy:
        return HaloPolicy(self.overlap, self.seam_tolerance)
