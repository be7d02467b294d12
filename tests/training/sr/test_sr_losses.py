"""Losses of super-resolution against hand-computed numbers."""

import pytest
import torch

from engine.training.sr.degradations import bicubic
from engine.training.sr.losses import Perceptual, consistency_loss, perceptual_loss


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(sigma, *shape, seed=0, dtype=torch.float32):
    return 0.5 + sigma * torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def test_a_photograph_is_consistent_with_its_own_reduction():
    real = noise(0.2, 1, 3, 32, 32).clamp(0, 1)
    coarse = bicubic(real, 4)
    border = coarse.clone()
    border[:, :, 0] = border[:, :, :, -1] = 0
    assert consistency_loss(real, coarse, 4) == consistency_loss(real, border, 4) == 0
    assert consistency_loss(real, coarse + 0.1, 4).item() == pytest.approx(0.1)
    assert consistency_loss(real[:, :, :8, :8], coarse[:, :, :2, :2], 4) > 0  # nothing but border


def test_consistency_asks_for_no_more_contrast_than_there_is():
    """As the means of squares would, which flatten waves of 24 pixels four times as much."""
    waves = 0.5 + 0.3 * torch.sin(torch.arange(192) * torch.pi / 12).expand(1, 3, 192, 192)
    coarse = waves[:, :, ::4, 1::4] / 2 + waves[:, :, ::4, 2::4] / 2  # what is in the middle of each square
    by_means = (torch.nn.functional.avg_pool2d(waves, 4) - coarse).abs().mean()
    assert consistency_loss(waves, coarse, 4) < 0.4 * by_means


def test_perceptual_loss_weighs_layers():
    fake = {
        "conv1_2": torch.tensor([1.0, 2.0]),
        "conv2_2": torch.tensor([0.0, 4.0]).bfloat16(),
        "relu3_3": torch.ones(1),
    }
    real = {name: torch.zeros_like(value).requires_grad_() for name, value in fake.items()}
    loss = perceptual_loss(fake, real, Perceptual({"conv1_2": 0.1, "conv2_2": 1.0}))
    assert loss.item() == pytest.approx(0.1 * 1.5 + 2.0)
    assert not loss.requires_grad


def test_a_relative_perceptual_loss_does_not_see_how_large_maps_are():
    fake, real = {"conv4_3": torch.tensor([1.0, 2.0])}, {"conv4_3": torch.tensor([4.0, -2.0])}
    layers = Perceptual({"conv4_3": 0.5}, relative=True)
    assert perceptual_loss(fake, real, layers).item() == pytest.approx(0.5 * 3.5 / 3)
    larger = ({name: 100 * value for name, value in maps.items()} for maps in (fake, real))
    assert perceptual_loss(*larger, layers).item() == pytest.approx(0.5 * 3.5 / 3)
    black = {"conv4_3": torch.zeros(2)}
    assert perceptual_loss(black, black, layers).item() == 0
