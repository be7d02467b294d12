"""Perceptual loss: difference of VGG's feature maps at the same place (Johnson et al. 2016)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.training.losses.vgg import Maps


@dataclass(frozen=True, slots=True)
class Perceptual:
    """Layers of a perceptual loss."""

    weights: Mapping[str, float]
    """Weight of each convolution's output, before its ReLU."""
    relative: bool = False
    """Divide a difference by the mean size of the real maps, which depends on where VGG's weights come from."""


PERCEPTUAL: Mapping[str, Perceptual] = {
    "esrgan": Perceptual({"conv5_4": 1.0}),  # Wang et al. 2018
    # code of BSRGAN and SwinIR
    "swinir": Perceptual({"conv1_2": 0.1, "conv2_2": 0.1, "conv3_4": 1.0, "conv4_4": 1.0, "conv5_4": 1.0}),
    # layers of both VGG-16 and VGG-19
    "forms": Perceptual({"conv4_3": 0.5, "conv5_3": 1.5}, relative=True),
}
"""Layers by the value of a recipe's ``perceptual_layers``."""


def perceptual_loss(fake: Maps, real: Maps, layers: Perceptual) -> Tensor:
    """Weighted sum over layers of the mean absolute difference: a scalar, fp32. ``real`` gets no gradient."""
    losses = []
    for name, weight in layers.weights.items():
        fake_maps, real_maps = fake[name].float(), real[name].detach().float()
        tiny = torch.finfo(real_maps.dtype).tiny
        size = real_maps.abs().mean().clamp_min(tiny) if layers.relative else 1.0
        losses.append(weight * F.l1_loss(fake_maps, real_maps) / size)
    return torch.stack(losses).sum()
