"""Layers and helpers that several architectures share. Knows no architecture.

Networks are written so that ``torch.fx`` traces them: no branch depends on a tensor, dtypes are those of a module's
weights, and a layer that mixes rows otherwise than by convolution is a module of its own kind (``WindowRows``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from math import isqrt
from typing import Self

import torch
from torch import Tensor, nn

from engine.errors import AlignmentError, ModelError

TAIL_REACH = 3
"""Trunk pixels that the tail of any upscaler sees to every side.

The trunk runs at the input's resolution; the tail enlarges, so its large feature maps
can be computed in strips of rows, exactly."""

RGB = 3
"""Channels of an image: the first channels of a network's input, before its noise channels."""

GREY, RGBA = 1, 4
"""Channels of networks that see an image's luma, or an image and its alpha."""

LUMA = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in the luma of ITU-R BT.601."""

MAX_SCALE = 16
"""Largest enlargement of each side."""

NOISE_KEY = "conv_noise.weight"
"""Name of the tensor that noise enters by."""

MAX_BLOCKS = 512
"""Blocks of a trunk, layers of a block, or scales. Published networks have up to 36."""

MAX_CHANNELS = 4096
"""Channels of a layer. Published networks have up to 256."""

_NOISE_START = 0.007
"""Limit of new weights for noise: a trained network's output then changes by about 0.03."""


def check_count(number: int, limit: int, noun: str) -> int:
    """``number``, which a file states. Raises ModelError if it is not from 1 to ``limit``; ``noun`` names it."""
    if not 1 <= number <= limit:
        raise ModelError(f"{number} {noun}; networks of 1 to {limit} are built, name a checkpoint of one")
    return number


def conv3(inputs: int, outputs: int) -> nn.Conv2d:
    """3x3 convolution that keeps the size: [B, inputs, H, W] -> [B, outputs, H, W]."""
    return nn.Conv2d(inputs, outputs, kernel_size=3, padding=1)


def noise_conv(channels: int, outputs: int) -> nn.Conv2d | None:
    """Convolution from the noise channels to the features of the first convolution; None for no channels.

    Without randomness at the resolution of its output, a network repeats itself where its input is flat
    (docs/decisions/0012). The weights start small but not at zero: noise is as likely as its negative, so the mean gradient at
    zero vanishes.
    """
    if not channels:
        return None
    conv = nn.Conv2d(channels, outputs, kernel_size=3, padding=1, bias=False)
    nn.init.uniform_(conv.weight, -_NOISE_START, _NOISE_START)
    return conv


def noise_channels_of(state: Mapping[str, Tensor]) -> int:
    """Number of noise channels of the network of these tensors."""
    return state[NOISE_KEY].shape[1] if NOISE_KEY in state else 0


def with_noise_gain(state: Mapping[str, Tensor], gain: float) -> dict[str, Tensor]:
    """The tensors of a network whose noise channels are ``gain`` times as loud: noise enters linearly, without bias."""
    return {**state, NOISE_KEY: (state[NOISE_KEY].float() * gain).to(state[NOISE_KEY].dtype)}


def image_of(x: Tensor, noise_channels: int = 0, channels: int = RGB) -> Tensor:
    """The image in a network's input [B, 3 + noise channels, H, W], in the channels that the network sees.

    Args:
        x: input.
        noise_channels: noise channels behind the image.
        channels: ``RGB``; ``GREY`` for the luma; ``RGBA`` for an image with an opaque alpha.
    """
    x = x.narrow(1, 0, RGB) if noise_channels else x
    if channels == GREY:
        red, green, blue = (x.narrow(1, i, 1) * share for i, share in enumerate(LUMA))
        return red + green + blue
    return torch.cat([x, x.narrow(1, 0, 1) * 0 + 1], 1) if channels == RGBA else x


def rgb_of(y: Tensor, channels: int) -> Tensor:
    """The image [B, 3, H, W] of a network's output with these channels: a luma is grey, an alpha is dropped."""
    if channels == GREY:
        return y.expand(-1, RGB, -1, -1)
    return y.narrow(1, 0, RGB) if channels == RGBA else y


def check_image_channels(channels: int) -> int:
    """``channels`` of a network's image. Raises ModelError unless they are those of a grey, an RGB or an RGBA image."""
    if channels not in (GREY, RGB, RGBA):
        raise ModelError(f"takes images of {channels} channels; networks of grey, RGB or RGBA images are built")
    return channels


def sizes_of(first: Tensor, last: Tensor) -> tuple[int, int, int]:
    """(channels, scale, image channels) of a network from the weights of its first convolution and of the one before its shuffle.

    Raises ModelError for sizes that are not built.
    """
    channels, image_channels = first.shape[:2]
    check_image_channels(image_channels)
    scale = shuffle_factor(last.shape[0], image_channels)
    return check_count(channels, MAX_CHANNELS, "channels"), scale, image_channels


