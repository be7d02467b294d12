"""ESRGAN's generator, RRDBNet: residual-in-residual dense blocks and nearest-neighbour upsamplings.

Wang et al., "ESRGAN: Enhanced Super-Resolution Generative Adversarial Networks", ECCV workshops 2018. RealSR and
Real-ESRGAN use the same network; ESRGAN+ (Rakotonirina and Rasoanaivo, ICASSP 2020) adds paths to its dense blocks. The
references, ESRGAN and BasicSR, are Apache-2.0. Holds the graph, the tensor names of three generations of checkpoints and
the receptive field; knows nothing of files, tiles, padding or devices. ``torch.fx`` traces it: no branch depends on a
tensor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isqrt
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.archs.layers import (
    GREY,
    MAX_BLOCKS,
    MAX_CHANNELS,
    MAX_SCALE,
    RGB,
    RGBA,
    Upscaler,
    add_noise_features,
    cast_to_weights,
    check_count,
    conv3,
    image_of,
    noise_channels_of,
    noise_conv,
    rgb_of,
    seen,
)
from engine.errors import ModelError

NAME = "esrgan"
FORM = "ESRGAN"
SLOPE = 0.2  # negative slope of every leaky ReLU
RESIDUAL = 0.2  # factor of the residual of every dense block and every group of three
FOLDS = (1, 2, 4)  # sides of the squares of pixels that are folded into channels

_NUMBERED = r"(\d+)\.RDB(\d)\.conv"
_OLDER_NAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        # The first release is one nn.Sequential; its trunk convolution is the last entry of the sub-sequence.
        (rf"^model\.1\.sub\.{_NUMBERED}(\d)\.0\.", r"body.\1.rdb\2.conv\3."),
        (rf"^model\.1\.sub\.{_NUMBERED}1x1\.", r"body.\1.rdb\2.conv1x1."),
        (r"^model\.1\.sub\.\d+\.(?=weight$|bias$)", "conv_body."),
        (r"^model\.0\.", "conv_first."),
        # The ESRGAN repository's second naming.
        (rf"^RRDB_trunk\.{_NUMBERED}(\d|1x1)\.", r"body.\1.rdb\2.conv\3."),
        (r"^trunk_conv\.", "conv_body."),
        (r"^upconv(\d)\.", r"conv_up\1."),
        (r"^HRconv\.", "conv_hr."),
    )
)
_SEQUENTIAL = re.compile(r"^model\.(\d+)\.(?=weight$|bias$)")
_MARK = re.compile(rf"^(body\.\d+\.rdb\d|RRDB_trunk\.\d+\.RDB\d|model\.1\.sub\.{_NUMBERED}[\dx]+)\.")


def detect(state: Mapping[str, Tensor]) -> bool:
    """Whether any tensor has the name of a dense block's, in any of the three namings."""
    return any(_MARK.match(key) for key in state)


def canonical(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under BasicSR's names, which Real-ESRGAN uses too and this module has.

    Raises KeyError for an upsampling that is missing in the first release's sequence, which numbers all of them.
    """
    last = max((int(match[1]) for key in state if (match := _SEQUENTIAL.match(key))), default=0)
    # An upsampling takes three entries of the sequence: resize, convolution, activation. Two convolutions follow.
    upsamplings = max(0, -(-(last - 4) // 3))
    if last and upsamplings and (name := f"model.{3 * upsamplings}.weight") not in state:
        raise KeyError(name)
    return {_newest(key, upsamplings): tensor for key, tensor in state.items()}


def _newest(key: str, upsamplings: int) -> str:
    """Today's name of a tensor; ``upsamplings``: number of upsamplings in the first release's sequence."""
    if (match := _SEQUENTIAL.match(key)) and (number := int(match[1])):
        names = {3 * upsamplings + 4: "conv_last", 3 * upsamplings + 2: "conv_hr"}
        name = names.get(number, f"conv_up{number // 3}" if number % 3 == 0 else f"model{number}")
        return f"{name}.{key[match.end() :]}"
    for pattern, name in _OLDER_NAMES:
        key = pattern.sub(name, key)
    return key


class DenseBlock(nn.Module):
    """Five convolutions that see the input and all results before them, as a residual: [B, C, H, W] -> the same.

    ``plus``: with ESRGAN+'s paths from the input and from the second result to the second and fourth.
    """

    def __init__(self, channels: int, growth: int, *, plus: bool = False) -> None:
        super().__init__()
        self.conv1x1 = nn.Conv2d(channels, growth, 1, bias=False) if plus else None
        self.conv1 = conv3(channels, growth)
        self.conv2 = conv3(channels + growth, growth)
        self.conv3 = conv3(channels + 2 * growth, growth)
        self.conv4 = conv3(channels + 3 * growth, growth)
        self.conv5 = conv3(channels + 4 * growth, channels)
        self.residual = RESIDUAL
        """Factor of the last convolution's result."""
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4, self.conv5):
            _start_small(conv)

    def forward(self, x: Tensor) -> Tensor:
        maps = cast_to_weights(self, x)
        path = None if self.conv1x1 is None else self.conv1x1(maps)
        for number, conv in enumerate((self.conv1, self.conv2, self.conv3, self.conv4), 1):
            if path is None or number % 2:  # no name for the result: its memory is free before the next convolution
                maps = torch.cat([maps, F.leaky_relu(conv(maps), SLOPE)], 1)
            else:
                path = F.leaky_relu(conv(maps), SLOPE) + path
                maps = torch.cat([maps, path], 1)
        last: Tensor = self.conv5(maps)
        return torch.add(x, last, alpha=self.residual)

    def scale_weights(self) -> None:
        """Multiply the last convolution by the residual's factor.

        The sum then has no factor. PyTorch rounds one with a factor differently in vectors and in single numbers, so the bits
        of half precision would depend on the layout.
        """
        for name, parameter in self.conv5.named_parameters():
            setattr(self.conv5, name, nn.Parameter(parameter * self.residual, requires_grad=False))
        self.residual = 1.0


