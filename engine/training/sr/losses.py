"""What holds an enlarged crop to its input and to the photograph at the same place, beside the pixel difference."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.training.losses.vgg import Maps
from engine.training.sr.degradations import bicubic


@dataclass(frozen=True, slots=True)
class Perceptual:
    """Which convolutions' outputs are compared, before their ReLU, and with what weight.

    `relative`: a difference counts as a share of the real maps' mean size, so that VGG's weights may come from anywhere:
    differently scaled ones make maps of quite another size.
    """

    weights: Mapping[str, float]
    relative: bool = False


PERCEPTUAL: Mapping[str, Perceptual] = {
    "esrgan": Perceptual({"conv5_4": 1.0}),  # Wang et al. 2018
    # BSRGAN's and SwinIR's code
    "swinir": Perceptual({"conv1_2": 0.1, "conv2_2": 0.1, "conv3_4": 1.0, "conv4_4": 1.0, "conv5_4": 1.0}),
    "forms": Perceptual({"conv4_3": 0.5, "conv5_3": 1.5}, relative=True),  # that VGG-16 and VGG-19 both have
}


def consistency_loss(fake: Tensor, coarse: Tensor, scale: int) -> Tensor:
    """The mean absolute difference of crops [N, 3, H, W], reduced, from [N, 3, H / scale, W / scale] -> scalar.

    Reduced as the photograph is, by a cubic. The mean of the squares of pixels is softer: held to the photograph by it, a picture
    must have more contrast than the photograph in the finest structures that the input shows (docs/decisions/0017). A border
    pixel is made partly of what lies outside the crop and does not count.
    """
    inner = slice(1, -1) if min(coarse.shape[2:]) > 2 else slice(None)
    return F.l1_loss(bicubic(fake, scale)[:, :, inner, inner], coarse[:, :, inner, inner])


def perceptual_loss(fake: Maps, real: Maps, layers: Perceptual) -> Tensor:
    """The mean absolute difference of feature maps, layer by layer, weighted -> scalar, fp32; `real` gets no gradient."""
    losses = []
    for name, weight in layers.weights.items():
        ours, theirs = fake[name].float(), real[name].detach().float()
        size = theirs.abs().mean().clamp_min(torch.finfo(theirs.dtype).tiny) if layers.relative else 1.0
        losses.append(weight * F.l1_loss(ours, theirs) / size)
    return torch.stack(losses).sum()
