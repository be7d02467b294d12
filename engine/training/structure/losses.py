"""Losses of step 1: the adversarial loss and the distances of samples from the photograph, scale by scale."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
from torch import Generator, Tensor

from engine.archs.hpvaegan import Config
from engine.device.precision import Precision
from engine.errors import UsageError
from engine.training.losses.coherence import Coherence
from engine.training.losses.discriminators import PROJECTED_LAYERS, Projected
from engine.training.losses.features import ImageFeatures
from engine.training.losses.gan import GanLoss, ScoreGan
from engine.training.losses.texture import TEXTURE_LAYERS, FeatureWasserstein, FineTexture, SlicedWasserstein
from engine.training.run.precision import autocast
from engine.training.structure.networks import Discriminator as PatchDiscriminator

DiscriminatorKind = Literal["wgan", "projected"]

DISCRIMINATOR_ADAM: dict[DiscriminatorKind, tuple[float, tuple[float, float]]] = {
    "wgan": (5e-4, (0.5, 0.999)),
    "projected": (2e-4, (0.5, 0.99)),  # a low rate keeps it from memorising the one photograph
}
"""Learning rate and betas of each discriminator's Adam."""

PENALTY = 0.1
"""Weight of the gradient penalty (Gur et al. 2020)."""
PATCH = 7
"""Side of the patches of a patch-GAN's texture loss."""
PATCH_SCALES = 3
"""Image sizes at which they are compared, each half as large as the one before."""
VAE_PATCH = 5
"""Side of the patches of a patch-VAE, whose images are a few dozen pixels wide."""
VAE_SCALES = 2
"""Image sizes at which they are compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossWeights:
    """Weights of the losses, and the discriminator. Defaults are the paper's.

    Raises:
        UsageError: a weight is negative or infinite, or the discriminator is unknown.
    """

    vae_texture: float = 0.0
    """Patch-VAEs: distance between the patch distributions of samples and photograph, each patch with its height."""
    vae_coherence: float = 0.0
    """Patch-VAEs: distance of each patch of a sample to its nearest patch of the photograph."""
    texture: float = 0.0
    """Patch-GANs: distance between the patch distributions, each patch with its height."""
    detail: float = 0.0
    """Patch-GANs: relative distance between the distributions of the finest texture."""
    feature_texture: float = 0.0
    """Patch-GANs: distance between the distributions of VGG's feature vectors, each vector with its height."""
    adversarial: float = 1.0
    """Patch-GANs: adversarial loss of the generator."""
    discriminator: DiscriminatorKind = "wgan"
    """"wgan": scores of image patches with a gradient penalty (Gur et al. 2020); "projected": of VGG's feature maps."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "discriminator" and not 0 <= value < math.inf:
                raise UsageError(f"{field.name} = {value}: out of range; use a finite number of at least 0")
        if self.discriminator not in get_args(DiscriminatorKind):
            raise UsageError(
                f"discriminator = {self.discriminator!r}: unknown; use one of {', '.join(get_args(DiscriminatorKind))}"
            )

    @property
    def layers(self) -> tuple[str, ...]:
        """Layers of VGG that the losses need."""
        texture = TEXTURE_LAYERS if self.feature_texture else ()
        projected = PROJECTED_LAYERS if self.discriminator == "projected" else ()
        return tuple(dict.fromkeys((*texture, *projected)))


class WganGp(GanLoss):
    """Wasserstein loss of patch scores with a gradient penalty per pixel (Gulrajani et al. 2017; Gur et al. 2020).

    Images are in [-1, 1].
    """

    discriminator: PatchDiscriminator

    def generator_loss(self, real: ImageFeatures, fake: ImageFeatures) -> Tensor:
        self.discriminator.requires_grad_(False)
        with autocast(fake.image.device, self.precision):
            scores: Tensor = self.discriminator(fake.image)
        return -scores.float().mean()

    def discriminator_losses(
        self, real: ImageFeatures, fake: ImageFeatures, rng: Generator
    ) -> Iterator[tuple[str, float, Tensor]]:
        count = len(real.image)
        with autocast(real.image.device, self.precision):
            # One pass for both: the discriminator mixes no samples of a batch.
            scores = self.discriminator(torch.cat([real.image, fake.image])).float()
        yield "critic", 1.0, scores[count:].mean() - scores[:count].mean()
        del scores
        yield "penalty", PENALTY, self.penalty(real.image, fake.image, rng)

    def penalty(self, real: Tensor, fake: Tensor, rng: Generator) -> Tensor:
        """Mean of (|gradient| - 1)^2 at a random mix of ``real`` and ``fake``; the norm is over each pixel's channels.

        The gradient is computed in fp32 instead of fp16, whose range is too short for the double backward pass.
        """
        mix = torch.rand((), generator=rng).item()
        between = mix * real + (1 - mix) * fake
        with autocast(real.device, self.precision, enabled=self.precision == "bf16"):
            gradient = self.discriminator.input_gradient(between)
        norm: Tensor = torch.linalg.vector_norm(gradient.float(), dim=1)
        return ((norm - 1) ** 2).mean()


def make_gan(kind: DiscriminatorKind, config: Config, precision: Precision, device: torch.device) -> GanLoss:
    """An adversarial loss whose discriminator draws fresh weights from torch's global generator."""
    if kind == "projected":
        return ScoreGan(Projected().to(device), precision, "hinge")
    return WganGp(PatchDiscriminator(config).to(device), precision)


