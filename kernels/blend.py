"""blend: one strip out of two tiles that overlap, for plans with a blend width.

Across an overlap of width W the first tile's weight at position i is w(i), the second one's 1 - w(i):
linear w = (W - i - 1/2) / W, cosine w = (1 + cos(pi (i + 1/2) / W)) / 2. Both are symmetric, w(i) = 1 - w(W - 1 - i),
so a pixel depends on the two tiles and its position, not on which tile was finished first, and is written once.

Where four tiles meet, the two upper ones are blended along x, the two lower ones along x, and the two strips along y:
product weights, with no more in memory than the strips. The strips in between are float32, so that only the last step
rounds.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from engine.kernels.launch import area, jit, launch, takes_kernel, tl
from engine.kernels.trim import MAX_VALUE

RAMPS = ("linear", "cosine")


@functools.lru_cache(maxsize=16)
def weights(width: int, ramp: str, device: torch.device) -> Tensor:
    """The first tile's weights over an overlap of ``width``: float32 [W]. Raises ValueError for another ramp."""
    if ramp not in RAMPS:
        raise ValueError(f"ramp {ramp!r}: use one of {', '.join(RAMPS)}")
    places = (torch.arange(width, dtype=torch.float64) + 0.5) / width
    values = 1.0 - places if ramp == "linear" else (1.0 + torch.cos(math.pi * places)) / 2.0
    return values.to(torch.float32).to(device)


def blend_torch(
    first: Tensor, second: Tensor, axis: str, ramp: str = "linear", dtype: torch.dtype = torch.float32
) -> Tensor:
    """``first``, ``second`` [C, h, w]: the same strip, in [0, 1], from the left and right (``axis`` "x") or the upper and
    lower tile ("y"); any float dtype and strides. The overlap's width is the strip's along ``axis``.

    Returns [C, h, w] of ``dtype``: float32, or uint8 rounded half to even. Raises ValueError for other
    arguments.
    """
    _check(first, second, axis, dtype)
    weight = weights(first.shape[2 if axis == "x" else 1], ramp, first.device)
    weight = weight if axis == "x" else weight[:, None]
    mixed = first.float() * weight + second.float() * (1.0 - weight)
    if not MAX_VALUE[dtype]:
        return mixed.contiguous()
    return (mixed.clamp(0.0, 1.0) * float(MAX_VALUE[dtype])).round().to(dtype).contiguous()


def _check(first: Tensor, second: Tensor, axis: str, dtype: torch.dtype) -> None:
    if first.shape != second.shape or first.dtype != second.dtype or first.dim() != 3:
        raise ValueError(f"{first.dtype} {tuple(first.shape)}, {second.dtype} {tuple(second.shape)}: not one strip")
    if axis not in ("x", "y"):
        raise ValueError(f"axis {axis!r}: use x or y")
    if dtype not in MAX_VALUE:
        raise ValueError(f"cannot write {dtype}; use one of {', '.join(map(str, MAX_VALUE))}")


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
    white: tl.constexpr,
    block_y: tl.constexpr,
    block_x: tl.constexpr,
) -> None:
    """One block of one channel. The weights are read, not computed: the same bits on every device."""
    c = tl.program_id(2).to(tl.int64)
    row = (tl.program_id(1) * block_y + tl.arange(0, block_y)[:, None]).to(tl.int64)
    column = (tl.program_id(0) * block_x + tl.arange(0, block_x)[None, :]).to(tl.int64)
    inside = (row < height) & (column < width)
    a = tl.load(first + c * first_c + row * first_y + column * first_x, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(second + c * second_c + row * second_y + column * second_x, mask=inside, other=0.0).to(tl.float32)
    place = column if along_x else row
    w = tl.load(weight + place, mask=place < (width if along_x else height), other=0.0)
    value = a * w + b * (1.0 - w)
    if white:
        value = tl.minimum(tl.maximum(value, 0.0), 1.0) * white
        value = (value + 12582912.0) - 12582912.0  # to the nearest whole number, ties to even
    tl.store(target + (c * height + row) * width + column, value.to(target.dtype.element_ty), mask=inside)


def blend(
    first: Tensor,
    second: Tensor,
    axis: str,
    ramp: str = "linear",
    dtype: torch.dtype = torch.float32,
    *,
    use_triton: bool | None = None,
) -> Tensor:
    """As ``blend_torch``, in one pass where there is a kernel, with the same bits."""
    if not takes_kernel(first.device, use_triton):
        return blend_torch(first, second, axis, ramp, dtype)
    _check(first, second, axis, dtype)
    channels, height, width = first.shape
    target = torch.empty(first.shape, dtype=dtype, device=first.device)
    weight = weights(width if axis == "x" else height, ramp, first.device)
    (block_y, block_x), blocks = area(height, width)
    launch(
        _blend_kernel,
        (*blocks, channels),
        *(first, second, weight, target, *first.stride(), *second.stride(), height, width),
        along_x=axis == "x",
        white=MAX_VALUE[dtype],
        block_y=block_y,
        block_x=block_x,
        enable_fp_fusion=False,
    )
    return target
