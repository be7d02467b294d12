"""layer_norm: LayerNorm over the first channels of every pixel, written in the dtype of its reader.

A network may pad its channels with zeros, so that every pixel begins at a multiple of 16 bytes: LayerNorm is over the true
channels, and the padding stays zero (Ba, Kiros, Hinton, "Layer Normalization", 2016). ``norm_linear`` and ``mlp`` contain
the same operation: they share ``normalised``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.kernels.launch import column_blocks, is_interpreting, jit, launch, tl, use_kernel

EPSILON = 1e-5
"""Added to the variance; ``torch.nn.LayerNorm``'s default."""

_PIXELS = 16  # of a program
_INTERPRETED_PIXELS = 256


def layer_norm_torch(x: Tensor, weight: Tensor, bias: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """LayerNorm of every pixel, in float32.

    Args:
        x: [..., C] float32; channels past ``channels`` are zero.
        weight: [C] float32; factors of the normalised channels, zero past ``channels``.
        bias: [C] float32, zero past ``channels``.
        channels: number of channels that are normalised, at most C.
        dtype: dtype of the result.

    Returns:
        [..., C]; channels past ``channels`` are zero.
    """
    y = F.layer_norm(x[..., :channels], (channels,), weight[:channels], bias[:channels], EPSILON).to(dtype)
    return F.pad(y, (0, x.shape[-1] - channels)) if channels < x.shape[-1] else y


def normalised_torch(x: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """``layer_norm_torch`` without weights."""
    y = F.layer_norm(x[..., :channels], (channels,), eps=EPSILON).to(dtype)
    return F.pad(y, (0, x.shape[-1] - channels)) if channels < x.shape[-1] else y


@jit()
def normalised(
    x: tl.tensor,
    x_rest: tl.tensor,
    eps: tl.tensor,
    channels: tl.constexpr,
    block: tl.constexpr,
    rest: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Normalise pixels in two blocks of columns, [M, block] and [M, rest]; ``rest`` may be 0.

    Columns past ``channels`` are zero before, and must meet weights of zero afterwards.
    """
    c = tl.arange(0, block)
    total = tl.sum(x, 1)
    if rest:
        total += tl.sum(x_rest, 1)
    mean = (total / channels)[:, None]
    centred = tl.where((c < channels)[None, :], x - mean, 0.0)
    squares = tl.sum(centred * centred, 1)
    if rest:
        c_rest = block + tl.arange(0, rest)
        centred = tl.where((c_rest < channels)[None, :], x_rest - mean, 0.0)
        squares += tl.sum(centred * centred, 1)
    factor = (1.0 / tl.sqrt(squares / channels + eps))[:, None]
    x = (x - mean) * factor
    if rest:
        x_rest = (x_rest - mean) * factor
    return x, x_rest


@jit(do_not_specialize=("pixels",))
def _layer_norm_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    pixels: tl.tensor,
    eps: tl.tensor,
    channels: tl.constexpr,
    block_m: tl.constexpr,
    block: tl.constexpr,
    rest: tl.constexpr,
) -> None:
    """``block_m`` pixels; those of the last program overlap with its neighbour's."""
    width: tl.constexpr = block + rest
    first = min(tl.program_id(0) * block_m, pixels - block_m).to(tl.int64) * width
    at = (tl.arange(0, block_m) * width)[:, None] + tl.arange(0, block)[None, :]
    values, values_rest = tl.load(x + first + at), tl.zeros([block_m, 16], tl.float32)
    if rest:
        at_rest = (tl.arange(0, block_m) * width + block)[:, None] + tl.arange(0, rest)[None, :]
        values_rest = tl.load(x + first + at_rest)
    values, values_rest = normalised(values, values_rest, eps, channels, block, rest)
    c, c_rest = tl.arange(0, block)[None, :], block + tl.arange(0, rest if rest else 16)[None, :]
    tl.store(out + first + at, (values * tl.load(weight + c) + tl.load(bias + c)).to(out.dtype.element_ty))
    if rest:
        values_rest = values_rest * tl.load(weight + c_rest) + tl.load(bias + c_rest)
        tl.store(out + first + at_rest, values_rest.to(out.dtype.element_ty))


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, channels: int, dtype: torch.dtype, *, use_triton: bool | None = None
) -> Tensor:
    """``layer_norm_torch`` by the kernel where there is one.

    The kernel is for 16 pixels and more of two blocks of channels (``column_blocks``) and not for training: unless forced
    (ValueError), other shapes take the definition.
    """
    block, rest = column_blocks(x.shape[-1])
    pixels, block_m = x.numel() // x.shape[-1], _PIXELS
    fits = block + rest == x.shape[-1] and pixels >= block_m
    if use_triton is None and (not fits or torch.is_grad_enabled()):
        use_triton = False
    if not use_kernel(x.device, use_triton):
        return layer_norm_torch(x, weight, bias, channels, dtype)
    if not fits:
        raise ValueError(f"{pixels} pixels of {x.shape[-1]} channels: not for this kernel; leave out use_triton")
    if is_interpreting():
        block_m = max(block_m, min(_INTERPRETED_PIXELS, 1 << (pixels.bit_length() - 1)))
    x = x.contiguous()
    out = torch.empty_like(x, dtype=dtype)
    launch(
        _layer_norm_kernel,
        (-(-pixels // block_m),),
        *(x, weight, bias, out, pixels, EPSILON),
        channels=channels,
        block_m=block_m,
        block=block,
        rest=rest,
        num_warps=4,
    )
    return out