def _start_small(conv: nn.Conv2d) -> None:
    """Initialise with a tenth of Kaiming's weights, as in the paper, so that a deep trunk starts near the identity."""
    # Uniform with the same variance: normal numbers on the meta device cost two seconds of imports within PyTorch.
    nn.init.kaiming_uniform_(conv.weight)
    conv.weight.data.mul_(0.1)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


class ResidualGroup(nn.Module):
    """Three dense blocks inside one more residual, the paper's RRDB: [B, C, H, W] -> the same."""

    def __init__(self, channels: int, growth: int, *, plus: bool = False) -> None:
        super().__init__()
        self.rdb1 = DenseBlock(channels, growth, plus=plus)
        self.rdb2 = DenseBlock(channels, growth, plus=plus)
        self.rdb3 = DenseBlock(channels, growth, plus=plus)
        self.casts_input = False
        """Whether the dense blocks add in the weights' dtype. The sum of the group has its input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        first = cast_to_weights(self, x) if self.casts_input else x
        last: Tensor = self.rdb3(self.rdb2(self.rdb1(first)))
        return torch.add(x, last, alpha=RESIDUAL)


class RRDBNet(Upscaler):
    """ESRGAN's generator.

    The trunk is enlarged by 2 as often as ``scale * fold`` says: up to four times. BasicSR's variants first fold 2 x 2 or
    4 x 4 pixels into channels; the origin of a tile must then sit on that grid, ``align``. Noise channels are an addition
    of this engine.

    Args:
        channels: channels of the trunk.
        blocks: number of residual groups.
        growth: channels that each convolution of a dense block adds.
        scale: enlargement.
        noise_channels: input channels beside RGB; without folded pixels only.
        fold: side of the squares of pixels that are folded into channels: 1, 2 or 4.
        image_channels: channels of the image that the network sees and makes: 1 (luma), 3 or 4 (with alpha).
        plus: whether dense blocks have ESRGAN+'s paths.

    Raises:
        ModelError: another scale, fold or number of channels, or noise channels with folded pixels.
    """

    ends = ("conv_first", "conv_noise", "conv_last")

    def __init__(
        self,
        channels: int = 64,
        blocks: int = 23,
        growth: int = 32,
        scale: int = 4,
        noise_channels: int = 0,
        *,
        fold: int = 1,
        image_channels: int = RGB,
        plus: bool = False,
    ) -> None:
        super().__init__()
        upsamplings = (scale * fold).bit_length() - 1
        if fold not in FOLDS or scale * fold != 2**upsamplings or upsamplings > 4:
            raise ModelError(f"RRDBNet of scale {scale} with fold {fold}: does not exist; use scale 1, 2, 4, 8 or 16")
        if noise_channels and fold != 1:
            raise ModelError(f"RRDBNet with noise channels and fold {fold}: does not exist; use fold 1")
        self.scale, self.align, self.upsamplings = scale, fold, upsamplings
        self.noise_channels, self.image_channels = noise_channels, image_channels
        self.conv_first = conv3(image_channels * fold**2, channels)
        self.conv_noise = noise_conv(noise_channels, channels)
        self.body = nn.Sequential(*(ResidualGroup(channels, growth, plus=plus) for _ in range(blocks)))
        self.conv_body = conv3(channels, channels)
        for number in range(1, upsamplings + 1):
            self.add_module(f"conv_up{number}", conv3(channels, channels))
        self.conv_hr = conv3(channels, channels)
        self.conv_last = conv3(channels, image_channels)

    @property
    def blocks(self) -> nn.Sequential:
        """Blocks of the trunk."""
        return self.body

    def to_inference(self, dtype: torch.dtype) -> Self:
        """``to_mixed``, with residuals in ``dtype`` within each group: fewer passes over memory, and a little more rounding.

        The sums of groups stay float32.
        """
        for group in self.body:
            assert isinstance(group, ResidualGroup)
            group.casts_input = True
            for block in (group.rdb1, group.rdb2, group.rdb3):
                block.scale_weights()
        return self.to_mixed(dtype)

    def trunk(self, x: Tensor) -> Tensor:
        """[B, 3 + noise channels, H, W] -> features [B, C, H / align, W / align]."""
        features = self._first_features(x)
        for group in self.body:
            features = group(features)
        body = self.conv_body(cast_to_weights(self.conv_body, features))
        # Computed twice, for a thousandth of the work: no map is live for as long, and in bands no rows wait for as long.
        return cast_to_weights(self.conv_hr, body + self._first_features(x))

    def _first_features(self, x: Tensor) -> Tensor:
        """Features of the image and of the noise channels in the input ``x``."""
        image = image_of(x, self.noise_channels, self.image_channels)
        if self.align > 1:
            image = F.pixel_unshuffle(image, self.align)
        return add_noise_features(self.conv_first(image), self.conv_noise, x)

    def tail(self, x: Tensor) -> Tensor:
        for number in range(1, self.upsamplings + 1):
            x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = F.leaky_relu(self.get_submodule(f"conv_up{number}")(x), SLOPE)
        x = F.leaky_relu(self.conv_hr(x), SLOPE)
        return rgb_of(self.conv_last(cast_to_weights(self.conv_last, x)), self.image_channels)

    def _seen_by(self, q: int) -> tuple[int, int]:
        trunk = 15 * len(self.body) + 2  # five convolutions a dense block, three blocks a group; conv_first, conv_body
        low, high = seen(q, q, [(2, 1), *[(1, 2)] * self.upsamplings, (trunk, 1)])
        return low * self.align, high * self.align + self.align - 1

    @classmethod
    def from_shapes(cls, state: Mapping[str, Tensor]) -> Self:
        """A network of the size of these canonical tensors, not yet filled with them.

        Raises ModelError, or KeyError, IndexError or ValueError, for tensors that tell no size.
        """
        channels, inputs = state["conv_first.weight"].shape[:2]
        image_channels, fold = _image_of(inputs, state["conv_last.weight"].shape[0])
        upsamplings = max((int(m[1]) for key in state if (m := re.match(r"conv_up(\d)\.weight$", key))), default=0)
        if 2**upsamplings % fold or 2**upsamplings // fold > MAX_SCALE:
            raise ModelError(
                f"{upsamplings} upsamplings with fold {fold}; networks of scale 1 to {MAX_SCALE} are built"
            )
        blocks = len({key.split(".")[1] for key in state if key.startswith("body.")})
        return cls(
            check_count(channels, MAX_CHANNELS, "channels"),
            check_count(blocks, MAX_BLOCKS, "blocks"),
            check_count(state["body.0.rdb1.conv1.weight"].shape[0], MAX_CHANNELS, "channels of growth"),
            2**upsamplings // fold,
            noise_channels_of(state),
            fold=fold,
            image_channels=image_channels,
            plus="body.0.rdb1.conv1x1.weight" in state,
        )


def _image_of(inputs: int, outputs: int) -> tuple[int, int]:
    """(channels of the image, fold) of a network that takes and yields these channels. Raises ModelError."""
    fold = isqrt(inputs // outputs) if outputs else 0
    if outputs not in (GREY, RGB, RGBA) or fold not in FOLDS or outputs * fold**2 != inputs:
        raise ModelError(
            f"takes {inputs} channels and yields {outputs}; networks of grey, RGB or RGBA images are built, "
            "with or without folded pixels"
        )
    return outputs, fold
