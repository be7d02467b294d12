"""SwinIR for the Triton kernels of a GPU: padded channels, and layers of three kernels; for inference in half precision.

``pack`` turns a network into one that is equal up to rounding. 180 channels become 192 and heads of 30 become 32, so that a
pixel and a head begin at a multiple of 16 bytes. The bias of every pair of pixels is computed once. The padding is zero
throughout: LayerNorm stays that of the true channels, and its weights enter the linear map that follows it. Files are never
packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engine.archs.layers import PixelRows, WindowRows
from engine.archs.swinir import SwinIR, SwinLayer, WindowAttention
from engine.kernels.layer_norm import layer_norm
from engine.kernels.mlp import MlpWeights, mlp
from engine.kernels.norm_linear import fold_norm, norm_linear
from engine.kernels.window_attention import window_attention


@torch.no_grad()
def pack(network: SwinIR, dtype: torch.dtype) -> SwinIR:
    """Pad the trunk and replace its layers, in place; returns the network.

    Args:
        network: network in float32.
        dtype: dtype of the linear maps and of the inner convolutions, as for ``SwinIR.to_mixed``.
    """
    parts: Any = network  # its modules are replaced by others of another type
    width, stream = padded(parts.conv_first.out_channels), parts.conv_first.weight.dtype
    for conv in (parts.conv_first, parts.conv_noise):
        if conv is not None:
            _pad_conv(conv, conv.in_channels, width)
    parts.patch_embed["norm"] = PackedNorm(parts.patch_embed["norm"], width, stream)
    for group in parts.layers:
        blocks = group.residual_group["blocks"]
        for i, layer in enumerate(blocks):
            blocks[i] = PackedLayer(layer, width, dtype)
        _pad_trunk_convs(group.conv, width)
    parts.norm = PackedNorm(parts.norm, width, dtype)
    _pad_trunk_convs(parts.conv_after_body, width)
    first = {"none": "conv_last", "pixelshuffledirect": "upsample.0"}.get(network.head, "conv_before_upsample.0")
    head = parts.get_submodule(first)
    _pad_conv(head, width, head.out_channels)
    return network.to_mixed(dtype)


class PackedNorm(PixelRows):
    """LayerNorm of the true channels of a padded residual stream."""

    macs = 0
    weight: Tensor
    bias: Tensor

    def __init__(self, norm: nn.LayerNorm, width: int, dtype: torch.dtype) -> None:
        """``width``: channels of the padded stream; ``dtype``: that of the result."""
        super().__init__()
        self.channels, self.dtype = _channels(norm), dtype
        self.register_buffer("weight", _enlarged(norm.weight, width))
        self.register_buffer("bias", _enlarged(norm.bias, width))

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.channels, self.dtype)


class PackedAttention(WindowRows):
    """LayerNorm and ``WindowAttention`` without its output projection: padded stream [B, H, W, C] -> [B, H, W, heads * d].

    ``d``: channels of a head, padded.
    """

    weight: Tensor
    qkv_bias: Tensor
    bias: Tensor

    def __init__(self, norm: nn.LayerNorm, attn: WindowAttention, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.channels, self.window, self.shift = _channels(norm), attn.window, attn.shift
        d = self.channels // attn.heads
        self.scale, shape = d**-0.5, (3, attn.heads, _power_of_two(d))
        weight, bias = fold_norm(norm.weight, norm.bias, attn.qkv.weight, attn.qkv.bias)
        weight, bias = (tensor.view(3, attn.heads, d, *tensor.shape[1:]) for tensor in (weight, bias))
        self.register_buffer("weight", _enlarged(weight, *shape, width).flatten(0, 2).to(dtype))
        self.register_buffer("qkv_bias", _enlarged(bias, *shape).flatten().to(dtype))
        self.register_buffer("bias", attn.bias.contiguous())

    @property
    def macs(self) -> int:
        """Multiply-adds of a pixel in the linear map."""
        return self.weight.numel()

    @property
    def workspace(self) -> int:
        """Bytes of each pixel: queries, keys and values, and what the definition takes in addition to them."""
        logits = 2 * self.bias.shape[0] * self.window**2 * 4
        return 3 * self.weight.shape[0] * self.weight.itemsize + logits

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x, None)

    def attend(self, x: Tensor, seams: Sequence[int] | None) -> Tensor:
        qkv = norm_linear(x, self.channels, self.weight, self.qkv_bias)
        return window_attention(qkv, self.bias, self.window, self.shift, self.scale, seams)


class PackedMlp(PixelRows):
    """Output projection of the attention and the MLP, both added to the residual stream."""

    def __init__(self, layer: SwinLayer, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.channels, heads = _channels(layer.norm2), layer.attn.heads
        d, hidden = self.channels // heads, padded(layer.mlp.fc1.out_features)
        proj = layer.attn.proj.weight.view(-1, heads, d)
        fc1, fc1_bias = fold_norm(layer.norm2.weight, layer.norm2.bias, layer.mlp.fc1.weight, layer.mlp.fc1.bias)
        weights = MlpWeights(
            proj=_enlarged(proj, width, heads, _power_of_two(d)).flatten(1),
            proj_bias=_enlarged(layer.attn.proj.bias, width),
            fc1=_enlarged(fc1, hidden, width),
            fc1_bias=_enlarged(fc1_bias, hidden),
            fc2=_enlarged(layer.mlp.fc2.weight, width, hidden),
            fc2_bias=_enlarged(layer.mlp.fc2.bias, width),
        )
        for name, tensor in weights._asdict().items():
            self.register_buffer(name, tensor.to(dtype))

    @property
    def macs(self) -> int:
        return sum(buffer.numel() for buffer in self.buffers() if buffer.ndim == 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """[..., C] and the attention's output [..., heads * d] -> [..., C]."""
        return mlp(x, y, MlpWeights(**{name: self.get_buffer(name) for name in MlpWeights._fields}), self.channels)