class SampleLosses:
    """Distances of samples from the photograph at every scale, without those of weight zero.

    Args:
        weights: weights of the losses.
        sizes: (height, width) of every scale.
        last_vae: the last scale of a patch-VAE.
    """

    def __init__(self, weights: LossWeights, sizes: Sequence[tuple[int, int]], last_vae: int) -> None:
        self.weights = weights
        self._patches = [
            vae_patch_distance(size) if scale <= last_vae else patch_distance(size) for scale, size in enumerate(sizes)
        ]
        self._details = [detail_distance(size) for size in sizes]
        self._features, self._coherence = FeatureWasserstein(), Coherence(VAE_PATCH)

    def vae(self, scale: int, fake: Tensor, real: Tensor, rng: Generator) -> dict[str, Tensor]:
        """Losses of a patch-VAE's samples; images [N, 3, H, W] in [-1, 1]."""
        losses = {}
        if self.weights.vae_texture:
            losses["vae_texture"] = self._patches[scale](to_unit(fake), to_unit(real), rng)
        if self.weights.vae_coherence:
            losses["vae_coherence"] = self._coherence(to_unit(fake), to_unit(real))
        return losses

    def gan(
        self, scale: int, fake: ImageFeatures, real: ImageFeatures, heights: Tensor, rng: Generator
    ) -> dict[str, Tensor]:
        """Losses of a patch-GAN's samples; images in [-1, 1], ``heights`` of the rows of VGG's input."""
        weights, losses = self.weights, {}
        fake_image, real_image = to_unit(fake.image), to_unit(real.image)
        if weights.texture:
            losses["texture"] = self._patches[scale](fake_image, real_image, rng)
        if weights.detail:
            losses["detail"] = self._details[scale](fake_image, real_image, rng)
        if weights.feature_texture:
            maps = (features.layers(TEXTURE_LAYERS) for features in (fake, real))
            losses["feature_texture"] = self._features(*maps, rng, heights=heights)
        return losses


def to_unit(image: Tensor) -> Tensor:
    """From [-1, 1], the range of step 1's networks, to [0, 1]."""
    return (image + 1) / 2


def patch_distance(size: tuple[int, int]) -> SlicedWasserstein:
    """Texture loss of a patch-GAN for images of ``size``; every second row and column of patches is enough."""
    patch, scales = _fit_patch(size, PATCH, PATCH_SCALES)
    return SlicedWasserstein(patch, scales=scales, phases=2, heights=1.0)


def detail_distance(size: tuple[int, int]) -> FineTexture:
    """Loss of fine texture at the three finest scales for images of ``size``.

    All patches are compared: with every fourth row and column the loss misses hatching (decision 0018). Eight directions at
    a time save 80 MiB at 256 columns.
    """
    patch, scales = _fit_patch(size, 3, PATCH_SCALES)
    return FineTexture(patch, scales=scales, at_a_time=8)


def vae_patch_distance(size: tuple[int, int]) -> SlicedWasserstein:
    """Texture loss of a patch-VAE for images of ``size``: few patches, so all are compared, along more directions."""
    patch, scales = _fit_patch(size, VAE_PATCH, VAE_SCALES)
    return SlicedWasserstein(patch, 256, scales=scales, heights=1.0)


def _fit_patch(size: tuple[int, int], patch: int, scales: int) -> tuple[int, int]:
    """Side of a patch and number of scales that fit images of ``size``."""
    patch = min(patch, *size)
    return patch, min(scales, (min(size) // patch).bit_length())
