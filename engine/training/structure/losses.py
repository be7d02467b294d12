"""What step 1 is trained with beside its reconstruction: an adversary, and distances of a sample from the photograph.

Knows pictures of one scale at a time; the scales' order is the trainer's affair.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from engine.archs.hpvaegan import Config
from engine.device.precision import Precision
from engine.errors import UsageError
from engine.training.losses.discriminators import PROJECTED_LAYERS, Projected
from engine.training.losses.features import Look
from engine.training.losses.gan import discriminator_loss, generator_loss
from engine.training.losses.texture import TEXTURE_LAYERS, SlicedWasserstein
from engine.training.run.precision import autocast
from engine.training.structure.networks import Discriminator as PatchDiscriminator

Kind = Literal["wgan", "projected"]

PENALTY = 0.1
PATCH = 7  # side of the patches that the texture loss compares ...
PATCH_SCALES = 3  # ... at so many sizes of the picture, each half as large as the one before
VAE_PATCH = 5  # the same of a patch-VAE, a few dozen pixels wide
VAE_SCALES = 2


@dataclass(frozen=True, slots=True)
class Losses:
    """Weights, and who judges. As they stand here they are the paper's.

    Of a patch-VAE's samples, `vae_texture`: of the distance between their patches and those of the photograph as
    distributions, `vae_coherence`: of each patch's distance from the nearest of the photograph.

    Of a patch-GAN's, `texture`: of the distance between their patches and those of the photograph, `detail`: of that between
    their finest textures, as a share of the photograph's, `feature_texture`: of that between the vectors of VGG's maps; each
    patch of the first and each vector with its height. `discriminator`: "wgan", of patches
    of the picture with a gradient penalty (Gur et al. 2020), or "projected", of VGG's maps.
    """

    vae_texture: float = 0.0
    vae_coherence: float = 0.0
    texture: float = 0.0
    detail: float = 0.0
    feature_texture: float = 0.0
    adversarial: float = 1.0
    discriminator: Kind = "wgan"

    def __post_init__(self) -> None:
        for name in ("vae_texture", "vae_coherence", "texture", "detail", "feature_texture", "adversarial"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{name} = {getattr(self, name)}: must be a number of at least 0")
        if self.discriminator not in get_args(Kind):
            raise UsageError(f"discriminator = {self.discriminator!r}: choose one of {', '.join(get_args(Kind))}")

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers of VGG that they look at."""
        texture = TEXTURE_LAYERS if self.feature_texture else ()
        return tuple(dict.fromkeys((*texture, *(PROJECTED_LAYERS if self.discriminator == "projected" else ()))))


class Coherence(nn.Module):
    """How far each patch of a picture is from the nearest one of another (Simakov et al. 2008), squared.

    Its place may be any, but its height counts: `HEIGHT` is that of the picture's bottom over its top, in units of the pixels'
    values. Patches of the other picture that nothing comes near are preferred: a distance is divided by the least one that any
    patch has from the same patch, plus `ALPHA` (Granot et al. 2022, "Drop the GAN", equation 1). Otherwise all become the few
    that are near to everything.
    """

    HEIGHT, ALPHA = 2.0, 0.005
    MOST = 64  # rows and columns of patches; of larger pictures every second, third, ... is taken, from the first on

    def forward(self, fake: Tensor, real: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1], twice -> scalar, fp32; `real` gets no gradient."""
        patch = min(VAE_PATCH, *fake.shape[2:])
        distances = []
        for ours, theirs in zip(fake.float(), real.detach().float(), strict=True):
            (values, heights), (others, their_heights) = self._patches(ours, patch), self._patches(theirs, patch)
            with torch.no_grad():
                apart = torch.cdist(values, others).square() / values.shape[1]
                apart = apart + (heights[:, None] - their_heights).square()
                nearest = (apart / (apart.amin(0) + self.ALPHA)).argmin(1)
            distances.append(F.mse_loss(values, others[nearest]))
        return torch.stack(distances).mean()

    def _patches(self, picture: Tensor, patch: int) -> tuple[Tensor, Tensor]:
        """[patches, values] and the height of each."""
        stride = -(-max(picture.shape[1:]) // self.MOST)
        values = F.unfold(picture[None], patch, stride=stride)[0].T
        rows, columns = ((side - patch) // stride + 1 for side in picture.shape[1:])
        height = self.HEIGHT * torch.arange(rows).to(values) * stride / picture.shape[1]
        return values, height.repeat_interleave(columns)


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
    patch, scales = _fitting(size, PATCH, PATCH_SCALES)
    return SlicedWasserstein(patch, scales=scales, phases=2, heights=1.0)


def detail_distance(size: tuple[int, int]) -> SlicedWasserstein:
    """Of the three finest octaves, direction by direction: what is hatched has too much across the strokes. Of all patches: of
    those of every fourth row and column, drawn anew, it leaves the hatching as it is (docs/decisions/0018). A few directions at
    a time, or it would take 80 MiB more at 256 columns.
    """
    patch, scales = _fitting(size, 3, PATCH_SCALES)
    return SlicedWasserstein(patch, scales=scales, detail=True, at_a_time=8)


def vae_patch_distance(size: tuple[int, int]) -> SlicedWasserstein:
    """Of so few patches every one counts, and more directions are cheap."""
    patch, scales = _fitting(size, VAE_PATCH, VAE_SCALES)
    return SlicedWasserstein(patch, 256, scales=scales, heights=1.0)


def _fitting(size: tuple[int, int], patch: int, scales: int) -> tuple[int, int]:
    patch = min(patch, *size)
    return patch, min(scales, (min(size) // patch).bit_length())
