"""How to train a super-resolution step: the schema of a preset's table [sr]. Knows names, types and limits; no network."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, Self

from engine.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A super-resolution step: everything about a run but its data, its start and its seed."""

    iterations: int
    batch: int
    crop: int
    degradation: Literal["bicubic", "bsrgan"]
    flip: bool
    rotate: bool
    held_out: float

    chain: float
    reconstructions: int
    samples: int

    sigma: float
    noise: Literal["fixed", "uniform"]
    render_sigma: float
    noise_channels: int

    pixel: float
    consistency: float
    perceptual: float
    perceptual_layers: Literal["esrgan", "swinir", "forms"]
    texture: float
    detail: float
    feature_texture: float
    checkerboard: float
    adversarial: float
    gan: Literal["ragan", "vanilla", "hinge"]
    gan_from: int
    discriminator: Literal["vgg", "unet", "patch", "projected"]
    discriminator_channels: int

    learning_rate: float
    discriminator_rate: float
    betas: tuple[float, ...]
    milestones: tuple[int, ...]
    decay: float
    ema: float

    checkpoint_every: int
    store: Literal["fp16", "fp32"]

    def __post_init__(self) -> None:
        least = {"iterations": 1, "batch": 1, "crop": 8, "checkpoint_every": 1, "discriminator_channels": 1}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not (math.isfinite(value) and value >= least.get(field.name, 0)):
                raise UsageError(f"{field.name} = {value}: must be at least {least.get(field.name, 0)}")
        for name, most in (("held_out", 0.5), ("chain", 1.0), ("decay", 1.0)):
            if getattr(self, name) > most:
                raise UsageError(f"{name} = {getattr(self, name)}: must be at most {most}")
        if self.ema >= 1 or len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise UsageError(f"ema = {self.ema} and the two betas = {list(self.betas)} must lie in 0..1, below 1")

    def replace(self, **changes: Any) -> Self:  # noqa: ANN401 (each is checked by the schema)
        return dataclasses.replace(self, **changes)
