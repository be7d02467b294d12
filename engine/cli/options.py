"""What every training of super-resolution can be asked: the flags that its commands share. Holds no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter, Token

from engine.device.precision import Precision
from engine.plan.request import parse_bytes


def _bytes(_type: object, tokens: Sequence[Token]) -> int:
    return parse_bytes(tokens[0].value)


def _bytes_flag(text: str) -> Parameter:
    return Parameter(converter=_bytes, metavar="BYTES", n_tokens=1, accepts_keys=False, negative=(), help=text)


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Memory is in bytes; None means: choose."""

    preset: Annotated[
        str | None,
        Parameter(help="quick, quick-vgg (default where VGG weights are) or paper; see engine train preset."),
    ] = None
    config: Annotated[Path | None, Parameter(help="An edited preset as a TOML file, instead of --preset.")] = None
    iterations: Annotated[int | None, Parameter(help="Of super-resolution, instead of the preset's.")] = None
    start: Annotated[
        str,
        Parameter(
            help="First weights: realsr, x4plus, a checkpoint, a model file (its enlargement of this step), or scratch."
        ),
    ] = "realsr"
    architecture: Annotated[Literal["rrdbnet", "swinir"] | None, Parameter(help="Of a start from scratch.")] = None
    channels: Annotated[int | None, Parameter(help="Of a start from scratch.")] = None
    blocks: Annotated[
        int | None, Parameter(help="Of a start from scratch; of trained weights evenly spaced ones are kept.")
    ] = None
    device: Annotated[str | None, Parameter(help="cpu, cuda, ...; by default a GPU when there is one.")] = None
    precision: Annotated[Precision, Parameter(help="Precision of the networks.")] = "bf16"
    memory: Annotated[
        int | None,
        _bytes_flag("Memory that an iteration on the CPU may take, such as 2GiB; by default most of what is free."),
    ] = None
    vram: Annotated[int | None, _bytes_flag("The same of a GPU's memory.")] = None
    seed: Annotated[int, Parameter(help="Seed of crops and noise.")] = 0
    resume: Annotated[bool, Parameter(negative=(), help="Go on from the last checkpoint, if there is one.")] = False
    tensorboard: Annotated[Path | None, Parameter(help="Also write TensorBoard's files into this folder.")] = None
