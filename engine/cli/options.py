"""Options that several commands share: about paper, and of all trainings of super-resolution. Holds no tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from cyclopts import Parameter, Token

from engine.device.precision import Precision
from engine.errors import UsageError, option
from engine.plan.print_size import pixels_of_print
from engine.plan.request import Request, parse_bytes


def _parse_bytes(_type: object, tokens: Sequence[Token]) -> int:
    return parse_bytes(tokens[0].value)


BYTES = Parameter(converter=_parse_bytes, metavar="BYTES", n_tokens=1, accepts_keys=False, negative=())
"""An amount of memory, such as 2GiB."""


Format = Literal["png", "jpg", "webp", "tif", "ome.tif", "zarr"]
"""Format of the files of a folder, by their suffix."""

_RequestT = TypeVar("_RequestT", bound=Request)


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class PrintOptions:
    """Options about paper. The docstring of a field is also the help of its flag."""

    dpi: float | None = None
    """Resolution for print in dots per inch, recorded in a picture; default: that of the picture to enlarge, or 300."""

    width_mm: float | None = None
    """Width of the print in millimetres, in place of --size: with --dpi, it gives the width in pixels."""

    @property
    def is_given(self) -> bool:
        """Whether the user thinks of a print."""
        return self.dpi is not None or self.width_mm is not None

    def sized(self, request: _RequestT) -> _RequestT:
        """The request with the width of the print. Raises UsageError for an impossible print, or another size beside it."""
        if self.dpi is not None and not (math.isfinite(self.dpi) and self.dpi > 0):
            raise UsageError(f"{option('dpi', f'{self.dpi:g}')}: must be above 0; give 150 to 300")
        if self.width_mm is None:
            return request
        if given := [name for name in ("size", "scale", "width") if getattr(request, name) is not None]:
            raise UsageError(f"{option('width_mm')} and {option(given[0])}: exclude each other; give one of them")
        return replace(request, width=pixels_of_print(self.width_mm, self.dpi))


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of a training of super-resolution. The docstring of a field is also the help of its flag."""

    preset: str | None = None
    """Preset: quick, quick-vgg or paper, see engine train preset; default: quick-vgg if VGG weights are found, else quick."""

    config: Path | None = None
    """Edited preset (a TOML file), in place of --preset."""

    iterations: int | None = None
    """Iterations of each super-resolution step, in place of the preset's."""

    start: str = "realsr"
    """Initial weights: realsr, x4plus, a checkpoint, a model file (its weights of the same step), or scratch."""

    architecture: Literal["rrdbnet", "swinir"] | None = None
    """Architecture of a start from scratch; default: rrdbnet."""

    channels: int | None = None
    """Channels of a start from scratch; default: 64 (rrdbnet) or 180 (swinir)."""

    blocks: int | None = None
    """Blocks of the network: of a start from scratch, or evenly spaced blocks of the initial weights; default: all."""

    device: str | None = None
    """Device: cpu, cuda, ...; default: a GPU if there is one."""

    precision: Precision = "bf16"
    """Precision of the networks."""

    memory: Annotated[int | None, BYTES] = None
    """Memory that an iteration on the CPU may take, such as 2GiB; default: most of the free memory."""

    vram: Annotated[int | None, BYTES] = None
    """GPU memory that an iteration may take; default: most of the free memory."""

    seed: int = 0
    """Seed of fresh weights, crops and noise."""

    resume: Annotated[bool, Parameter(negative=())] = False
    """Continue from the last checkpoint, if there is one; parts that have not begun may get other settings."""

    overwrite: Annotated[bool, Parameter(negative=())] = False
    """Replace an existing output file."""

    tensorboard: Path | None = None
    """Folder for TensorBoard files."""
