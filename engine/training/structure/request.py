"""Request for a training of step 1."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.archs.hpvaegan import BASE_WIDTH, LEAST_WIDTH, Config
from engine.device.precision import Precision
from engine.errors import UsageError
from engine.training.run.precision import check_precision
from engine.training.structure.recipe import StructureRecipe


@dataclass(frozen=True, slots=True, kw_only=True)
class StructureRequest:
    """Everything that decides the result except the photograph.

    Raises:
        UsageError: unknown precision, or a number of iterations that does not match the scales.
    """

    recipe: StructureRecipe
    """Values of the training."""
    networks: Config | None = None
    """Size and kind of the networks; None: the recipe's."""
    base_width: int = BASE_WIDTH
    """Width of the last scale, pixels."""
    least_width: int = LEAST_WIDTH
    """Width of the first scale, pixels."""
    precision: Precision = "bf16"
    """Precision of the convolutions."""
    seed: int = 0
    """Seed of the initial weights and of all noise."""
    vgg: Path | None = None
    """Weights of VGG-16 or VGG-19; None: torchvision's file, if a loss needs it."""
    licence: str = ""
    """Licence of the photograph, recorded in the structure file."""
    source: str = ""
    """Author and origin of the photograph, recorded in the structure file."""

    def __post_init__(self) -> None:
        check_precision(self.precision)
        scales = self.config.last + 1
        if len(self.recipe.iterations) not in (1, scales):
            raise UsageError(
                f"iterations = {list(self.recipe.iterations)}: the networks have {scales} scales; use one number, or one for each"
            )

    @property
    def config(self) -> Config:
        """Size and kind of the networks."""
        return self.networks or self.recipe.networks

    @property
    def iterations(self) -> tuple[int, ...]:
        """Iterations of each scale."""
        scales = self.config.last + 1
        return self.recipe.iterations * scales if len(self.recipe.iterations) == 1 else self.recipe.iterations
