"""Losses of super-resolution: differences of an enlarged batch from its inputs and from the photograph."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from engine.training.losses.discriminators import PROJECTED_LAYERS
from engine.training.losses.features import ImageFeatures
from engine.training.losses.perceptual import PERCEPTUAL, perceptual_loss
from engine.training.losses.texture import (
    TEXTURE_LAYERS,
    Checkerboard,
    FeatureWasserstein,
    FineTexture,
    SlicedWasserstein,
)
from engine.training.sr.degradations import bicubic
from engine.training.sr.pairs import Batch
from engine.training.sr.recipe import Recipe


def feature_layers(recipe: Recipe) -> tuple[str, ...]:
    """Layers of VGG that the recipe's losses need."""
    layers: list[str] = []
    if recipe.perceptual:
        layers += PERCEPTUAL[recipe.perceptual_layers].weights
    if recipe.feature_texture:
        layers += TEXTURE_LAYERS
    if recipe.adversarial and recipe.discriminator == "projected":
        layers += PROJECTED_LAYERS
    return tuple(dict.fromkeys(layers))


class SRLosses:
    """All losses of the generator but the adversarial one; losses of weight zero are left out.

    Args:
        recipe: weights.
        scale: the network's enlargement.
        aligned: whether matched rows show the same place pixel by pixel, so that the perceptual loss includes them.
    """

    def __init__(self, recipe: Recipe, scale: int, *, aligned: bool) -> None:
        self.recipe, self.scale, self.aligned = recipe, scale, aligned
        self.texture, self.detail = SlicedWasserstein(phases=scale), FineTexture(phases=scale)
        self.feature_texture, self.checkerboard = FeatureWasserstein(), Checkerboard(scale)

    def __call__(self, fake: ImageFeatures, real: ImageFeatures, batch: Batch, rng: Generator) -> dict[str, Tensor]:
        """Unweighted losses of a batch by name.

        Args:
            fake: enlarged inputs.
            real: crops of the photograph.
            batch: the batch that both belong to.
            rng: source of random directions and filters, on the CPU.
        """
        recipe, pairs = self.recipe, batch.pairs
        losses: dict[str, Tensor] = {}
        if recipe.pixel and pairs:
            losses["pixel"] = F.l1_loss(fake.image[:pairs], real.image[:pairs])
        if recipe.consistency:
            coarse = torch.cat([bicubic(real.image[:pairs], self.scale), batch.coarse])
            losses["consistency"] = consistency_loss(fake.image, coarse, self.scale)
        comparable = batch.matched if self.aligned else pairs
        if recipe.perceptual and comparable:
            layers = PERCEPTUAL[recipe.perceptual_layers]
            losses["perceptual"] = perceptual_loss(fake.rows(comparable), real.rows(comparable), layers)
        if recipe.detail:
            losses["detail"] = self.detail(fake.image, real.image, rng)
        if recipe.texture:
            losses["texture"] = self.texture(fake.image, real.image, rng)
        if recipe.feature_texture:
            maps = (features.layers(TEXTURE_LAYERS) for features in (fake, real))
            losses["feature_texture"] = self.feature_texture(*maps, rng)
        if recipe.checkerboard:
            losses["checkerboard"] = self.checkerboard(fake.image, rng)
        return losses

    def weighted_sum(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Sum of losses, the adversarial one ("adv") included, by the recipe's weights."""
        weights = {name: getattr(self.recipe, "adversarial" if name == "adv" else name) for name in losses}
        return torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()


def consistency_loss(fake: Tensor, coarse: Tensor, scale: int) -> Tensor:
    """Mean absolute difference between reduced crops and their inputs: a scalar.

    Crops are reduced by a cubic filter as the photograph is. A mean over squares of pixels is softer: an image held to it
    needs more contrast than the photograph in the finest structures of the input (decision 0017). Border pixels, which
    depend on pixels outside the crop, are left out.

    Args:
        fake: crops [N, 3, H, W].
        coarse: inputs [N, 3, H / scale, W / scale].
        scale: factor of the reduction.
    """
    inner = slice(1, -1) if min(coarse.shape[2:]) > 2 else slice(None)
    return F.l1_loss(bicubic(fake, scale)[:, :, inner, inner], coarse[:, :, inner, inner])
