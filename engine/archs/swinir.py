"""SwinIR: residual groups of shifted-window attention, then one of four heads.

Liang et al., "SwinIR: Image Restoration Using Swin Transformer", ICCV workshops 2021. The reference is Apache-2.0. Holds
the graph, the tensor names of the authors' checkpoints and the receptive field; knows nothing of files, tiles or padding.
An image whose sides are no multiples of the window is refused, because padding is done once for the whole image.

The residual stream is [B, H, W, C] throughout, so a token is a pixel and a convolution sees it as channels-last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from math import isqrt
from typing import Literal, Self

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from engine.archs.layers import (
    GREY,
    MAX_BLOCKS,
    MAX_CHANNELS,
    MAX_SCALE,
    RGB,
    Upscaler,
    WindowRows,
    add_noise_features,
    cast_to_weights,
    check_count,
    check_whole_windows,
    conv3,
    image_of,
    noise_channels_of,
    noise_conv,
    rgb_of,
    seen,
    shuffle_factor,
)
from engine.errors import ModelError
from engine.kernels.window_attention import window_attention

NAME = "swinir"
FORM = "SwinIR"
SLOPE = 0.2  # negative slope after the upsamplings; before them it is PyTorch's default, as published
MEAN = (0.4488, 0.4371, 0.4040)  # mean of the DIV2K images, subtracted from every RGB input
JPEG_WINDOW, JPEG_RANGE = 7, 255.0  # networks against JPEG's artefacts alone have this window, and see this range

Head = Literal["nearest+conv", "pixelshuffle", "pixelshuffledirect", "none"]
"""The part behind the trunk, in the words of the authors' code."""

MAX_WINDOW = 32
"""Side of a window in pixels: N = window ** 2 pixels have N ** 2 pairs. Published networks have up to 16."""

fx.wrap("check_whole_windows")  # a trace keeps the check as one call

_DERIVED = ("attn.relative_position_index", "attn_mask")
_BIAS = "attn.relative_position_bias_table"


def detect(state: Mapping[str, Tensor]) -> bool:
    """Whether there is a table of relative position biases where SwinIR has one."""
    return any(key.startswith("layers.") and key.endswith(_BIAS) for key in state)


