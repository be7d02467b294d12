"""Adversarial losses: functions of scores, and discriminators with the losses of both networks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from engine.device.precision import Precision
from engine.errors import UsageError
from engine.training.losses.discriminators import Projected
from engine.training.losses.features import ImageFeatures
from engine.training.run.optimisation import Optimisation
from engine.training.run.precision import at_least_fp32, autocast

GanKind = Literal["ragan", "vanilla", "hinge"]


class GanLoss(ABC):
    """A discriminator and the losses of both networks. ``precision`` is that of the discriminator's convolutions."""

    def __init__(self, discriminator: nn.Module, precision: Precision) -> None:
        self.discriminator, self.precision = discriminator, precision

    @abstractmethod
    def generator_loss(self, real: ImageFeatures, fake: ImageFeatures) -> Tensor:
        """Loss of the generator: a scalar, fp32. It freezes the discriminator, which needs no gradient here."""

    @abstractmethod
    def discriminator_losses(
        self, real: ImageFeatures, fake: ImageFeatures, rng: Generator
    ) -> Iterator[tuple[str, float, Tensor]]:
        """Losses of the discriminator one by one: name, weight and scalar."""

    def train_discriminator(
        self, optimisation: Optimisation, real: ImageFeatures, fake: ImageFeatures, rng: Generator
    ) -> dict[str, float]:
        """Make one step of the discriminator; the unweighted value of each of its losses."""
        self.discriminator.requires_grad_(True)
        values: dict[str, float] = {}

        def losses() -> Iterator[Tensor]:
            for name, weight, loss in self.discriminator_losses(real, fake.detach(), rng):
                values[name] = loss.item()
                yield weight * loss
                del loss  # frees its graph before the next loss is computed

        optimisation.descend(losses())
        return values


class ScoreGan(GanLoss):
    """An adversarial loss of scores alone: ``discriminator_loss`` and ``generator_loss`` of the given kind.

    A ``Projected`` discriminator scores feature maps, any other one pixels.
    """

    def __init__(self, discriminator: nn.Module, precision: Precision, kind: GanKind) -> None:
        super().__init__(discriminator, precision)
        self.kind = kind

    def generator_loss(self, real: ImageFeatures, fake: ImageFeatures) -> Tensor:
        self.discriminator.requires_grad_(False)
        fake_scores = self._scores(fake)
        with torch.no_grad():
            real_scores = self._scores(real) if self.kind == "ragan" else None
        return generator_loss(self.kind, real_scores, fake_scores)

    def discriminator_losses(
        self, real: ImageFeatures, fake: ImageFeatures, rng: Generator
    ) -> Iterator[tuple[str, float, Tensor]]:
        yield "critic", 1.0, discriminator_loss(self.kind, self._scores(real), self._scores(fake))

    def _scores(self, features: ImageFeatures) -> Tensor:
        with autocast(features.image.device, self.precision):
            scores: Tensor = self.discriminator(
                features.maps if isinstance(self.discriminator, Projected) else features.image
            )
        return scores


def discriminator_loss(kind: GanKind, real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """Loss of a discriminator.

    Args:
        kind: "ragan": relativistic average loss (Jolicoeur-Martineau 2019, as in ESRGAN), half the sum of both terms;
            means run over all scores of the batch. "vanilla": binary cross-entropy (Goodfellow et al. 2014), the sum
            of both terms. "hinge": Miyato et al. 2018, the sum of both terms.
        real_scores: scores of real images, any shape, without a sigmoid.
        fake_scores: scores of generated images.

    Returns:
        A scalar, fp32; fp64 for fp64.

    Raises:
        UsageError: unknown kind.
    """
    real, fake = at_least_fp32(real_scores), at_least_fp32(fake_scores)
    match kind:
        case "ragan":
            return (_entropy(real - fake.mean(), 1) + _entropy(fake - real.mean(), 0)) / 2
        case "vanilla":
            return _entropy(real, 1) + _entropy(fake, 0)
        case "hinge":
            return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    raise _unknown(kind)


def generator_loss(kind: GanKind, real_scores: Tensor | None, fake_scores: Tensor) -> Tensor:
    """Loss of a generator, as ``discriminator_loss``.

    Only "ragan" uses ``real_scores``. "vanilla" is the non-saturating form.

    Raises:
        UsageError: unknown kind, or "ragan" without ``real_scores``.
    """
    fake = at_least_fp32(fake_scores)
    match kind:
        case "ragan":
            if real_scores is None:
                raise UsageError("gan = 'ragan': the relativistic loss needs scores of real images; pass real_scores")
            real = at_least_fp32(real_scores)
            return (_entropy(real - fake.mean(), 0) + _entropy(fake - real.mean(), 1)) / 2
        case "vanilla":
            return _entropy(fake, 1)
        case "hinge":
            return -fake.mean()
    raise _unknown(kind)


def _entropy(scores: Tensor, target: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(scores, torch.full_like(scores, target))


def _unknown(kind: str) -> UsageError:
    return UsageError(f"gan = {kind!r}: unknown adversarial loss; use one of {', '.join(get_args(GanKind))}")
