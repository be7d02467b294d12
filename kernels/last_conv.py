"""last_conv: the last convolution of an upscaler, from features in half precision to RGB with float32's accuracy.

In mixed precision the last convolution's weights stay float32. PyTorch then needs the features as float32, a copy of 16 times
as many values as the trunk has (C channels, 6 bytes each way), for a product with only 3 columns. Here the weights are sums of
three halves, side by side in the 16 columns that a tensor core multiplies at least: the features are read once as they are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.kernels.launch import is_interpreting, jit, launch, tl, use_kernel

COLORS, PARTS, COLUMNS = 3, 3, 16
"""Output channels, halves that a weight is the sum of, and columns of the product."""

_STEP = {torch.float16: 2.0**11, torch.bfloat16: 2.0**8}
"""Factor between the parts of a weight: each part is scaled to where its predecessor's rounding error is representable."""

_BLOCK = (8, 16)
_INTERPRETED_BLOCK = (16, 64)


class PackedWeights(NamedTuple):
    """Result of ``pack_last``."""

    factors: Tensor
    """[9, C, 16], half precision: column COLORS p + c is part p of color c."""

    scales: Tensor
    """float32 [3, 16]: what each column adds to each color."""


def pack_last(weight: Tensor, dtype: torch.dtype) -> PackedWeights:
    """Split weights for ``last_conv``, once for a network.

    Args:
        weight: float32 [3, C, 3, 3].
        dtype: float16 or bfloat16. The sum of the parts has 33 or 24 bits.
    """
    outputs, inputs = weight.shape[:2]
    if outputs != COLORS:
        raise ValueError(f"{outputs} output channels: not an image; pass a convolution to {COLORS}")
    factors = torch.zeros(9, inputs, COLUMNS, dtype=dtype, device=weight.device)
    scales = torch.zeros(COLORS, COLUMNS, dtype=torch.float32, device=weight.device)
    rest, scale = weight.float().permute(2, 3, 1, 0).reshape(9, inputs, COLORS), 1.0
    for part in range(PARTS):
        columns = slice(COLORS * part, COLORS * (part + 1))
        factors[:, :, columns] = rest.to(dtype)
        scales[:, columns] = torch.eye(COLORS, device=weight.device) * scale
        rest = (rest - factors[:, :, columns].float()) * _STEP[dtype]
        scale /= _STEP[dtype]
    return PackedWeights(factors, scales)


def last_conv_torch(x: Tensor, weight: Tensor, bias: Tensor, top: int = 0, rows: int | None = None) -> Tensor:
    """3x3 convolution with zero padding to an image.

    Args:
        x: features [B, C, H, W], float32 or half precision.
        weight: float32 [3, C, 3, 3].
        bias: float32 [3].
        top, rows: first row of x whose result is returned, and their number; by default all.

    Returns:
        float32 [B, 3, rows, W].
    """
    return F.conv2d(x.to(weight.dtype), weight, bias, padding=1)[:, :, top : None if rows is None else top + rows]


@jit()
def _last_conv_kernel(
    x: tl.tensor,
    factors: tl.tensor,
    scales: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    x_batch: tl.tensor,
    x_row: tl.tensor,
    x_pixel: tl.tensor,
    out_batch: tl.tensor,
    out_color: tl.tensor,
    out_row: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    top: tl.tensor,
    rows: tl.tensor,
    inputs: tl.constexpr,
    columns: tl.constexpr,
    upcast: tl.constexpr,
    block_y: tl.constexpr,
    block_x: tl.constexpr,
    block_k: tl.constexpr,
) -> None:
    """block_y x block_x pixels of [rows, width]: a product of [pixels, 9 inputs] with ``factors`` [9, inputs, columns]."""
    row, column = tl.program_id(1) * block_y, tl.program_id(0) * block_x
    image = tl.program_id(2).to(tl.int64)
    m = tl.arange(0, block_y * block_x)
    line, x_at = row + m // block_x, column + m % block_x
    y = top + line
    k, n = tl.arange(0, block_k), tl.arange(0, columns)
    corner = x + image * x_batch + (y - 1).to(tl.int64) * x_row + (x_at - 1).to(tl.int64) * x_pixel
    products = tl.zeros([block_y * block_x, columns], tl.float32)
    for step in range(9 * tl.cdiv(inputs, block_k)):
        tap, part = step % 9, step // 9 * block_k
        dy, dx = tap // 3 - 1, tap % 3 - 1
        mask = ((y + dy >= 0) & (y + dy < height) & (x_at + dx >= 0) & (x_at + dx < width))[:, None]
        factor_mask = (k < inputs - part)[:, None] & (n < columns)[None, :]
        source = (corner + (tap // 3 * x_row + tap % 3 * x_pixel + part))[:, None] + k[None, :]
        a = tl.load(source, mask=mask & (k < inputs - part)[None, :], other=0.0)
        b = tl.load(factors + (tap * inputs + part + k)[:, None] * columns + n[None, :], mask=factor_mask, other=0.0)
        if upcast:  # the interpreter multiplies the bits of bfloat16 as if they were integers
            a, b = a.to(tl.float32), b.to(tl.float32)
        products = tl.dot(a, b, acc=products, input_precision="ieee")
    valid = (line < rows) & (x_at < width)
    target = out + image * out_batch + line.to(tl.int64) * out_row + x_at
    for color in tl.static_range(3):
        scale = tl.load(scales + color * columns + n)
        value = tl.sum(products * scale[None, :], axis=1) + tl.load(bias + color)
        tl.store(target + tl.full((1,), color, tl.int64) * out_color, value, mask=valid)


def last_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    packed: PackedWeights | None = None,
    top: int = 0,
    rows: int | None = None,
    *,
    use_triton: bool | None = None,
) -> Tensor:
    """``last_conv_torch`` in one pass where there is a kernel and ``x`` is in half precision; sums in another order.

    Args:
        x, weight, bias, top, rows: as for ``last_conv_torch``; the kernel takes channels-last ``x`` as it is, and copies others.
        packed: ``pack_last(weight, x.dtype)``, computed once by the caller; None packs them in every call.
        use_triton: see ``engine.kernels.launch``.
    """
    if x.dtype not in _STEP or not use_kernel(x.device, use_triton):
        return last_conv_torch(x, weight, bias, top, rows)
    pixels = x.permute(0, 2, 3, 1)
    if pixels.stride(3) != 1:
        pixels = pixels.contiguous()
    factors, scales = packed or pack_last(weight, x.dtype)
    batch, height, width, inputs = pixels.shape
    rows = height - top if rows is None else rows
    out = torch.empty(batch, COLORS, rows, width, device=x.device)
    block_y, block_x = _INTERPRETED_BLOCK if is_interpreting() else _BLOCK
    launch(
        _last_conv_kernel,
        (-(-width // block_x), -(-rows // block_y), batch),
        *(
            pixels,
            factors,
            scales,
            bias.float(),
            out,
            *pixels.stride()[:3],
            *out.stride()[:3],
            height,
            width,
            top,
            rows,
        ),
        inputs=inputs,
        columns=COLUMNS,
        upcast=is_interpreting() and x.dtype == torch.bfloat16,
        block_y=block_y,
        block_x=block_x,
        block_k=min(64, max(16, 1 << (inputs - 1).bit_length())),
        num_warps=4,
        num_stages=3,
    )
    return out
