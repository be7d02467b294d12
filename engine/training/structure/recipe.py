"""How to train step 1: the schema of a preset's table [structure]."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from engine.archs.hpvaegan import Config, Padding
from engine.errors import UsageError
from engine.training.structure.losses import Kind, Losses


@dataclass(frozen=True, slots=True, kw_only=True)
class StructureRecipe:
    """Step 1: iterations for each scale, copies of the photograph in a batch, and what the networks look like."""

    iterations: tuple[int, ...]
    batch: int
    padding: Padding
    coordinates: bool
    last_vae: int
    vae_texture: float
    vae_coherence: float
    texture: float
    detail: float
    feature_texture: float
    adversarial: float
    discriminator: Kind
    sigma: float
    ema: float
    checkpoint_every: int

    def __post_init__(self) -> None:
        if not self.iterations or min(*self.iterations, self.batch, self.checkpoint_every) < 1:
            raise UsageError(
                f"iterations = {list(self.iterations)}, batch = {self.batch} and "
                f"checkpoint_every = {self.checkpoint_every} must be at least 1"
            )

    @property
    def losses(self) -> Losses:
        return Losses(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Losses)})

    def run(self) -> dict[str, Any]:
        """These as `train_structure` takes them."""
        config = Config(padding=self.padding, coordinates=self.coordinates, last_vae=self.last_vae)
        alike = {name: getattr(self, name) for name in ("iterations", "batch", "sigma", "ema", "checkpoint_every")}
        return alike | {"config": config, "losses": self.losses}
