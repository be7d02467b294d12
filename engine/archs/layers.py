"""Layers and helpers that several architectures share. Knows no architecture.

Networks are written so that ``torch.fx`` traces them: no branch depends on a tensor, dtypes are those of a module's
weights, and a layer that mixes rows otherwise than by convolution is a module of its own kind (``WindowRows``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from engine.errors import AlignmentError, ModelError

TAIL_REACH = 3
"""Trunk pixels that the tail of any upscaler sees to every side.

Every upscaler is ``tail(trunk(x))``. The trunk runs at the input's resolution; the tail enlarges, so its large feature maps
can be computed in strips of rows, exactly."""

RGB = 3
"""Channels of an image: the first channels of a network's input, before its noise channels."""

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


def image_of(x: Tensor, noise_channels: int) -> Tensor:
    """The image [B, 3, H, W] in a network's input [B, 3 + noise channels, H, W]."""
    return x.narrow(1, 0, RGB) if noise_channels else x


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
