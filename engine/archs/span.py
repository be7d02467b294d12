"""SPAN: six blocks of three convolutions, each weighted by its own result without further parameters.

Wan et al., "Swift Parameter-free Attention Network for Efficient Super-Resolution", CVPR workshops 2024. The reference is
Apache-2.0. Files hold every 3x3 convolution as it was trained, as a sum of a 1x1 convolution and a chain of three; they are
folded into one when they are read. Knows nothing of files, tiles or devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.archs.layers import (
    RGB,
    Upscaler,
    cast_to_weights,
    conv3,
    image_of,
    rgb_of,
    sizes_of,
)
from engine.errors import ModelError

NAME = "span"
FORM = "SPAN"
BLOCKS = 6
MEAN = (0.4488, 0.4371, 0.4040)  # mean of the DIV2K images
RANGE = 255.0  # values of the image that the convolutions see

_CONVOLUTIONS = ("conv_1", "conv_2", *(f"block_{i}.c{j}_r" for i in range(1, BLOCKS + 1) for j in (1, 2, 3)))
_RAW = "no_norm"  # marks networks that see the image as it is, without MEAN and RANGE


def detect(state: Mapping[str, Tensor]) -> bool:
    """Whether there is the convolution that joins the blocks' results, and one of a block."""
    return "conv_cat.weight" in state and any(key.startswith("block_1.c1_r.") for key in state)


def canonical(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with every trained convolution folded into one of 3x3, in float32.

    Raises KeyError for a trained convolution of which a part is missing.
    """
    result: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = next((name for name in _CONVOLUTIONS if key.startswith(f"{name}.")), None)
        if name is None or key in (f"{name}.weight", f"{name}.bias"):
            result[key] = torch.zeros(1) if key == _RAW else tensor
        elif f"{name}.sk.weight" not in state:  # a file without the parts that were trained
            result[key.replace(".eval_conv.", ".")] = tensor
        elif f"{name}.weight" not in result:
            result[f"{name}.weight"], result[f"{name}.bias"] = _folded(state, name)
    return result


def _folded(state: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that a trained one is equal to.

    ``eval_conv`` holds them too, but a training may have left it behind.
    """
    parts = ("sk", "conv.0", "conv.1", "conv.2")
    skip, first, middle, last = (state[f"{name}.{part}.weight"].double() for part in parts)
    biases = [state[f"{name}.{part}.bias"].double() for part in parts]
    weight = torch.einsum("om,mkyx,ki->oiyx", last[:, :, 0, 0], middle, first[:, :, 0, 0])
    weight[:, :, 1:2, 1:2] += skip
    inner = torch.einsum("mkyx,k->m", middle, biases[1]) + biases[2]
    bias = last[:, :, 0, 0] @ inner + biases[3] + biases[0]
    return weight.float(), bias.float()


class AttentionBlock(nn.Module):
    """Three convolutions; the result, with the input, is weighted by a function of itself: [B, C, H, W] -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.c1_r = conv3(channels, channels)
        self.c2_r = conv3(channels, channels)
        self.c3_r = conv3(channels, channels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The result, and the features behind the first activation."""
        first = F.silu(self.c1_r(x))
        y = self.c3_r(F.silu(self.c2_r(first)))
        return (y + x) * (torch.sigmoid(y) - 0.5), first


class SPAN(Upscaler):
    """Blocks at the resolution of the input, joined by a 1x1 convolution, and one pixel shuffle.

    Args:
        channels: channels of the features.
        scale: enlargement.
        image_channels: channels of the image that the network sees and makes: 1 (luma), 3 or 4 (with alpha).
        normalised: whether the network sees the image less its mean, in levels of 255.

    Raises:
        ModelError: normalised images of other channels than RGB, for which no mean is known.
    """

    noise_channels = 0
    align = 1
    ends = ("conv_1", "upsampler.0")
    mean: Tensor

    def __init__(
        self, channels: int = 48, scale: int = 4, image_channels: int = RGB, *, normalised: bool = True
    ) -> None:
        super().__init__()
        if normalised and image_channels != RGB:
            raise ModelError(
                f"SPAN of {image_channels} channels with the mean of RGB: does not exist; use {RGB} channels"
            )
        self.scale, self.image_channels, self.normalised = scale, image_channels, normalised
        self.register_buffer("mean", torch.tensor(MEAN, device="cpu").view(1, 3, 1, 1), persistent=False)
        if not normalised:
            self.register_buffer(_RAW, torch.zeros(1))
        self.conv_1 = conv3(image_channels, channels)
        for number in range(1, BLOCKS + 1):
            self.add_module(f"block_{number}", AttentionBlock(channels))
        self.conv_cat = nn.Conv2d(4 * channels, channels, 1)
        self.conv_2 = conv3(channels, channels)
        self.upsampler = nn.Sequential(conv3(channels, image_channels * scale**2), nn.PixelShuffle(scale))

    def trunk(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> all pixels of an output cell in the channels of one pixel: [B, channels * scale^2, H, W]."""
        image = image_of(x, channels=self.image_channels)
        if self.normalised:
            image = (image - self.mean) * RANGE
        y = first = cast_to_weights(self.conv_2, self.conv_1(image))
        results, inner = [], first
        for number in range(1, BLOCKS + 1):
            y, inner = self.get_submodule(f"block_{number}")(y)
            results.append(y)
        joined = self.conv_cat(torch.cat([first, self.conv_2(y), results[0], inner], 1))
        features: Tensor = self.upsampler[0](cast_to_weights(self.upsampler[0], joined))
        return features

    def tail(self, x: Tensor) -> Tensor:
        return rgb_of(self.upsampler[1](x), self.image_channels)

    def _seen_by(self, q: int) -> tuple[int, int]:
        reach = 3 * BLOCKS + 3  # conv_1, conv_2 and the one before the shuffle
        return q // self.scale - reach, q // self.scale + reach

    @classmethod
    def from_shapes(cls, state: Mapping[str, Tensor]) -> Self:
        """A network of the size of these canonical tensors, not yet filled with them.

        Raises ModelError, or KeyError, IndexError or ValueError, for tensors that tell no size.
        """
        sizes = sizes_of(state["conv_1.weight"], state["upsampler.0.weight"])
        return cls(*sizes, normalised=_RAW not in state)
