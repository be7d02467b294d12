"""Recipe of a super-resolution step: the schema of a preset's table [sr]."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, Self

from engine.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All values of a training of a super-resolution step except its data, initial weights and seed.

    Raises:
        UsageError: a value is out of range.
    """

    iterations: int
    """Number of iterations."""
    batch: int
    """Crops in a batch."""
    crop: int
    """Side of an HR crop, pixels."""
    degradation: Literal["bicubic", "bsrgan"]
    """Reduction of the photograph's crops."""
    flip: bool
    """Mirror crops left and right at random."""
    rotate: bool
    """Rotate crops by quarter turns at random."""
    held_out: float
    """Share of the photograph's width, at its right edge, for validation only."""

    chain: float
    """Share of a batch that comes from simulated inputs."""
    reconstructions: int
    """Simulated inputs that resemble the photograph."""
    samples: int
    """Simulated inputs of random codes."""

    sigma: float
    """Standard deviation of the input noise in training, of pixel values in [0, 1]."""
    noise: Literal["fixed", "uniform"]
    """"fixed": always ``sigma``; "uniform": drawn from 0 to ``sigma`` for each crop."""
    render_sigma: float
    """Standard deviation of the input noise in a render, recorded in the weights."""
    noise_channels: int
    """Noise channels of a network whose initial weights have none."""

    pixel: float
    """Weight of the L1 difference of photograph pairs."""
    consistency: float
    """Weight of the L1 difference of reduced crops."""
    perceptual: float
    """Weight of the L1 difference of VGG's feature maps."""
    perceptual_layers: Literal["esrgan", "swinir", "forms"]
    """Layers of the perceptual loss, see ``PERCEPTUAL``."""
    texture: float
    """Weight of the sliced Wasserstein distance of patches."""
    detail: float
    """Weight of the relative distance of fine texture."""
    feature_texture: float
    """Weight of the sliced Wasserstein distance of VGG's feature vectors."""
    checkerboard: float
    """Weight of the unevenness of texture over the pixels made of one."""
    adversarial: float
    """Weight of the adversarial loss."""
    gan: Literal["ragan", "vanilla", "hinge"]
    """Kind of the adversarial loss."""
    gan_from: int
    """First iteration with the adversarial loss."""
    discriminator: Literal["vgg", "unet", "patch", "projected"]
    """Architecture of the discriminator."""
    discriminator_channels: int
    """Narrowest width of the discriminator."""

    learning_rate: float
    """Learning rate of the generator."""
    discriminator_rate: float
    """Learning rate of the discriminator."""
    betas: tuple[float, ...]
    """Decay of the two moments of both Adams."""
    milestones: tuple[int, ...]
    """Iterations at which both learning rates are multiplied by ``decay``."""
    decay: float
    """Factor of the learning rates at a milestone."""
    ema: float
    """Decay of the EMA of the weights, which is written."""

    checkpoint_every: int
    """Iterations between checkpoints."""
    store: Literal["fp16", "fp32"]
    """Precision of the written weights."""

    def __post_init__(self) -> None:
        least = {"iterations": 1, "batch": 1, "crop": 8, "checkpoint_every": 1, "discriminator_channels": 1}
        for field in dataclasses.fields(self):
            value, minimum = getattr(self, field.name), least.get(field.name, 0)
            if isinstance(value, int | float) and not (math.isfinite(value) and value >= minimum):
                raise UsageError(f"{field.name} = {value}: out of range; use a finite number of at least {minimum}")
        for name, maximum in (("held_out", 0.5), ("chain", 1.0), ("decay", 1.0)):
            if getattr(self, name) > maximum:
                raise UsageError(f"{name} = {getattr(self, name)}: out of range; use at most {maximum}")
        if self.ema >= 1:
            raise UsageError(f"ema = {self.ema}: out of range; use a number from 0 to below 1")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UsageError(f"betas = {list(self.betas)}: out of range; use two numbers from 0 to below 1")

    def replace(self, **changes: Any) -> Self:  # noqa: ANN401 (checked by __post_init__)
        """The recipe with other values."""
        return dataclasses.replace(self, **changes)
