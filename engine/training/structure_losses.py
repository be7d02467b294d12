"""What a patch-GAN of step 1 is trained with beside its reconstruction: an adversary, and distances of texture.

Knows pictures of one scale at a time; the scales' order is the trainer's affair.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Generator, Tensor, nn

from engine.archs.hpvaegan import Config
from engine.archs.hpvaegan import Discriminator as PatchDiscriminator
from engine.errors import UsageError
from engine.training.discriminators import PROJECTED_LAYERS, Projected
from engine.training.look import Look
from engine.training.losses import (
    TEXTURE_LAYERS,
    SlicedWasserstein,
    discriminator_loss,
    generator_loss,
)
from engine.training.precision import Precision, autocast

Kind = Literal["wgan", "projected"]

PENALTY = 0.1
PATCH = 7  # side of the patches that the texture loss compares ...
PATCH_SCALES = 3  # ... at so many sizes of the picture, each half as large as the one before


@dataclass(frozen=True, slots=True)
class Losses:
    """Weights, and who judges. As they stand here they are the paper's.

    `texture`: of the distance between the patches of a sample and those of the photograph, `feature_texture`: of that
    between the vectors of VGG's maps; each patch and each vector with its height. `discriminator`: "wgan", of patches
    of the picture with a gradient penalty (Gur et al. 2020), or "projected", of VGG's maps.
    """

    texture: float = 0.0
    feature_texture: float = 0.0
    adversarial: float = 1.0
    discriminator: Kind = "wgan"

    def __post_init__(self) -> None:
        for name in ("texture", "feature_texture", "adversarial"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{name} = {getattr(self, name)}: must be a number of at least 0")
        if self.discriminator not in get_args(Kind):
            raise UsageError(f"discriminator = {self.discriminator!r}: choose one of {', '.join(get_args(Kind))}")

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers of VGG that they look at."""
        texture = TEXTURE_LAYERS if self.feature_texture else ()
        return tuple(dict.fromkeys((*texture, *(PROJECTED_LAYERS if self.discriminator == "projected" else ()))))


class Adversary(Protocol):
    """A discriminator and the game that it plays. Pictures are in [-1, 1], their maps those of VGG."""

    rate: float
    betas: tuple[float, float]

    @property
    def network(self) -> nn.Module: ...

    def losses(self, real: Look, fake: Look, noise: Generator) -> Iterator[tuple[str, float, Tensor]]:
        """What the discriminator descends: name, weight and loss. Their graphs need not be alive together."""
        ...

    def fooling(self, fake: Look) -> Tensor:
        """What the generator descends."""
        ...


class Wasserstein:
    """The paper's: scores of patches, apart as far as a gradient of about 1 at every pixel lets them be."""

    rate, betas = 5e-4, (0.5, 0.999)

    def __init__(self, network: PatchDiscriminator, precision: Precision) -> None:
        self.network, self.precision = network, precision

    def losses(self, real: Look, fake: Look, noise: Generator) -> Iterator[tuple[str, float, Tensor]]:
        count = len(real.picture)
        with autocast(real.picture.device, self.precision):
            # One pass for both: nothing in the discriminator mixes the samples of a batch.
            scores = self.network(torch.cat([real.picture, fake.picture])).float()
        yield "critic", 1.0, scores[count:].mean() - scores[:count].mean()
        del scores
        yield "penalty", PENALTY, self.penalty(real.picture, fake.picture, noise)

    def penalty(self, real: Tensor, fake: Tensor, noise: Generator) -> Tensor:
        """(|gradient| - 1)^2, the norm taken over the three channels of each pixel.

        fp16 would overflow in the gradient's own gradient, so it leaves autocast; bf16 has the range and stays.
        """
        mix = torch.rand((), generator=noise).item()
        between = mix * real + (1 - mix) * fake
        with autocast(real.device, self.precision, self.precision == "bf16"):
            gradient = self.network.input_gradient(between)
        norm: Tensor = torch.linalg.vector_norm(gradient.float(), dim=1)
        return ((norm - 1) ** 2).mean()

    def fooling(self, fake: Look) -> Tensor:
        with autocast(fake.picture.device, self.precision):
            scores: Tensor = self.network(fake.picture)
        return -scores.float().mean()


class ThroughFeatures:
    """A projected discriminator with the hinge loss, which learns in few iterations; a slow rate keeps it from knowing the one
    photograph by heart.
    """

    rate, betas = 2e-4, (0.5, 0.99)

    def __init__(self, network: Projected, precision: Precision) -> None:
        self.network, self.precision = network, precision

    def losses(self, real: Look, fake: Look, noise: Generator) -> Iterator[tuple[str, float, Tensor]]:
        yield "critic", 1.0, discriminator_loss("hinge", self._scores(real), self._scores(fake))

    def fooling(self, fake: Look) -> Tensor:
        return generator_loss("hinge", None, self._scores(fake))

    def _scores(self, look: Look) -> Tensor:
        with autocast(look.picture.device, self.precision):
            scores: Tensor = self.network(look.maps)
        return scores


def make_adversary(kind: Kind, config: Config, precision: Precision, device: torch.device) -> Adversary:
    """With fresh weights, from torch's global generator."""
    if kind == "projected":
        return ThroughFeatures(Projected().to(device), precision)
    return Wasserstein(PatchDiscriminator(config).to(device), precision)


def patch_distance(size: tuple[int, int]) -> SlicedWasserstein:
    """Of as many sizes of the picture as hold a patch; patches of every second row and column, drawn anew, are enough."""
    patch = min(PATCH, *size)
    return SlicedWasserstein(patch, scales=min(PATCH_SCALES, (min(size) // patch).bit_length()), phases=2, heights=1.0)
