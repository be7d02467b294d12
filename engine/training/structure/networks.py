"""Networks that only the training of step 1 needs: encoder and patch discriminator."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from engine.archs.hpvaegan import SLOPE, Config, Padding, VerticalCoordConv2d, pad_backward


class SpectralConv(nn.Module):
    """Spectrally normalised convolution and leaky ReLU: a layer of the encoder and of the discriminator."""

    def __init__(self, in_channels: int, out_channels: int, coordinates: bool, padding: Padding) -> None:
        super().__init__()
        conv = VerticalCoordConv2d(in_channels, out_channels, coordinates=coordinates, padding=padding)
        self.conv = cast(VerticalCoordConv2d, spectral_norm(conv))

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.conv(x), SLOPE)


class Encoder(nn.Module):
    """E: the photograph at scale 0, [N, 3, h, w] -> mean and log-variance, [N, latent, h, w] each."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, options = config.channels, (config.coordinates, config.padding)
        self.body = nn.Sequential(*(SpectralConv(c, width, *options) for c in (3, width, width)))
        self.mean = VerticalCoordConv2d(width, config.latent, coordinates=config.coordinates, padding=config.padding)
        self.log_variance = VerticalCoordConv2d(
            width, config.latent, coordinates=config.coordinates, padding=config.padding
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x)
        return self.mean(features), self.log_variance(features)


class Discriminator(nn.Module):
    """D_m: [N, 3, H, W] -> scores [N, 1, H, W], one for the patch around each pixel (15x15 with 5 layers)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, options = config.channels, (config.coordinates, config.padding)
        inputs = (3, *(width,) * config.layers)
        self.body = nn.Sequential(*(SpectralConv(c, width, *options) for c in inputs))
        self.tail = VerticalCoordConv2d(width, 1, coordinates=config.coordinates, padding=config.padding)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.tail(self.body(x)))

    def input_gradient(self, x: Tensor) -> Tensor:
        """Gradient w.r.t. ``x`` of the sum of the scores; differentiable in the weights.

        A score is linear between the kinks of the leaky ReLUs, so the gradient is a chain of convolutions. Autograd's
        double backward has the same result, but computes the gradients w.r.t. the weights by convolutions whose channels
        are the batch: 7 times as slow.
        """
        convolutions = [cast(SpectralConv, layer).conv for layer in self.body]
        weights, outputs = [conv.weight for conv in convolutions], []
        with torch.no_grad():
            for conv, weight in zip(convolutions, weights, strict=True):
                outputs.append(conv.convolve(x, weight))
                x = F.leaky_relu(outputs[-1], SLOPE)
        gradient = conv_input_gradient(self.tail, torch.ones_like(x[:, :1]), self.tail.weight)
        for conv, weight, output in zip(reversed(convolutions), reversed(weights), reversed(outputs), strict=True):
            gradient = torch.ops.aten.leaky_relu_backward(gradient, output, SLOPE, False)
            gradient = conv_input_gradient(conv, gradient, weight)
        return gradient


def conv_input_gradient(conv: VerticalCoordConv2d, gradient: Tensor, weight: Tensor) -> Tensor:
    """Gradient w.r.t. the input of ``conv``, given that w.r.t. its output; differentiable in ``weight``."""
    transposed = weight[:, : weight.shape[1] - conv.coordinates].flip(2, 3).transpose(0, 1)
    if all(conv.wraps):
        return F.conv2d(F.pad(gradient, (1, 1, 1, 1), mode="circular"), transposed)
    if conv.border == "zeros":
        return F.conv2d(gradient, transposed, padding=1)
    return pad_backward(F.conv2d(gradient, transposed, padding=2), conv.pad_mode(gradient))
