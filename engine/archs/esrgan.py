"""ESRGAN's generator, RRDBNet: residual-in-residual dense blocks and two nearest-neighbour upsamplings.

Wang et al., "ESRGAN: Enhanced Super-Resolution Generative Adversarial Networks", ECCV workshops 2018. RealSR and
Real-ESRGAN use the same network. Holds the graph, the tensor names of three generations of checkpoints and the receptive
field; knows nothing of files, tiles, padding or devices. ``torch.fx`` traces it: no branch depends on a tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.archs.layers import (
    MAX_BLOCKS,
    MAX_CHANNELS,
    RGB,
    add_noise_features,
    cast_to_weights,
    check_count,
    conv3,
    image_of,
    noise_channels_of,
    noise_conv,
)
from engine.errors import ModelError

NAME = "esrgan"
FORM = "ESRGAN x4"
SLOPE = 0.2  # negative slope of every leaky ReLU
RESIDUAL = 0.2  # factor of the residual of every dense block and every group of three
TRUNK = 4  # output pixels a trunk pixel, in each direction

_NUMBERED = r"(\d+)\.RDB(\d)\.conv(\d)"
_OLDER_NAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        # The first release is one nn.Sequential; its trunk convolution is the last entry of the sub-sequence.
        (rf"^model\.1\.sub\.{_NUMBERED}\.0\.", r"body.\1.rdb\2.conv\3."),
        (r"^model\.1\.sub\.\d+\.(?=weight$|bias$)", "conv_body."),
        (r"^model\.0\.", "conv_first."),
        (r"^model\.3\.", "conv_up1."),
        (r"^model\.6\.", "conv_up2."),
        (r"^model\.8\.", "conv_hr."),
        (r"^model\.10\.", "conv_last."),
        # The ESRGAN repository's second naming.
        (rf"^RRDB_trunk\.{_NUMBERED}\.", r"body.\1.rdb\2.conv\3."),
        (r"^trunk_conv\.", "conv_body."),
        (r"^upconv(\d)\.", r"conv_up\1."),
        (r"^HRconv\.", "conv_hr."),
    )
)
_UPSAMPLINGS = {0: "no upsampling", 1: "one upsampling"}
_CHANNELS = {1: "greyscale", 4: "RGBA"}
_MARK = re.compile(rf"^(body\.\d+\.rdb\d|RRDB_trunk\.\d+\.RDB\d|model\.1\.sub\.{_NUMBERED})\.")


def detect(state: Mapping[str, Tensor]) -> bool:
    """Whether any tensor has the name of a dense block's, in any of the three namings."""
    return any(_MARK.match(key) for key in state)


