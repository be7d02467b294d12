"""What several architectures are made of. Knows no architecture.

Networks are written so that ``torch.fx`` traces them: no branch depends on a tensor, a dtype is asked of a module's
weights, and what mixes rows in another way than a convolution is a module of its own kind (``WindowRows``).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from engine.errors import AlignmentError

TAIL_REACH = 3
"""Every upscaler is ``tail(trunk(x))``. The trunk runs at the input's resolution; the tail enlarges, and looks at most so
many of the trunk's pixels to every side, so its large maps may be made a strip of rows at a time, exactly."""


RGB = 3
"""Channels of a picture. A network's input has them first, and then its noise channels, if it has any."""

NOISE_KEY = "conv_noise.weight"
_NOISE_START = 0.007
"""Limit of new weights for noise: a trained network's output then changes by about 0.03."""


def conv3(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel_size=3, padding=1)


def noise_conv(channels: int, outputs: int) -> nn.Conv2d | None:
    """What the noise ``channels`` add to the features of the first convolution; None without any.

    A network without randomness at the resolution of its output repeats itself where its input is even (docs/decisions,
    0012). It starts small, and not at zero: noise is as likely as its negative, so zero is a place where no gradient leads
    away from.
    """
    if not channels:
        return None
    conv = nn.Conv2d(channels, outputs, kernel_size=3, padding=1, bias=False)
    nn.init.uniform_(conv.weight, -_NOISE_START, _NOISE_START)
    return conv


def noise_channels_of(state: Mapping[str, Tensor]) -> int:
    """How many noise channels the network of these tensors takes."""
    return state[NOISE_KEY].shape[1] if NOISE_KEY in state else 0


def with_noise_gain(state: Mapping[str, Tensor], gain: float) -> dict[str, Tensor]:
    """The tensors of a network whose noise channels are ``gain`` times as loud: noise enters by a convolution without bias."""
    return {**state, NOISE_KEY: (state[NOISE_KEY].float() * gain).to(state[NOISE_KEY].dtype)}


def picture_of(x: Tensor, noise_channels: int) -> Tensor:
    """The picture in a network's input [B, 3 + noise channels, H, W]."""
    return x.narrow(1, 0, RGB) if noise_channels else x


def add_noise_features(features: Tensor, conv_noise: nn.Conv2d | None, x: Tensor) -> Tensor:
    """``features`` of the picture and what the noise in the network's input ``x`` adds to them."""
    return features if conv_noise is None else features + conv_noise(x.narrow(1, RGB, conv_noise.in_channels))


def cast_to_weights(module: nn.Module, x: Tensor) -> Tensor:
    """x in the dtype of the module's weights. `parameters()` and not `.weight`, so that a trace holds one constant."""
    return x.to(next(module.parameters()).dtype)


def check_whole_windows(x: Tensor, window: int) -> Tensor:
    """The same [B, C, H, W]; raises AlignmentError unless windows fill it. Its callers register it with `torch.fx`."""
    height, width = x.shape[-2:]
    if height % window or width % window:
        up = [-(-n // window) * window for n in (height, width)]
        raise AlignmentError(
            f"got {height} x {width} pixels, no multiple of the window of {window}; "
            f"pad the whole picture, before tiling, to {up[0]} x {up[1]}"
        )
    return x


class WindowRows(nn.Module, ABC):
    """A layer that mixes the rows of a window of ``window`` rows, on a grid that is shifted up by ``shift`` rows."""

    window: int
    shift: int

    @property
    def workspace(self) -> int:
        """Bytes for each pixel that `attend` takes besides its input and output."""
        return 0

    @abstractmethod
    def attend(self, x: Tensor, seams: Sequence[int] | None) -> Tensor:
        """[B, H, W, C] -> the same, H a multiple of the window.

        ``seams``: None for a whole picture. Of a band, whose first row is on the layer's own grid, the rows of windows that
        straddle the picture's upper or lower border, whose two parts must not mix.
        """