def shuffle_factor(outputs: int, channels: int) -> int:
    """Factor by which a pixel shuffle of ``outputs`` channels to ``channels`` enlarges. Raises ModelError without one."""
    factor = isqrt(outputs // channels)
    if factor**2 * channels != outputs or not 1 <= factor <= MAX_SCALE:
        raise ModelError(f"{outputs} channels for a shuffle to {channels}; scales of 1 to {MAX_SCALE} are built")
    return factor


def seen(low: int, high: int, steps: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """First and last pixel that the pixels from ``low`` to ``high`` depend on.

    Args:
        low: first pixel.
        high: last pixel.
        steps: back from the output: the reach of the convolutions of one resolution, and the factor by which the
            resolution before is smaller.
    """
    for reach, factor in steps:
        low, high = (low - reach) // factor, (high + reach) // factor
    return low, high


class Upscaler(nn.Module, ABC):
    """A network that enlarges an image: [B, 3 + noise channels, H, W], RGB in [0, 1] -> [B, 3, scale H, scale W].

    It is ``tail(trunk(x))``; see ``TAIL_REACH``.
    """

    scale: int
    """Enlargement of each side."""

    align: int
    """Grid of tile origins, and divisor of every height and width, in input pixels."""

    noise_channels: int
    """Input channels beside RGB."""

    is_own = True
    """Whether this package has its code, and so knows how far it looks; others are classified by runs."""

    has_halves = True
    """Whether an automatic choice may run it in half precision."""

    halves: tuple[str, ...] = ("fp16", "bf16")
    """Half precisions in which it runs."""

    ends: tuple[str, ...]
    """Names of the first and last convolutions, which stay float32 in mixed precision."""

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.trunk(x))

    @abstractmethod
    def trunk(self, x: Tensor) -> Tensor:
        """Input -> features at the trunk's resolution."""

    @abstractmethod
    def tail(self, x: Tensor) -> Tensor:
        """Features -> image."""

    @abstractmethod
    def _seen_by(self, q: int) -> tuple[int, int]:
        """First and last input pixel that output pixel ``q`` of a row depends on."""

    @property
    def radius(self) -> int:
        """Radius of the receptive field: input pixels to either side that an output pixel depends on, at the worst phase.

        The interval that one output pixel needs is traced back through the graph. The pattern repeats every ``align``
        input pixels.
        """
        reach = 0
        for q in range(self.align * self.scale):
            low, high = self._seen_by(q)
            reach = max(reach, q // self.scale - low, high - q // self.scale)
        return reach

    def to_mixed(self, dtype: torch.dtype) -> Self:
        """Cast in place every convolution, linear map and PReLU except ``ends``; returns the network.

        The ends, norms and residual streams stay float32. bf16 has 8 bits of mantissa, no more than an 8-bit image has,
        so rounding the input would cost more than everything else together (0.97 levels instead of 0.26).
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.PReLU) and name not in self.ends:
                module.to(dtype)
        return self


def add_noise_features(features: Tensor, conv_noise: nn.Conv2d | None, x: Tensor) -> Tensor:
    """``features`` of the image plus those of the noise channels in the network's input ``x``."""
    return features if conv_noise is None else features + conv_noise(x.narrow(1, RGB, conv_noise.in_channels))


def cast_to_weights(module: nn.Module, x: Tensor) -> Tensor:
    """``x`` in the dtype of the module's weights. By ``parameters()``, not ``.weight``, so that a trace has one constant."""
    return x.to(next(module.parameters()).dtype)


def check_whole_windows(x: Tensor, window: int) -> Tensor:
    """``x`` [B, C, H, W] itself; AlignmentError unless windows fill it. Callers register it with ``torch.fx``."""
    height, width = x.shape[-2:]
    if height % window or width % window:
        rounded_up = [-(-n // window) * window for n in (height, width)]
        raise AlignmentError(
            f"{height} x {width} pixels: no multiple of the window of {window}; "
            f"pad the whole image, before tiling, to {rounded_up[0]} x {rounded_up[1]}"
        )
    return x


class WindowRows(nn.Module, ABC):
    """Layer that mixes the rows of a window, on a grid that is shifted."""

    window: int
    """Rows of a window."""

    shift: int
    """Rows by which the grid is shifted up."""

    @property
    def macs(self) -> int:
        """Multiply-adds of a pixel in its linear maps."""
        return sum(m.in_features * m.out_features for m in self.modules() if isinstance(m, nn.Linear))

    @property
    def workspace(self) -> int:
        """Bytes of each pixel that ``attend`` takes in addition to its input and output."""
        return 0

    @abstractmethod
    def attend(self, x: Tensor, seams: Sequence[int] | None) -> Tensor:
        """Run the layer on a whole image or on a band of rows.

        Args:
            x: [B, H, W, C], H a multiple of the window. A band's first row is on the layer's own grid.
            seams: None for a whole image. For a band, its rows of windows that straddle the image's upper or lower
                border: the two parts of such a window must not mix.

        Returns:
            [B, H, W, C].
        """


class PixelRows(nn.Module, ABC):
    """Layer on [B, H, W, C] that computes every pixel from the same pixel of its inputs."""

    @property
    @abstractmethod
    def macs(self) -> int:
        """Multiply-adds of a pixel."""
