"""Adversarial losses against numbers by hand, and their gradients against finite differences."""

import math

import pytest
import torch

from engine.errors import UsageError
from engine.training.losses.discriminators import Patch
from engine.training.losses.features import ImageFeatures
from engine.training.losses.gan import ScoreGan, discriminator_loss, generator_loss
from engine.training.run.optimisation import Optimisation

REAL, FAKE = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [-1.0]])


KINDS = ("ragan", "vanilla", "hinge")


@pytest.mark.parametrize(
    ("kind", "discriminator", "generator"),
    [
        # With s(x) = log(1 + exp x): s(-1.5), s(-3.5) | s(-2), s(-3); and s(1.5), s(3.5) | s(2), s(3).
        ("ragan", 0.101669, 2.601669),
        ("vanilla", 0.180924 + 0.503204, 1.003204),  # s(-1), s(-3) | s(0), s(-1); and s(0), s(1)
        ("hinge", 0.0 + 0.5, 0.5),  # max(0, 0), max(0, -2) | max(0, 1), max(0, 0); and -(0 - 1) / 2
    ],
)
def test_values_by_hand(kind, discriminator, generator):
    assert discriminator_loss(kind, REAL, FAKE).item() == pytest.approx(discriminator, abs=2e-6)
    assert generator_loss(kind, REAL, FAKE).item() == pytest.approx(generator, abs=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    real = torch.randn(3, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    fake = torch.randn(2, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r, f: discriminator_loss(kind, r, f), (real, fake))
    assert torch.autograd.gradcheck(lambda r, f: generator_loss(kind, r, f), (real, fake))


def test_signs_of_gradients():
    """The discriminator raises real and lowers fake scores, the generator raises fake ones; large scores stay finite."""
    for kind in KINDS:
        real, fake = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
        discriminator_loss(kind, real, fake).backward()
        assert (real.grad < 0).all(), kind
        assert (fake.grad > 0).all(), kind
        fake = torch.zeros(2, requires_grad=True)
        generator_loss(kind, real.detach(), fake).backward()
        assert (fake.grad < 0).all(), kind
        assert discriminator_loss(kind, torch.full((2,), -1e4), torch.full((2,), 1e4)).isfinite(), kind


def test_half_precision_scores():
    real, fake = torch.full((4,), 300.0).bfloat16(), torch.full((4,), 299.0).bfloat16()
    loss = discriminator_loss("ragan", real, fake)
    assert loss.dtype == torch.float32
    gap = real[0].item() - fake[0].item()
    assert loss.item() == pytest.approx(math.log1p(math.exp(-gap)), rel=1e-5)


def test_refusals():
    with pytest.raises(UsageError, match="'wgan': unknown adversarial loss; use one of ragan, vanilla, hinge"):
        discriminator_loss("wgan", REAL, FAKE)
    with pytest.raises(UsageError, match="'wgan'"):
        generator_loss("wgan", REAL, FAKE)
    with pytest.raises(UsageError, match="scores of real images"):
        generator_loss("ragan", None, FAKE)
    assert generator_loss("hinge", None, FAKE) == 0.5


def test_training_a_discriminator_touches_nothing_else():
    """A step of the discriminator leaves the fake image without a gradient; the generator's loss gives it one."""
    gan = ScoreGan(Patch(4), "fp32", "hinge")
    weights = list(gan.discriminator.parameters())
    optimisation = Optimisation([(weights, 1e-2)], (0.5, 0.99), torch.amp.GradScaler("cpu", enabled=False))
    real, fake = (ImageFeatures(torch.rand(1, 3, 16, 16, requires_grad=True), {}) for _ in range(2))
    before = [weight.clone() for weight in weights]
    values = gan.train_discriminator(optimisation, real, fake, torch.Generator())
    assert values.keys() == {"critic"}
    assert not all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))
    assert fake.image.grad is None
    optimisation.adam.zero_grad()
    gan.generator_loss(real, fake).backward()
    assert fake.image.grad.abs().max() > 0
    assert all(weight.grad is None for weight in weights)