def canonical(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the buffers that some files hold, which follow from the window alone.

    Networks that fold pixels first have their first convolution at the second place of a sequence.
    """
    return {
        key.replace("conv_first.1.", "conv_first."): tensor
        for key, tensor in state.items()
        if not key.endswith(_DERIVED) and key != "mean"
    }


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


def trunk_convs(dim: int, convs: int) -> nn.Conv2d | nn.Sequential:
    """The convolution behind a group: one of 3x3, or three of which the inner ones have a quarter of the channels."""
    if convs == 1:
        return conv3(dim, dim)
    narrow = dim // 4
    inner = nn.Conv2d(narrow, narrow, 1)
    return nn.Sequential(conv3(dim, narrow), nn.LeakyReLU(SLOPE), inner, nn.LeakyReLU(SLOPE), conv3(narrow, dim))


class SwinGroup(nn.Module):
    """Layers that alternate between no shift and half a window's, then a convolution: the paper's RSTB, [B, H, W, C]."""

    def __init__(self, dim: int, depth: int, heads: int, window: int, hidden: int, convs: int = 1) -> None:
        super().__init__()
        shifts = [window // 2 if i % 2 else 0 for i in range(depth)]
        blocks = nn.Sequential(*(SwinLayer(dim, heads, window, shift, hidden) for shift in shifts))
        self.residual_group = nn.ModuleDict({"blocks": blocks})
        self.conv = trunk_convs(dim, convs)

    def forward(self, x: Tensor) -> Tensor:
        y = planes(self.residual_group["blocks"](x))
        return x + tokens(self.conv(cast_to_weights(self.conv, y)))


def tokens(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H, W, C]."""
    return x.permute(0, 2, 3, 1)


def planes(x: Tensor) -> Tensor:
    """[B, H, W, C] -> [B, C, H, W]."""
    return x.permute(0, 3, 1, 2)


class SwinIR(Upscaler):
    """SwinIR with any of its four heads. Noise channels are an addition of this engine.

    H and W are multiples of ``align``. The windows start at the tile's origin, which must therefore sit on the window grid
    of the whole image: no halo repairs a misaligned tile. The defaults are the paper's SwinIR-M.

    Args:
        dim: channels of the residual stream.
        depths: layers in each group.
        heads: attention heads in each group.
        window: side of a window in pixels of the trunk.
        hidden: channels inside the MLPs.
        features: channels behind the trunk, in heads that enlarge and then convolve.
        scale: enlargement; 1 without a head.
        noise_channels: input channels beside RGB; without folded pixels only.
        head: the part behind the trunk.
        fold: side of the squares of pixels that are folded into channels first.
        image_channels: channels of the image that the network sees and makes: 1 (luma) or 3.
        convs: convolutions behind each group and behind the trunk: 1 or 3.

    Raises:
        ModelError: a scale that the head has not, heads that do not divide ``dim``, noise channels or no head with folded
            pixels.
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
        *,
        head: Head = "nearest+conv",
        fold: int = 1,
        image_channels: int = RGB,
        convs: int = 1,
    ) -> None:
        super().__init__()
        self.factors = _factors(head, scale * fold)
        if fold != 1 and (noise_channels or head == "none"):
            raise ModelError(f"SwinIR with fold {fold}: has a head and no noise channels; use fold 1")
        self.scale, self.align, self.fold, self.window = scale, window * fold, fold, window
        self.head, self.depths = head, tuple(depths)
        self.noise_channels, self.image_channels = noise_channels, image_channels
        self.range = JPEG_RANGE if window == JPEG_WINDOW else 1.0
        self.register_buffer("mean", torch.tensor(MEAN, device="cpu").view(1, 3, 1, 1), persistent=False)
        self.conv_first = conv3(image_channels * fold**2, dim)
        self.conv_noise = noise_conv(noise_channels, dim)
        self.patch_embed = nn.ModuleDict({"norm": nn.LayerNorm(dim)})
        groups = zip(depths, heads, strict=True)
        self.layers = nn.Sequential(*(SwinGroup(dim, depth, n, window, hidden, convs) for depth, n in groups))
        self.norm = nn.LayerNorm(dim)
        self.conv_after_body = trunk_convs(dim, convs)
        self.ends = ("conv_first", "conv_noise", "conv_last")
        self._add_head(dim, features)
        self.apply(_start_linear)

    def _add_head(self, dim: int, features: int) -> None:
        """Create the layers behind the trunk, under the names of the authors' code."""
        if self.head == "pixelshuffledirect":
            self.upsample = nn.Sequential(
                conv3(dim, self.image_channels * self.factors[0] ** 2), nn.PixelShuffle(self.factors[0])
            )
            self.ends = ("conv_first", "conv_noise", "upsample.0")
            return
        if self.head != "none":
            self.conv_before_upsample = nn.Sequential(conv3(dim, features), nn.LeakyReLU())
        if self.head == "nearest+conv":
            for number in range(1, len(self.factors) + 1):
                self.add_module(f"conv_up{number}", conv3(features, features))
            self.conv_hr = conv3(features, features)
        if self.head == "pixelshuffle":
            layers = [(conv3(features, features * f**2), nn.PixelShuffle(f)) for f in self.factors]
            self.upsample = nn.Sequential(*(layer for pair in layers for layer in pair))
        self.conv_last = conv3(dim if self.head == "none" else features, self.image_channels)

    @property
    def blocks(self) -> nn.Sequential:
        """Blocks of the trunk."""
        return self.layers

    def trunk(self, x: Tensor) -> Tensor:
        """[B, 3 + noise channels, H, W] -> features [B, C, H / fold, W / fold]; without a head, the result less its mean."""
        x = check_whole_windows(x, self.align)
        image = image_of(x, self.noise_channels, self.image_channels)
        if self.image_channels == RGB:
            image = image - self.mean
        if self.range != 1:
            image = image * self.range
        if self.fold > 1:
            image = F.pixel_unshuffle(image, self.fold)
        y = self.patch_embed["norm"](tokens(self._first_features(image, x)))
        for group in self.layers:
            y = group(y)
        y = cast_to_weights(self.conv_after_body, planes(self.norm(y)))
        # Computed twice, as in RRDBNet, so that no map is live through all layers.
        x = self.conv_after_body(y) + self._first_features(image, x)
        if self.head == "none":
            residual: Tensor = self.conv_last(cast_to_weights(self.conv_last, x))
            return image + residual
        return cast_to_weights(self.upsample if self.head == "pixelshuffledirect" else self.conv_before_upsample, x)

    def _first_features(self, image: Tensor, x: Tensor) -> Tensor:
        """Features of the image and of the noise channels in the input ``x``."""
        return add_noise_features(self.conv_first(image), self.conv_noise, x)

    def tail(self, x: Tensor) -> Tensor:
        """Features -> image, ``scale`` times as large; see ``layers.TAIL_REACH``."""
        if self.head != "none":
            x = self._enlarge(x)
        if self.range != 1:
            x = x / self.range
        return rgb_of(x + self.mean if self.image_channels == RGB else x, self.image_channels)

    def _enlarge(self, x: Tensor) -> Tensor:
        if self.head == "pixelshuffledirect":
            direct: Tensor = self.upsample(x)
            return direct
        x = self.conv_before_upsample(x)
        if self.head == "pixelshuffle":
            x = self.upsample(x)
        else:
            for number in range(1, len(self.factors) + 1):
                conv = self.get_submodule(f"conv_up{number}")
                x = F.leaky_relu(conv(F.interpolate(x, scale_factor=2, mode="nearest")), SLOPE)
            x = F.leaky_relu(self.conv_hr(x), SLOPE)
        result: Tensor = self.conv_last(cast_to_weights(self.conv_last, x))
        return result

    def _seen_by(self, q: int) -> tuple[int, int]:
        """An attention layer extends an interval to whole (shifted) windows."""
        after_body = 1 if isinstance(self.conv_after_body, nn.Conv2d) else 2
        tails = {
            "none": [(1, 1)],
            "pixelshuffledirect": [(0, self.factors[0]), (1, 1)] if self.factors else [],
            "pixelshuffle": [*((1, factor) for factor in reversed(self.factors)), (2, 1)],
            "nearest+conv": [(2, 1), *((1, factor) for factor in self.factors), (1, 1)],
        }
        low, high = seen(q, q, [*tails[self.head], (after_body, 1)])
        for depth in reversed(self.depths):
            low, high = self._seen_by_group(depth, low - after_body, high + after_body)
        low, high = seen(low, high, [(1, 1)])  # conv_first
        return low * self.fold, high * self.fold + self.fold - 1

    def _seen_by_group(self, depth: int, low: int, high: int) -> tuple[int, int]:
        window = self.window
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
        dim, inputs = state["conv_first.weight"].shape[:2]
        image_channels, fold = _image_of(inputs)
        head, enlargement, features = _head_of(state, image_channels)
        if enlargement % fold:
            raise ModelError(f"a trunk enlarged {enlargement} times with fold {fold}; whole scales are built")
        return cls(
            dim=check_count(dim, MAX_CHANNELS, "channels"),
            depths=depths,
            heads=[table.shape[1] for table in tables],
            window=check_count(_window_of(tables[0]), MAX_WINDOW, "pixels a window's side"),
            hidden=check_count(state[block.format(0) + "0.mlp.fc1.weight"].shape[0], MAX_CHANNELS, "hidden channels"),
            features=check_count(features, MAX_CHANNELS, "features"),
            scale=enlargement // fold,
            noise_channels=noise_channels_of(state),
            head=head,
            fold=fold,
            image_channels=image_channels,
            convs=3 if "conv_after_body.0.weight" in state else 1,
        )


def _factors(head: Head, enlargement: int) -> tuple[int, ...]:
    """Factors by which a head enlarges, one after another. Raises ModelError for an enlargement that it has not."""
    doublings = enlargement.bit_length() - 1
    if 1 <= enlargement <= MAX_SCALE:
        if head == "none" and enlargement == 1:
            return ()
        if head == "pixelshuffledirect" or (head == "pixelshuffle" and enlargement == 3):
            return (enlargement,)
        if head != "none" and enlargement == 2**doublings > 1:
            return (2,) * doublings
    raise ModelError(
        f"SwinIR of scale {enlargement} with head {head}: does not exist; use a power of two, or 1 without a head"
    )


def _image_of(inputs: int) -> tuple[int, int]:
    """(channels of the image, fold) of a network whose first convolution takes these channels. Raises ModelError."""
    fold = isqrt(inputs // RGB)
    if inputs == GREY:
        return GREY, 1
    if not fold or RGB * fold**2 != inputs:
        raise ModelError(
            f"takes {inputs} channels; networks of grey or RGB images are built, with or without folded pixels"
        )
    return RGB, fold


def _head_of(state: Mapping[str, Tensor], image_channels: int) -> tuple[Head, int, int]:
    """Head of canonical tensors, the factor by which it enlarges, and the channels behind the trunk."""
    shuffles = sorted(key for key in state if key.startswith("upsample.") and key.endswith(".weight"))
    if "conv_before_upsample.0.weight" in state:
        features = state["conv_before_upsample.0.weight"].shape[0]
        if shuffles:
            factor = shuffle_factor(state[shuffles[0]].shape[0], features)
            return "pixelshuffle", factor ** len(shuffles), features
        numbers = [int(key[len("conv_up")]) for key in state if key.startswith("conv_up") and key.endswith(".weight")]
        return "nearest+conv", 1 << max(numbers, default=1), features
    if shuffles:
        return "pixelshuffledirect", shuffle_factor(state[shuffles[0]].shape[0], image_channels), 1
    return "none", 1, 1


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
