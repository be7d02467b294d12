"""blend: one strip out of two overlapping tiles, for plans with a blend width.

Across an overlap of width W the first tile has the weight w(i) at position i, the second one 1 - w(i):
linear w = (W - i - 1/2) / W, cosine w = (1 + cos(pi (i + 1/2) / W)) / 2. Both are symmetric, w(i) = 1 - w(W - 1 - i),
so a pixel depends on the two tiles and its position, not on which tile was finished first, and is written once.

Where four tiles meet, the upper two are blended along x, the lower two along x, and the two strips along y. The weights
are then products, with no more in memory than the strips. The strips in between are float32: only the last step rounds.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from engine.kernels.launch import block_and_grid, jit, launch, tl, use_kernel
from engine.kernels.trim import MAX_VALUE

RAMPS = ("linear", "cosine")


@functools.lru_cache(maxsize=16)
def weights(width: int, ramp: str, device: torch.device) -> Tensor:
    """Weights of the first tile over an overlap of ``width``: float32 [W]. Raises ValueError for another ramp."""
    if ramp not in RAMPS:
        raise ValueError(f"ramp {ramp!r}: unknown; use one of {', '.join(RAMPS)}")
    positions = (torch.arange(width, dtype=torch.float64) + 0.5) / width
    values = 1.0 - positions if ramp == "linear" else (1.0 + torch.cos(math.pi * positions)) / 2.0
    return values.to(torch.float32).to(device)


def blend_torch(
    first: Tensor, second: Tensor, axis: str, ramp: str = "linear", dtype: torch.dtype = torch.float32
) -> Tensor:
    """Cross-fade of two values of one strip. The overlap's width is the strip's along ``axis``.

    Args:
        first: strip of the left (``axis`` "x") or the upper tile ("y"), [C, h, w] in [0, 1], any float dtype and strides.
        second: strip of the right or the lower tile, of the same shape and dtype.
        axis: "x" or "y".
        ramp: one of ``RAMPS``.
        dtype: float32, or uint8 rounded half to even.

    Returns:
        [C, h, w] of ``dtype``, contiguous.

    Raises:
        ValueError: strips that differ in shape or dtype, another axis, ramp or dtype.
    """
    _check(first, second, axis, dtype)
    weight = weights(first.shape[2 if axis == "x" else 1], ramp, first.device)
    weight = weight if axis == "x" else weight[:, None]
    values = first.float() * weight + second.float() * (1.0 - weight)
    if not MAX_VALUE[dtype]:
        return values.contiguous()
    return (values.clamp(0.0, 1.0) * float(MAX_VALUE[dtype])).round().to(dtype).contiguous()


def _check(first: Tensor, second: Tensor, axis: str, dtype: torch.dtype) -> None:
    if first.shape != second.shape or first.dtype != second.dtype or first.dim() != 3:
        raise ValueError(
            f"{first.dtype} {tuple(first.shape)} and {second.dtype} {tuple(second.shape)}: not one strip; "
            "pass two of one shape [C, h, w] and dtype"
        )
    if axis not in ("x", "y"):
        raise ValueError(f"axis {axis!r}: unknown; use x or y")
    if dtype not in MAX_VALUE:
        raise ValueError(f"{dtype}: cannot be written; use one of {', '.join(map(str, MAX_VALUE))}")


@jit()
def _blend_kernel(
    first: tl.tensor,
    second: tl.tensor,
    weight: tl.tensor,
    target: tl.tensor,
    first_c: tl.tensor,
    first_y: tl.tensor,
    first_x: tl.tensor,
    second_c: tl.tensor,
    second_y: tl.tensor,
    second_x: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    along_x: tl.constexpr,
    max_value: tl.constexpr,
    block_y: tl.constexpr,
    block_x: tl.constexpr,
) -> None:
    """One block of one channel. The weights are read, not computed: the same bits on every device."""
    c = tl.program_id(2).to(tl.int64)
    row = (tl.program_id(1) * block_y + tl.arange(0, block_y)[:, None]).to(tl.int64)
    column = (tl.program_id(0) * block_x + tl.arange(0, block_x)[None, :]).to(tl.int64)
    valid = (row < height) & (column < width)
    a = tl.load(first + c * first_c + row * first_y + column * first_x, mask=valid, other=0.0).to(tl.float32)
    b = tl.load(second + c * second_c + row * second_y + column * second_x, mask=valid, other=0.0).to(tl.float32)
    position = column if along_x else row
    w = tl.load(weight + position, mask=position < (width if along_x else height), other=0.0)
    value = a * w + b * (1.0 - w)
    if max_value:
        value = tl.minimum(tl.maximum(value, 0.0), 1.0) * max_value
        value = (value + 12582912.0) - 12582912.0  # to the nearest whole number, ties to even
    tl.store(target + (c * height + row) * width + column, value.to(target.dtype.element_ty), mask=valid)


def blend(
    first: Tensor,
    second: Tensor,
    axis: str,
    ramp: str = "linear",
    dtype: torch.dtype = torch.float32,
    *,
    use_triton: bool | None = None,
) -> Tensor:
    """``blend_torch`` in one pass where there is a kernel, with the same bits."""
    if not use_kernel(first.device, use_triton):
        return blend_torch(first, second, axis, ramp, dtype)
    _check(first, second, axis, dtype)
    channels, height, width = first.shape
    target = torch.empty(first.shape, dtype=dtype, device=first.device)
    weight = weights(width if axis == "x" else height, ramp, first.device)
    (block_y, block_x), grid = block_and_grid(height, width)
    launch(
        _blend_kernel,
        (*grid, channels),
        *(first, second, weight, target, *first.stride(), *second.stride(), height, width),
        along_x=axis == "x",
        max_value=MAX_VALUE[dtype],
        block_y=block_y,
        block_x=block_x,
        enable_fp_fusion=False,
    )
    return target
