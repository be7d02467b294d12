"""Recipe of step 1: the schema of a preset's table [structure]."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Self

from engine.archs.hpvaegan import Config, Padding
from engine.errors import UsageError
from engine.training.structure.losses import DiscriminatorKind, LossWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class StructureRecipe:
    """All values of a training of step 1 except the photograph and the seed.

    Raises:
        UsageError: a value is out of range.
    """

    iterations: tuple[int, ...]
    """Iterations of each scale, from the smallest on; a single number for all scales."""
    batch: int
    """Copies of the photograph in a batch, each with its own noise."""
    padding: Padding
    """Border of the convolutions."""
    coordinates: bool
    """Vertical coordinate convolution."""
    last_vae: int
    """Last scale of a patch-VAE, counted from 0."""
    vae_texture: float
    """Weight of ``LossWeights.vae_texture``."""
    vae_coherence: float
    """Weight of ``LossWeights.vae_coherence``."""
    texture: float
    """Weight of ``LossWeights.texture``."""
    detail: float
    """Weight of ``LossWeights.detail``."""
    feature_texture: float
    """Weight of ``LossWeights.feature_texture``."""
    adversarial: float
    """Weight of ``LossWeights.adversarial``."""
    discriminator: DiscriminatorKind
    """Discriminator of the patch-GANs."""
    sigma: float
    """Noise of a patch-GAN, in RMSE of the reconstruction by the scales below (Gur et al. 2020: 0.05)."""
    ema: float
    """Decay of the EMA that replaces a patch-GAN's weights after its last iteration; 0: keep the last weights."""
    checkpoint_every: int
    """Iterations between checkpoints."""

    def __post_init__(self) -> None:
        if not self.iterations or min(*self.iterations, self.batch, self.checkpoint_every) < 1:
            raise UsageError(
                f"iterations = {list(self.iterations)}, batch = {self.batch}, checkpoint_every = {self.checkpoint_every}: "
                f"out of range; use numbers of at least 1"
            )
        if not 0 <= self.sigma < math.inf:
            raise UsageError(f"sigma = {self.sigma}: out of range; use a finite number of at least 0")
        if not 0 <= self.ema < 1:
            raise UsageError(f"ema = {self.ema}: out of range; use a number from 0 to below 1")
        _ = self.loss_weights  # checks them

    @property
    def loss_weights(self) -> LossWeights:
        """Weights of the losses, and the discriminator."""
        return LossWeights(**{field.name: getattr(self, field.name) for field in dataclasses.fields(LossWeights)})

    @property
    def networks(self) -> Config:
        """Networks of the paper's sizes with this recipe's padding, coordinates and last patch-VAE."""
        return Config(padding=self.padding, coordinates=self.coordinates, last_vae=self.last_vae)

    def replace(self, **changes: Any) -> Self:  # noqa: ANN401 (checked by __post_init__)
        """The recipe with other values."""
        return dataclasses.replace(self, **changes)
