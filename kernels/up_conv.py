"""up_conv: nearest-neighbour x2, a 3x3 convolution and a leaky ReLU, without the enlarged map.

Each of the four phases (output rows and columns, even or odd) sees 2x2 pixels of the small map, some of them through two or
four of the nine weights. So the same values come from four 2x2 convolutions of the small map, with 4/9 of the products.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.kernels.launch import is_interpreting, jit, launch, tl, use_kernel

PHASES = ((0, 0), (0, 1), (1, 0), (1, 1))
"""(row, column) of each phase within a pixel of the small map."""

_HALF = (torch.float16, torch.bfloat16)
_BLOCK = (8, 16)
_INTERPRETED_BLOCK = (16, 32)


def pack_phases(weight: Tensor) -> Tensor:
    """Weights of the four 2x2 convolutions: [N, C, 3, 3] -> [4, 2, 2, C, N], sums in float32, in the weights' dtype.

    Phase (a, b) sees rows y - 1 + a and y + a of the small map, and columns likewise.
    """
    taps = weight if weight.dtype == torch.float64 else weight.float()
    rows = [_pairs(taps, 2, a) for a in (0, 1)]
    phases = [_pairs(rows[a], 3, b) for a, b in PHASES]
    return torch.stack(phases).permute(0, 3, 4, 2, 1).contiguous().to(weight.dtype)


def _pairs(weight: Tensor, axis: int, phase: int) -> Tensor:
    """Three taps along an axis as two: the pixel that an even phase sees twice is the second, an odd phase's the first."""
    first, middle, last = weight.unbind(axis)
    return torch.stack([first, middle + last] if phase == 0 else [first + middle, last], axis)


def up_conv_torch(x: Tensor, weight: Tensor, bias: Tensor, slope: float = 0.2) -> Tensor:
    """One upsampling of a network's tail.

    Args:
        x: features [B, C, H, W].
        weight: [N, C, 3, 3], in x's dtype.
        bias: [N], in x's dtype.
        slope: negative slope of the leaky ReLU.

    Returns:
        [B, N, 2H, 2W] in x's dtype.
    """
    return F.leaky_relu(F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1), slope)


@jit()
def _up_conv_kernel(
    x: tl.tensor,
    packed: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    x_batch: tl.tensor,
    x_row: tl.tensor,
    x_pixel: tl.tensor,
    out_batch: tl.tensor,
    out_row: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    across: tl.tensor,
    slope: tl.tensor,
    inputs: tl.constexpr,
    outputs: tl.constexpr,
    upcast: tl.constexpr,
    block_y: tl.constexpr,
    block_x: tl.constexpr,
    block_k: tl.constexpr,
    block_n: tl.constexpr,
) -> None:
    """One phase of block_y x block_x pixels of the small map: a product of [pixels, 4 inputs] with ``packed`` of the phase."""
    row, column = tl.program_id(0) // across * block_y, tl.program_id(0) % across * block_x
    phase = tl.program_id(1)
    a, b = phase // 2, phase % 2
    image = tl.program_id(2).to(tl.int64)
    m = tl.arange(0, block_y * block_x)
    y, x_at = row + m // block_x, column + m % block_x
    k, n = tl.arange(0, block_k), tl.arange(0, block_n)
    top, left = y - 1 + a, x_at - 1 + b
    corner = x + image * x_batch + top.to(tl.int64) * x_row + left.to(tl.int64) * x_pixel
    factors = packed + phase * (4 * inputs * outputs)
    products = tl.zeros([block_y * block_x, block_n], tl.float32)
    for step in range(4 * tl.cdiv(inputs, block_k)):
        tap, part = step % 4, step // 4 * block_k
        dy, dx = tap // 2, tap % 2
        mask = ((top + dy >= 0) & (top + dy < height) & (left + dx >= 0) & (left + dx < width))[:, None]
        factor_mask = (k < inputs - part)[:, None] & (n < outputs)[None, :]
        source = (corner + (dy * x_row + dx * x_pixel + part))[:, None] + k[None, :]
        pixels = tl.load(source, mask=mask & (k < inputs - part)[None, :], other=0.0)
        weights = tl.load(
            factors + (tap * inputs + part + k)[:, None] * outputs + n[None, :], mask=factor_mask, other=0.0
        )
        if upcast:  # the interpreter multiplies the bits of bfloat16 as if they were integers
            pixels, weights = pixels.to(tl.float32), weights.to(tl.float32)
        products = tl.dot(pixels, weights, acc=products, input_precision="ieee")
    products += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    products = tl.where(products >= 0, products, products * slope)
    valid = ((y < height) & (x_at < width))[:, None] & (n < outputs)[None, :]
    target = out + image * out_batch + (2 * y + a).to(tl.int64) * out_row + (2 * x_at + b).to(tl.int64) * outputs
    tl.store(target[:, None] + n[None, :], products.to(out.dtype.element_ty), mask=valid)


def up_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    slope: float = 0.2,
    packed: Tensor | None = None,
    *,
    use_triton: bool | None = None,
) -> Tensor:
    """``up_conv_torch`` in one pass where there is a kernel and ``x`` is in half precision.

    Args:
        x, weight, bias, slope: as for ``up_conv_torch``; the kernel takes channels-last ``x`` as it is, and copies others.
        packed: ``pack_phases(weight)``, computed once by the caller; None packs them in every call.
        use_triton: see ``engine.kernels.launch``.

    Returns:
        [B, N, 2H, 2W], channels-last from the kernel.
    """
    if x.dtype not in _HALF or not use_kernel(x.device, use_triton):
        return up_conv_torch(x, weight, bias, slope)
    pixels = x.permute(0, 2, 3, 1)
    if pixels.stride(3) != 1:
        pixels = pixels.contiguous()
    packed = pack_phases(weight) if packed is None else packed
    batch, height, width, inputs = pixels.shape
    outputs = weight.shape[0]
    out = torch.empty(batch, 2 * height, 2 * width, outputs, dtype=x.dtype, device=x.device)
    block_y, block_x = _INTERPRETED_BLOCK if is_interpreting() else _BLOCK
    across = -(-width // block_x)
    launch(
        _up_conv_kernel,
        (across * -(-height // block_y), len(PHASES), batch),
        *(pixels, packed, bias, out, *pixels.stride()[:3], *out.stride()[:2], height, width, across, slope),
        inputs=inputs,
        outputs=outputs,
        upcast=is_interpreting() and x.dtype == torch.bfloat16,
        block_y=block_y,
        block_x=block_x,
        block_k=min(64, max(16, 1 << (inputs - 1).bit_length())),
        block_n=max(16, 1 << (outputs - 1).bit_length()),
        num_warps=8 if outputs > 64 else 4,
        num_stages=3,
    )
    return out.permute(0, 3, 1, 2)
