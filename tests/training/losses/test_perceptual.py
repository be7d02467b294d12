"""The perceptual loss against numbers by hand."""

import pytest
import torch

from engine.training.losses.perceptual import Perceptual, perceptual_loss


def test_layers_are_weighted():
    fake = {
        "conv1_2": torch.tensor([1.0, 2.0]),
        "conv2_2": torch.tensor([0.0, 4.0]).bfloat16(),
        "relu3_3": torch.ones(1),
    }
    real = {name: torch.zeros_like(value).requires_grad_() for name, value in fake.items()}
    loss = perceptual_loss(fake, real, Perceptual({"conv1_2": 0.1, "conv2_2": 1.0}))
    assert loss.item() == pytest.approx(0.1 * 1.5 + 2.0)
    assert not loss.requires_grad


def test_relative_loss_ignores_the_scale_of_maps():
    fake, real = {"conv4_3": torch.tensor([1.0, 2.0])}, {"conv4_3": torch.tensor([4.0, -2.0])}
    layers = Perceptual({"conv4_3": 0.5}, relative=True)
    assert perceptual_loss(fake, real, layers).item() == pytest.approx(0.5 * 3.5 / 3)
    larger = ({name: 100 * value for name, value in maps.items()} for maps in (fake, real))
    assert perceptual_loss(*larger, layers).item() == pytest.approx(0.5 * 3.5 / 3)
    black = {"conv4_3": torch.zeros(2)}
    assert perceptual_loss(black, black, layers).item() == 0
