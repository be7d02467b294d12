"""The consistency loss, and the layers of VGG that recipes need."""

import pytest
import torch

from engine.training.preset import read_preset
from engine.training.sr.degradations import bicubic
from engine.training.sr.losses import consistency_loss, feature_layers


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(sigma, *shape, seed=0, dtype=torch.float32):
    return 0.5 + sigma * torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def test_own_reduction_is_consistent():
    real = noise(0.2, 1, 3, 32, 32).clamp(0, 1)
    coarse = bicubic(real, 4)
    border = coarse.clone()
    border[:, :, 0] = border[:, :, :, -1] = 0
    assert consistency_loss(real, coarse, 4) == consistency_loss(real, border, 4) == 0
    assert consistency_loss(real, coarse + 0.1, 4).item() == pytest.approx(0.1)
    assert consistency_loss(real[:, :, :8, :8], coarse[:, :, :2, :2], 4) > 0  # border pixels only


def test_consistency_keeps_contrast():
    """Means of squares flatten waves of 24 pixels four times as much as the cubic reduction."""
    waves = 0.5 + 0.3 * torch.sin(torch.arange(192) * torch.pi / 12).expand(1, 3, 192, 192)
    coarse = waves[:, :, ::4, 1::4] / 2 + waves[:, :, ::4, 2::4] / 2  # the middle of each square
    by_means = (torch.nn.functional.avg_pool2d(waves, 4) - coarse).abs().mean()
    assert consistency_loss(waves, coarse, 4) < 0.4 * by_means


def test_feature_layers():
    recipe = read_preset("quick-vgg").sr.replace(perceptual=0.0, feature_texture=0.0, adversarial=0.0)
    assert feature_layers(recipe) == ()
    assert feature_layers(recipe.replace(perceptual=1.0)) == ("conv4_3", "conv5_3")
    assert feature_layers(recipe.replace(feature_texture=1.0)) == ("relu1_2", "relu2_2", "relu3_3")
    assert feature_layers(recipe.replace(adversarial=1.0)) == ("relu1_2", "relu2_2", "relu3_3", "relu4_3")
    assert feature_layers(recipe.replace(adversarial=1.0, discriminator="patch")) == ()
