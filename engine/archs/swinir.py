"""SwinIR for real photographs: residual groups of shifted-window attention, then nearest-neighbour upsampling.

Liang et al., "SwinIR: Image Restoration Using Swin Transformer", ICCV workshops 2021, in its ``nearest+conv`` form. Holds
the graph, the tensor names of the authors' checkpoints and the receptive field; knows nothing of files, tiles or padding.
An image whose sides are no multiples of the window is refused, because padding is done once for the whole image.

The residual stream is [B, H, W, C] throughout, so a token is a pixel and a convolution sees it as channels-last.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from math import isqrt
from typing import Self

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from engine.archs.layers import (
    MAX_BLOCKS,
    MAX_CHANNELS,
    RGB,
    WindowRows,
    add_noise_features,
    cast_to_weights,
    check_count,
    check_whole_windows,
    conv3,
    image_of,
    noise_channels_of,
    noise_conv,
)
from engine.errors import ModelError
from engine.kernels.window_attention import window_attention

NAME = "swinir"
FORM = "SwinIR nearest+conv"
SLOPE = 0.2  # negative slope after the upsamplings; before them it is PyTorch's default, as published
MEAN = (0.4488, 0.4371, 0.4040)  # mean of the DIV2K images, subtracted from every input

MAX_WINDOW = 32
"""Side of a window in pixels: N = window ** 2 pixels have N ** 2 pairs. Published networks have up to 16."""

fx.wrap("check_whole_windows")  # a trace keeps the check as one call

_DERIVED = ("attn.relative_position_index", "attn_mask")
_BIAS = "attn.relative_position_bias_table"


def detect(state: Mapping[str, Tensor]) -> bool:
    """Whether there is a table of relative position biases where SwinIR has one."""
    return any(key.startswith("layers.") and key.endswith(_BIAS) for key in state)


def canonical(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the buffers that some files hold, which follow from the window alone."""
    return {key: tensor for key, tensor in state.items() if not key.endswith(_DERIVED) and key != "mean"}


def variant(state: Mapping[str, Tensor]) -> str | None:
    """Name of a complete SwinIR of another form than this module builds; None for the own form and incomplete tensors."""
    first, upsampler = state.get("conv_first.weight", state.get("conv_first.1.weight")), _upsampler(state)
    if first is None or first.ndim != 4 or upsampler is None:
        return None
    inputs = first.shape[1]
    details = [upsampler]
    details += ["3conv"] if "conv_after_body.0.weight" in state else []
    details += ["greyscale"] if inputs == 1 else []
    return f"SwinIR x{_scale(state, inputs)} ({', '.join(details)})" if details != ["nearest+conv"] else None


def _upsampler(state: Mapping[str, Tensor]) -> str | None:
    """Upsampler in the words of the authors' code; None for tensors of none."""
    if "conv_up1.weight" in state:
        return "nearest+conv"
    if "upsample.0.weight" in state:
        return "pixelshuffle" if "conv_before_upsample.0.weight" in state else "pixelshuffledirect"
    leftovers = {"conv_before_upsample.0.weight", "conv_up2.weight", "conv_hr.weight"}
    return "no upsampling" if "conv_last.weight" in state and leftovers.isdisjoint(state) else None