def canonical(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under BasicSR's names, which Real-ESRGAN uses too and this module has."""
    return {_newest(key): tensor for key, tensor in state.items()}


def variant(state: Mapping[str, Tensor]) -> str | None:
    """Name of a complete RRDBNet of another form than this module builds; None for the own form and incomplete tensors.

    Tensors that lack exactly the second upsampling are those of the variant with one: nothing tells them apart.
    """
    first, upsamplings = state.get("conv_first.weight", state.get("model.0.weight")), _upsamplings(state)
    if first is None or first.ndim != 4 or upsamplings is None:
        return None
    inputs = first.shape[1]
    details = [_UPSAMPLINGS.get(upsamplings, f"{upsamplings} upsamplings")] if upsamplings != 2 else []
    details += [_CHANNELS[inputs]] if inputs in _CHANNELS else []
    name = "ESRGAN+" if any("conv1x1" in key for key in state) else "ESRGAN"
    if name == "ESRGAN" and not details:
        return None
    scale = 2**upsamplings / {12: 2, 48: 4}.get(inputs, 1)
    return f"{name} x{scale:g}" + (f" ({', '.join(details)})" if details else "")


def _upsamplings(state: Mapping[str, Tensor]) -> int | None:
    """Number of upsampling convolutions of a complete tail in any of the three namings; None for an incomplete one."""
    if positions := {int(match[1]) for key in state if (match := re.match(r"model\.(\d+)\.weight$", key))}:
        # An upsampling takes three entries of the sequence: resize, convolution, activation. Two convolutions follow.
        return next((n for n in range(5) if positions == {0, *range(3, 3 * n + 1, 3), 3 * n + 2, 3 * n + 4}), None)
    numbers = {int(match[1]) for key in state if (match := re.match(r"(?:conv_up|upconv)(\d)\.weight$", key))}
    is_complete = "conv_last.weight" in state and not {"conv_hr.weight", "HRconv.weight"}.isdisjoint(state)
    return len(numbers) if is_complete and numbers == set(range(1, len(numbers) + 1)) else None


def _newest(key: str) -> str:
    for pattern, name in _OLDER_NAMES:
        key = pattern.sub(name, key)
    return key


class DenseBlock(nn.Module):
    """Five convolutions that see the input and all results before them, as a residual: [B, C, H, W] -> the same."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.conv1 = conv3(channels, growth)
        self.conv2 = conv3(channels + growth, growth)
        self.conv3 = conv3(channels + 2 * growth, growth)
        self.conv4 = conv3(channels + 3 * growth, growth)
        self.conv5 = conv3(channels + 4 * growth, channels)
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4, self.conv5):
            _start_small(conv)

    def forward(self, x: Tensor) -> Tensor:
        maps = cast_to_weights(self, x)
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            maps = torch.cat([maps, F.leaky_relu(conv(maps), SLOPE)], 1)
        last: Tensor = self.conv5(maps)
        return torch.add(x, last, alpha=RESIDUAL)


def _start_small(conv: nn.Conv2d) -> None:
    """Initialise with a tenth of Kaiming's weights, as in the paper, so that a deep trunk starts near the identity."""
    # Uniform with the same variance: normal numbers on the meta device cost two seconds of imports within PyTorch.
    nn.init.kaiming_uniform_(conv.weight)
    conv.weight.data.mul_(0.1)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


class ResidualGroup(nn.Module):
    """Three dense blocks inside one more residual, the paper's RRDB: [B, C, H, W] -> the same."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.rdb1 = DenseBlock(channels, growth)
        self.rdb2 = DenseBlock(channels, growth)
        self.rdb3 = DenseBlock(channels, growth)

    def forward(self, x: Tensor) -> Tensor:
        last: Tensor = self.rdb3(self.rdb2(self.rdb1(x)))
        return torch.add(x, last, alpha=RESIDUAL)


class RRDBNet(nn.Module):
    """ESRGAN's generator: [B, 3 + noise channels, H, W] with RGB in [0, 1] -> [B, 3, scale H, scale W], about [0, 1].

    The network always enlarges its trunk four times. Scales 2 and 1 are BasicSR's variants, which first fold 2 x 2 or
    4 x 4 pixels into channels; the origin of a tile must then sit on that grid, ``align``. Noise channels are an addition
    of this engine.

    Args:
        channels: channels of the trunk.
        blocks: number of residual groups.
        growth: channels that each convolution of a dense block adds.
        scale: 4, 2 or 1.
        noise_channels: input channels beside RGB; with scale 4 only.

    Raises:
        ModelError: another scale, or noise channels with scale 2 or 1.
    """

    def __init__(
        self, channels: int = 64, blocks: int = 23, growth: int = 32, scale: int = 4, noise_channels: int = 0
    ) -> None:
        super().__init__()
        if scale not in (1, 2, 4):
            raise ModelError(f"RRDBNet of scale {scale}: does not exist; use scale 1, 2 or 4")
        if noise_channels and scale != TRUNK:
            raise ModelError(f"RRDBNet with noise channels of scale {scale}: does not exist; use scale {TRUNK}")
        self.scale = scale
        self.align = TRUNK // scale
        self.noise_channels = noise_channels
        self.conv_first = conv3(RGB * self.align**2, channels)
        self.conv_noise = noise_conv(noise_channels, channels)
        self.body = nn.Sequential(*(ResidualGroup(channels, growth) for _ in range(blocks)))
        self.conv_body = conv3(channels, channels)
        self.conv_up1 = conv3(channels, channels)
        self.conv_up2 = conv3(channels, channels)
        self.conv_hr = conv3(channels, channels)
        self.conv_last = conv3(channels, RGB)

    @property
    def blocks(self) -> nn.Sequential:
        """Blocks of the trunk."""
        return self.body

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.trunk(x))

    def trunk(self, x: Tensor) -> Tensor:
        """[B, 3 + noise channels, H, W] -> features [B, C, H / align, W / align]."""
        image = image_of(x, self.noise_channels)
        if self.align > 1:
            image = F.pixel_unshuffle(image, self.align)
        x = add_noise_features(self.conv_first(image), self.conv_noise, x)
        x = x + self.conv_body(cast_to_weights(self.conv_body, self.body(x)))
        return cast_to_weights(self.conv_up1, x)

    def tail(self, x: Tensor) -> Tensor:
        """Features -> image, ``TRUNK`` times as large; see ``layers.TAIL_REACH``."""
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        x = F.leaky_relu(self.conv_up1(x), SLOPE)
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        x = F.leaky_relu(self.conv_up2(x), SLOPE)
        x = F.leaky_relu(self.conv_hr(x), SLOPE)
        result: Tensor = self.conv_last(cast_to_weights(self.conv_last, x))
        return result

    def to_mixed(self, dtype: torch.dtype) -> Self:
        """Cast in place every convolution except those at both ends; returns the network.

        The ends and the residual stream stay float32. bf16 has 8 bits of mantissa, no more than an 8-bit image has, so
        rounding the input would cost more than everything else together (0.97 levels instead of 0.26).
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d) and name not in ("conv_first", "conv_noise", "conv_last"):
                module.to(dtype)
        return self

    @property
    def radius(self) -> int:
        """Radius of the receptive field: input pixels to either side that an output pixel depends on, at the worst phase.

        The interval that one output pixel needs is traced back through the graph. A convolution widens it by one, a
        nearest-neighbour upsampling halves both ends (rounding down), folded pixels multiply them again.
        """
        return max(max(q // self.scale - low, high - q // self.scale) for q, low, high in self._reach())

    def _reach(self) -> Iterator[tuple[int, int, int]]:
        """(output pixel, its first and its last input pixel) for each phase."""
        trunk = 15 * len(self.body) + 2  # five convolutions a dense block, three blocks a group; conv_first, conv_body
        for q in range(TRUNK):
            low, high = ((q - 3) // 2 - 1) // 2 - trunk, ((q + 3) // 2 + 1) // 2 + trunk
            yield q, low * self.align, high * self.align + self.align - 1

    @classmethod
    def from_shapes(cls, state: Mapping[str, Tensor]) -> Self:
        """A network of the size of these canonical tensors, not yet filled with them.

        Raises ModelError, or KeyError, IndexError or ValueError, for tensors that tell no size.
        """
        channels, inputs = state["conv_first.weight"].shape[:2]
        scales = {3: 4, 12: 2, 48: 1}
        if inputs not in scales:
            raise ModelError(
                f"conv_first.weight takes {inputs} channels: not RGB; use a network that takes 3, 12 or 48"
            )
        growth = state["body.0.rdb1.conv1.weight"].shape[0]
        blocks = len({key.split(".")[1] for key in state if key.startswith("body.")})
        return cls(
            check_count(channels, MAX_CHANNELS, "channels"),
            check_count(blocks, MAX_BLOCKS, "blocks"),
            check_count(growth, MAX_CHANNELS, "channels of growth"),
            scales[inputs],
            noise_channels_of(state),
        )