class PackedLayer(nn.Module):
    """``SwinLayer`` for a padded stream [B, H, W, C]."""

    def __init__(self, layer: SwinLayer, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.attn = PackedAttention(layer.norm1, layer.attn, width, dtype)
        self.mlp = PackedMlp(layer, width, dtype)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.mlp(x, self.attn(x))
        return result


def padded(channels: int) -> int:
    """Smallest 2^k or 3 * 2^k that holds ``channels``, 16 at least: kernels then have no incomplete block of columns."""
    whole = _power_of_two(channels)
    return whole * 3 // 4 if whole >= 64 and channels <= whole * 3 // 4 else whole


def _channels(norm: nn.LayerNorm) -> int:
    return norm.normalized_shape[0]


def _power_of_two(channels: int) -> int:
    """Smallest power of two that holds ``channels``, 16 at least: a matrix instruction takes no fewer."""
    return max(16, 1 << (channels - 1).bit_length())


def _enlarged(tensor: Tensor, *shape: int) -> Tensor:
    """``tensor`` in the first corner of zeros of a larger ``shape``."""
    result = tensor.new_zeros(shape)
    result[tuple(map(slice, tensor.shape))] = tensor
    return result


def _pad_trunk_convs(convs: nn.Module, width: int) -> None:
    """Pad the input and the output of the convolution behind a group, or of the first and the last of several."""
    layers = [module for module in convs.modules() if isinstance(module, nn.Conv2d)]
    first, last = layers[0], layers[-1]
    if first is last:
        _pad_conv(first, width, width)
        return
    _pad_conv(first, width, first.out_channels)
    _pad_conv(last, last.in_channels, width)


def _pad_conv(conv: nn.Conv2d, inputs: int, outputs: int) -> None:
    """Add channels in place: new inputs have no influence, new outputs are zero."""
    conv.weight = nn.Parameter(_enlarged(conv.weight, outputs, inputs, *conv.kernel_size), requires_grad=False)
    if conv.bias is not None:
        conv.bias = nn.Parameter(_enlarged(conv.bias, outputs), requires_grad=False)
    conv.in_channels, conv.out_channels = inputs, outputs
