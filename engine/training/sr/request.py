"""What every training of super-resolution asks for alike."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from engine.device.precision import Precision
from engine.training.run.precision import known_precision
from engine.training.sr.networks import Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Common:
    """`start`: packaged weights, a file or "scratch"; `shape` makes that network smaller, or is its size."""

    start: str = "realsr"
    shape: Shape = field(default_factory=Shape)
    precision: Precision = "bf16"
    seed: int = 0

    def __post_init__(self) -> None:
        known_precision(self.precision)


@dataclass(frozen=True, slots=True, kw_only=True)
class OfPhotograph(Common):
    """On one photograph, whose `licence` and `source` the weights tell. `vgg`: a file with the weights of VGG-19 or VGG-16."""

    vgg: Path | None = None
    licence: str = ""
    source: str = ""
