"""Compact, Real-ESRGAN's SRVGGNetCompact: 3x3 convolutions with activations between, then one pixel shuffle.

Wang et al., "Real-ESRGAN: Training Real-World Blind Super-Resolution with Pure Synthetic Data", ICCV workshops 2021. The
reference is BSD-3-Clause. A ReLU and a leaky ReLU are PReLUs of constant slopes, so every activation is a PReLU here.
Knows nothing of files, tiles or devices.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Self

from torch import Tensor, nn
from torch.nn import functional as F

from engine.archs.layers import (
    MAX_BLOCKS,
    RGB,
    Upscaler,
    cast_to_weights,
    check_count,
    conv3,
    image_of,
    rgb_of,
    sizes_of,
)
from engine.errors import ModelError

NAME = "compact"
FORM = "Compact"


def detect(state: Mapping[str, Tensor]) -> bool:
    """Whether the tensors are those of convolutions at the even places of one sequence, and of slopes between them."""
    return "body.0.weight" in state and all(re.match(r"body\.\d+\.(weight|bias)$", key) for key in state)


def canonical(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors themselves: all published files have the same names."""
    return dict(state)


class Compact(Upscaler):
    """Convolutions at the resolution of the input, whose result is added to the enlarged image.

    Args:
        channels: channels of the features.
        convs: convolutions between the first and the last one.
        scale: enlargement.
        image_channels: channels of the image that the network sees and makes: 1 (luma), 3 or 4 (with alpha).
    """

    noise_channels = 0
    align = 1

    def __init__(self, channels: int = 64, convs: int = 16, scale: int = 4, image_channels: int = RGB) -> None:
        super().__init__()
        self.scale, self.image_channels = scale, image_channels
        layers: list[nn.Module] = [conv3(image_channels, channels), nn.PReLU(channels)]
        for _ in range(convs):
            layers += [conv3(channels, channels), nn.PReLU(channels)]
        self.body = nn.Sequential(*layers, conv3(channels, image_channels * scale**2))
        self.ends = ("body.0", f"body.{len(self.body) - 1}")

    def trunk(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> all pixels of an output cell in the channels of one pixel: [B, channels * scale^2, H, W]."""
        image = image_of(x, channels=self.image_channels)
        first, *inner, last = self.body
        y = first(image)
        for layer in inner:
            y = layer(cast_to_weights(layer, y))
        # What nearest-neighbour enlargement puts into these channels.
        base = image.repeat_interleave(self.scale**2, 1)
        result: Tensor = base + last(cast_to_weights(last, y))
        return result

    def tail(self, x: Tensor) -> Tensor:
        return rgb_of(F.pixel_shuffle(x, self.scale), self.image_channels)

    def _seen_by(self, q: int) -> tuple[int, int]:
        reach = (len(self.body) + 1) // 2
        return q // self.scale - reach, q // self.scale + reach

    @classmethod
    def from_shapes(cls, state: Mapping[str, Tensor]) -> Self:
        """A network of the size of these tensors, not yet filled with them.

        Raises ModelError, or KeyError, IndexError or ValueError, for tensors that tell no size.
        """
        last = max(int(key.split(".")[1]) for key in state) // 2 * 2
        if state["body.1.weight"].ndim != 1 if "body.1.weight" in state else last > 1:
            raise ModelError(
                "has no PReLU slopes, so its activation is not known; add them: 0 of a ReLU, 0.1 of a leaky one"
            )
        channels, scale, image_channels = sizes_of(state["body.0.weight"], state[f"body.{last}.weight"])
        convs = check_count(last // 2, MAX_BLOCKS, "convolutions") - 1
        return cls(channels, convs, scale, image_channels)