def _scale(state: Mapping[str, Tensor], channels: int) -> int:
    """Enlargement of a complete SwinIR of any upsampler; ``channels`` are those of its image."""
    if "upsample.0.weight" not in state:
        return 1 << sum(f"conv_up{i}.weight" in state for i in (1, 2, 3))
    outputs, inputs = state["upsample.0.weight"].shape[:2]
    if "conv_before_upsample.0.weight" not in state:
        return isqrt(outputs // channels)
    # A scale of 2 or 3 is one shuffle; larger ones are several shuffles by 2.
    shuffles = sum(key.startswith("upsample.") and key.endswith("weight") for key in state)
    return isqrt(outputs // inputs) if shuffles == 1 else 1 << shuffles


@cache
@torch.inference_mode(mode=False)  # shared by all networks, also in training
def relative_index(window: int) -> Tensor:
    """Row of the bias table for every pair of pixels in a window: [N, N], N = window * window; not to be written to."""
    # On the CPU explicitly: networks are sized on the meta device, and these values are not in the checkpoint.
    positions = torch.arange(window, device="cpu")
    y, x = positions.repeat_interleave(window), positions.repeat(window)
    down, right = y[:, None] - y[None, :], x[:, None] - x[None, :]
    return (down + window - 1) * (2 * window - 1) + right + window - 1


class WindowAttention(WindowRows):
    """Multi-head self-attention inside each window, with a learnt bias for each relative position.

    Raises ModelError for channels that the heads cannot share.
    """

    index: Tensor

    def __init__(self, dim: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ModelError(
                f"{dim} channels for {heads} attention heads: not divisible; use a number of heads that divides them"
            )
        self.heads, self.window, self.shift = heads, window, shift
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.register_buffer("index", relative_index(window), persistent=False)

    @property
    def workspace(self) -> int:
        """Bytes of each pixel: queries, keys and values (shifted, and in the order of the heads), logits before and after
        the softmax."""
        logits = 2 * self.heads * self.window**2 * 4
        return 3 * self.qkv.out_features * self.qkv.weight.itemsize + logits

    def forward(self, x: Tensor) -> Tensor:
        """Attention in a whole image or tile: [B, H, W, C] -> the same."""
        return self.attend(x, None)

    def attend(self, x: Tensor, seams: Sequence[int] | None) -> Tensor:
        result: Tensor = self.proj(window_attention(self.qkv(x), self.bias, self.window, self.shift, seams=seams))
        return result

    @property
    def bias(self) -> Tensor:
        """Bias of every pair of pixels, [heads, N, N]. It is float32, so logits and softmax are, too, in mixed precision."""
        return self.relative_position_bias_table[self.index].permute(2, 0, 1)


class Mlp(nn.Module):
    """Two linear maps with a GELU between them: [..., dim] -> the same."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return result


class SwinLayer(nn.Module):
    """Attention, then an MLP, each after a LayerNorm and added to the residual stream [B, H, W, C]."""

    def __init__(self, dim: int, heads: int, window: int, shift: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, window, shift)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(cast_to_weights(self.attn.qkv, self.norm1(x)))
        y: Tensor = self.mlp(cast_to_weights(self.mlp.fc1, self.norm2(x)))
        return x + y


class SwinGroup(nn.Module):
    """Layers that alternate between no shift and half a window's, then a convolution: the paper's RSTB, [B, H, W, C]."""

    def __init__(self, dim: int, depth: int, heads: int, window: int, hidden: int) -> None:
        super().__init__()
        shifts = [window // 2 if i % 2 else 0 for i in range(depth)]
        blocks = nn.Sequential(*(SwinLayer(dim, heads, window, shift, hidden) for shift in shifts))
        self.residual_group = nn.ModuleDict({"blocks": blocks})
        self.conv = conv3(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.residual_group["blocks"](x)
        y = self.conv(cast_to_weights(self.conv, planes(y)))
        return x + tokens(y)


def tokens(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H, W, C]."""
    return x.permute(0, 2, 3, 1)


def planes(x: Tensor) -> Tensor:
    """[B, H, W, C] -> [B, C, H, W]."""
    return x.permute(0, 3, 1, 2)


class SwinIR(nn.Module):
    """SwinIR: [B, 3 + noise channels, H, W] with RGB in [0, 1] -> [B, 3, scale H, scale W], about [0, 1].

    H and W are multiples of the window. The windows start at the tile's origin, which must therefore sit on the window
    grid of the whole image (``align``): no halo repairs a misaligned tile. The defaults are the paper's SwinIR-M.

    Args:
        dim: channels of the residual stream.
        depths: number of layers of each group.
        heads: number of attention heads of each group.
        window: side of a window in pixels.
        hidden: channels inside the MLPs.
        features: channels after the trunk.
        scale: 4 or 2.
        noise_channels: input channels beside RGB.

    Raises:
        ModelError: another scale, or heads that do not divide ``dim``.
    """

    mean: Tensor

    def __init__(
        self,
        dim: int = 180,
        depths: Sequence[int] = (6, 6, 6, 6, 6, 6),
        heads: Sequence[int] = (6, 6, 6, 6, 6, 6),
        window: int = 8,
        hidden: int = 360,
        features: int = 64,
        scale: int = 4,
        noise_channels: int = 0,
    ) -> None:
        super().__init__()
        if scale not in (2, 4):
            raise ModelError(f"SwinIR of scale {scale}: does not exist; use scale 2 or 4")
        self.scale, self.align, self.depths = scale, window, tuple(depths)
        self.register_buffer("mean", torch.tensor(MEAN, device="cpu").view(1, 3, 1, 1), persistent=False)
        self.noise_channels = noise_channels
        self.conv_first = conv3(RGB, dim)
        self.conv_noise = noise_conv(noise_channels, dim)
        self.patch_embed = nn.ModuleDict({"norm": nn.LayerNorm(dim)})
        groups = zip(depths, heads, strict=True)
        self.layers = nn.Sequential(*(SwinGroup(dim, depth, n, window, hidden) for depth, n in groups))
        self.norm = nn.LayerNorm(dim)
        self.conv_after_body = conv3(dim, dim)
        self.conv_before_upsample = nn.Sequential(conv3(dim, features), nn.LeakyReLU())
        self.conv_up1 = conv3(features, features)
        self.conv_up2 = conv3(features, features) if scale == 4 else None
        self.conv_hr = conv3(features, features)
        self.conv_last = conv3(features, RGB)
        self.apply(_start_linear)

    @property
    def blocks(self) -> nn.Sequential:
        """Blocks of the trunk."""
        return self.layers

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.trunk(x))

    def trunk(self, x: Tensor) -> Tensor:
        """[B, 3 + noise channels, H, W] -> features [B, dim, H, W]."""
        x = check_whole_windows(x, self.align)
        x = add_noise_features(self.conv_first(image_of(x, self.noise_channels) - self.mean), self.conv_noise, x)
        y = self.norm(self.layers(self.patch_embed["norm"](tokens(x))))
        x = x + self.conv_after_body(cast_to_weights(self.conv_after_body, planes(y)))
        return cast_to_weights(self.conv_before_upsample, x)

    def tail(self, x: Tensor) -> Tensor:
        """Features -> image, ``scale`` times as large; see ``layers.TAIL_REACH``."""
        x = self._enlarge(self.conv_before_upsample(x))
        result: Tensor = self.conv_last(cast_to_weights(self.conv_last, x))
        return result + self.mean

    def _enlarge(self, x: Tensor) -> Tensor:
        for conv in (self.conv_up1, self.conv_up2):
            if conv is not None:
                x = F.leaky_relu(conv(F.interpolate(x, scale_factor=2, mode="nearest")), SLOPE)
        return F.leaky_relu(self.conv_hr(x), SLOPE)

    def to_mixed(self, dtype: torch.dtype) -> Self:
        """Cast in place every linear map and convolution except the convolutions at both ends; returns the network.

        LayerNorm, softmax and the residual stream stay float32: the stream grows from group to group until it overflows
        fp16, and rounding the input would cost the most.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and name not in ("conv_first", "conv_noise", "conv_last"):
                module.to(dtype)
        return self

    @property
    def radius(self) -> int:
        """Radius of the receptive field: input pixels to either side that an output pixel depends on, at the worst phase.

        The interval that one output pixel needs is traced back through the graph. A convolution widens it by one, an
        upsampling halves both ends (rounding down), an attention layer extends it to whole (shifted) windows. The
        pattern repeats every window, so one window has all phases.
        """
        return max(max(q // self.scale - low, high - q // self.scale) for q, low, high in self._reach())

    def _reach(self) -> Iterator[tuple[int, int, int]]:
        """(output pixel, its first and its last input pixel) for each phase."""
        for q in range(self.align * self.scale):
            low, high = q - 2, q + 2  # conv_last, conv_hr
            for _ in range(self.scale // 2):
                low, high = (low - 1) // 2, (high + 1) // 2
            low, high = low - 2, high + 2  # conv_before_upsample, conv_after_body
            for depth in reversed(self.depths):
                low, high = self._reach_of_group(depth, low - 1, high + 1)
            yield q, low - 1, high + 1  # conv_first

    def _reach_of_group(self, depth: int, low: int, high: int) -> tuple[int, int]:
        window = self.align
        for i in reversed(range(depth)):
            shift = window // 2 if i % 2 else 0
            low = (low - shift) // window * window + shift
            high = (high - shift) // window * window + shift + window - 1
        return low, high

    @classmethod
    def from_shapes(cls, state: Mapping[str, Tensor]) -> Self:
        """A network of the size of these canonical tensors, not yet filled with them.

        Raises ModelError, or KeyError, IndexError or ValueError, for tensors that tell no size.
        """
        groups = _count(state, "layers.")
        block = "layers.{}.residual_group.blocks."
        depths = [_count(state, block.format(i)) for i in range(groups)]
        tables = [state[block.format(i) + f"0.{_BIAS}"] for i in range(groups)]
        check_count(sum(depths), MAX_BLOCKS, "layers")
        return cls(
            dim=check_count(state["conv_first.weight"].shape[0], MAX_CHANNELS, "channels"),
            depths=depths,
            heads=[table.shape[1] for table in tables],
            window=check_count(_window_of(tables[0]), MAX_WINDOW, "pixels a window's side"),
            hidden=check_count(state[block.format(0) + "0.mlp.fc1.weight"].shape[0], MAX_CHANNELS, "hidden channels"),
            features=check_count(state["conv_up1.weight"].shape[0], MAX_CHANNELS, "features"),
            scale=4 if "conv_up2.weight" in state else 2,
            noise_channels=noise_channels_of(state),
        )


def _start_linear(module: nn.Module) -> None:
    """Initialise linear maps and bias tables as transformers are; convolutions keep PyTorch's initialisation."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, WindowAttention):
        nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """Number of modules that are numbered behind this prefix."""
    return len({key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)})


def _window_of(table: Tensor) -> int:
    """Side of the window of a bias table: w x w pixels have (2w - 1)^2 relative positions. Raises ModelError."""
    side = isqrt(table.shape[0])
    if side**2 != table.shape[0] or side % 2 == 0:
        raise ModelError(f"bias table of {table.shape[0]} rows: no square window; expected (2w - 1)^2 rows")
    return (side + 1) // 2
