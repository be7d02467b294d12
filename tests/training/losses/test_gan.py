"""Adversarial losses against hand-computed numbers; gradients by finite differences."""

import math

import pytest
import torch

from engine.errors import UsageError
from engine.training.losses.gan import discriminator_loss, generator_loss

REAL, FAKE = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [-1.0]])


@pytest.mark.parametrize(
    ("kind", "discriminator", "generator"),
    [
        # With s(x) = log(1 + exp x): s(-1.5), s(-3.5) | s(-2), s(-3); and s(1.5), s(3.5) | s(2), s(3).
        ("ragan", 0.101669, 2.601669),
        ("vanilla", 0.180924 + 0.503204, 1.003204),  # s(-1), s(-3) | s(0), s(-1); and s(0), s(1)
        ("hinge", 0.0 + 0.5, 0.5),  # max(0, 0), max(0, -2) | max(0, 1), max(0, 0); and -(0 - 1) / 2
    ],
)
def test_adversarial_losses_by_hand(kind, discriminator, generator):
    assert discriminator_loss(kind, REAL, FAKE).item() == pytest.approx(discriminator, abs=2e-6)
    assert generator_loss(kind, REAL, FAKE).item() == pytest.approx(generator, abs=2e-6)


@pytest.mark.parametrize("kind", ["ragan", "vanilla", "hinge"])
def test_gradients_of_adversarial_losses(kind):
    real = torch.randn(3, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    fake = torch.randn(2, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r, f: discriminator_loss(kind, r, f), (real, fake))
    assert torch.autograd.gradcheck(lambda r, f: generator_loss(kind, r, f), (real, fake))


@pytest.mark.parametrize("kind", ["ragan", "vanilla", "hinge"])
def test_adversarial_losses_pull_in_the_right_direction(kind):
    """The discriminator wants the real ones up and the fakes down, the generator the fakes up; large scores are safe."""
    real, fake = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    discriminator_loss(kind, real, fake).backward()
    assert (real.grad < 0).all()
    assert (fake.grad > 0).all()
    fake = torch.zeros(2, requires_grad=True)
    generator_loss(kind, real.detach(), fake).backward()
    assert (fake.grad < 0).all()
    assert discriminator_loss(kind, torch.full((2,), -1e4), torch.full((2,), 1e4)).isfinite()


def test_scores_in_half_precision_are_compared_in_full():
    real, fake = torch.full((4,), 300.0).bfloat16(), torch.full((4,), 299.0).bfloat16()
    loss = discriminator_loss("ragan", real, fake)
    assert loss.dtype == torch.float32
    gap = real[0].item() - fake[0].item()
    assert loss.item() == pytest.approx(math.log1p(math.exp(-gap)), rel=1e-5)


def test_adversarial_losses_refuse():
    with pytest.raises(UsageError, match="'wgan'; there are ragan, vanilla, hinge"):
        discriminator_loss("wgan", REAL, FAKE)
    with pytest.raises(UsageError, match="'wgan'"):
        generator_loss("wgan", REAL, FAKE)
    with pytest.raises(UsageError, match="scores of real crops"):
        generator_loss("ragan", None, FAKE)
    assert generator_loss("hinge", None, FAKE) == 0.5
