"""Requests for trainings of super-resolution networks: the part that all of them share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from engine.device.precision import Precision
from engine.training.run.precision import check_precision
from engine.training.sr.networks import Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRequest:
    """Initial network, precision and seed. Raises UsageError for an unknown precision."""

    start: str = "realsr"
    """Initial weights: packaged weights, a file or "scratch"."""
    shape: Shape = field(default_factory=Shape)
    """Size of the network, if it is smaller than that of the initial weights or starts from scratch."""
    precision: Precision = "bf16"
    """Precision of the computing networks."""
    seed: int = 0
    """Seed of fresh weights, crops and noise."""

    def __post_init__(self) -> None:
        check_precision(self.precision)


@dataclass(frozen=True, slots=True, kw_only=True)
class PhotoTrainingRequest(TrainingRequest):
    """Request for a training on one photograph."""

    vgg: Path | None = None
    """Weights of VGG-19 or VGG-16; None: torchvision's file, if a loss needs it."""
    licence: str = ""
    """Licence of the photograph, recorded in the weights file."""
    source: str = ""
    """Author and origin of the photograph, recorded in the weights file."""
