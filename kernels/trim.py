"""trim: from a network's output tile to the pixels that are kept.

Cuts the core out of the halo, counts NaN, infinity and saturated halves, clamps to [0, 1] and, for the last level,
quantises with round-half-even, if wanted with an ordered dither and with the next level of the pyramid in the same pass.
Inner levels stay float32: rounding between the steps would be amplified by the next one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from engine.geometry import Box
from engine.kernels.launch import area, jit, launch, takes_kernel, tl

MAX_VALUE = {torch.uint8: 255, torch.float32: 0}
"""The largest level of what can be written; 0: values are kept as they are."""

BLOCK = (2, 256)
"""Pairs of rows and columns that a program on a GPU takes: twice as many need all registers, and at times the stack."""

_LARGEST_HALF = 65504.0


class Trimmed(NamedTuple):
    """``pixels`` [C, h, w]; ``half`` [C, ceil(h / 2), ceil(w / 2)] of the same dtype, when it was asked for.

    ``nonfinite``: int64 [3] on the device, so that reading it is the caller's choice of a moment to wait: how many values
    of the core were NaN, infinite, and the largest half or beyond (0 for other dtypes).
    """

    pixels: Tensor
    half: Tensor | None
    nonfinite: Tensor

    @property
    def bad(self) -> int:
        """How many values were not finite; waits for the device."""
        return int(self.nonfinite[:2].sum())


def trim_torch(
    output: Tensor,
    core: Box,
    dtype: torch.dtype,
    *,
    origin: tuple[int, int] = (0, 0),
    dither: bool = False,
    halve: bool = False,
    out: Trimmed | None = None,
) -> Trimmed:
    """``output`` [1, C, H, W] of any float dtype and strides; ``core``: the kept rectangle in its coordinates.

    ``dtype``: uint8, or float32, which is neither quantised nor dithered. ``origin``: (y, x) of the core in the
    whole image, which addresses the dither and must be even for ``halve``; an odd last row or column is averaged with
    itself. What is not a number becomes 0. ``out``: contiguous tensors of the result's shapes to fill and return. Raises
    ValueError for another dtype, origin or ``out``.
    """
    _check(output, core, dtype, origin, halve, out)
    kept = output[0][:, core.y0 : core.y1, core.x0 : core.x1]
    nonfinite = _faults(kept)
    values = kept.float()
    if int(nonfinite[0]):
        values = values.nan_to_num(nan=0.0)
    values = values.clamp(0.0, 1.0)
    if not MAX_VALUE[dtype]:
        return _given(Trimmed(values.contiguous(), _halve(values) * 0.25 if halve else None, nonfinite), out)
    levels = values * float(MAX_VALUE[dtype])
    if dither:
        levels = levels + _thresholds(origin, core, output.device)
    levels = levels.round()
    half = (_halve(levels.to(torch.int32)) + 2 >> 2).to(dtype) if halve else None
    return _given(Trimmed(levels.to(dtype).contiguous(), half, nonfinite), out)


def _given(made: Trimmed, out: Trimmed | None) -> Trimmed:
    """The result, in the tensors of ``out`` if there are any."""
    for mine, wanted in zip(made, out or (), strict=False):
        if mine is not None and wanted is not None:
            wanted.copy_(mine)
    return out or made


def _check(
    output: Tensor, core: Box, dtype: torch.dtype, origin: tuple[int, int], halve: bool, out: Trimmed | None
) -> None:
    if dtype not in MAX_VALUE:
        raise ValueError(f"cannot write {dtype}; use one of {', '.join(map(str, MAX_VALUE))}")
    if halve and (origin[0] % 2 or origin[1] % 2):
        raise ValueError(f"a core at {origin} does not begin on a pixel of the halved level; both must be even")
    if out is None:
        return
    shape = (output.shape[1], *core.shape)
    halved = (shape[0], -(-shape[1] // 2), -(-shape[2] // 2)) if halve else None
    wanted = ((shape, dtype), (halved, dtype) if halve else None, ((3,), torch.int64))
    given = tuple(None if t is None else (tuple(t.shape), t.dtype) for t in out)
    if given != wanted or not all(t is None or t.is_contiguous() for t in out):
        raise ValueError(f"out holds {given}; contiguous tensors of {wanted} were expected")


def _faults(kept: Tensor) -> Tensor:
    """int64 [3]: NaN, infinite, saturated; one pass where all is well."""
    bad = kept.numel() - torch.isfinite(kept).sum()
    nan = torch.isnan(kept).sum() if int(bad) else bad
    saturated = torch.zeros_like(bad)
    if kept.dtype == torch.float16:
        saturated = (kept.abs() == _LARGEST_HALF).sum()
    return torch.stack([nan, bad - nan, saturated])


def _thresholds(origin: tuple[int, int], core: Box, device: torch.device) -> Tensor:
    """Bayer's 8 x 8 matrix at absolute positions, float32 [h, w] in (-1/2, 1/2) with mean 0."""
    y = torch.arange(origin[0], origin[0] + core.height, device=device)[:, None]
    x = torch.arange(origin[1], origin[1] + core.width, device=device)
    both = x ^ y
    high = (both & 1) * 32 + (both >> 1 & 1) * 8 + (both >> 2 & 1) * 2
    low = (y & 1) * 16 + (y >> 1 & 1) * 4 + (y >> 2 & 1)
    return (high + low - 31.5) / 64.0


def _halve(pixels: Tensor) -> Tensor:
    """Sums of 2 x 2 values of [C, h, w]; an odd last row or column counts twice."""
    if pixels.shape[1] % 2:
        pixels = torch.cat([pixels, pixels[:, -1:]], 1)
    if pixels.shape[2] % 2:
        pixels = torch.cat([pixels, pixels[:, :, -1:]], 2)
    rows = pixels[:, ::2] + pixels[:, 1::2]
    return (rows[:, :, ::2] + rows[:, :, 1::2]).contiguous()


@jit()
def _threshold(y: tl.tensor, x: tl.tensor) -> tl.tensor:
    """``_thresholds`` of int32 positions."""
    both = x ^ y
    high = (both & 1) * 32 + (both >> 1 & 1) * 8 + (both >> 2 & 1) * 2
    low = (y & 1) * 16 + (y >> 1 & 1) * 4 + (y >> 2 & 1)
    return ((high + low).to(tl.float32) - 31.5) / 64.0


@jit(volatile=("origin_y", "origin_x"))
def _trim_kernel(
    source: tl.tensor,
    target: tl.tensor,
    half: tl.tensor,
    nonfinite: tl.tensor,
    stride_c: tl.tensor,
    stride_y: tl.tensor,
    stride_x: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    half_width: tl.tensor,
    origin_y: tl.tensor,
    origin_x: tl.tensor,
    channels: tl.constexpr,
    white: tl.constexpr,
    dither: tl.constexpr,
    halve: tl.constexpr,
    saturates: tl.constexpr,
    block_y: tl.constexpr,
    block_x: tl.constexpr,
) -> None:
    """``block_y`` pairs of rows of all channels; rows of a pair are apart, so that their sum stays in its thread."""
    pair = tl.program_id(1) * block_y + tl.arange(0, block_y)[:, None]
    column = tl.program_id(0) * block_x + tl.arange(0, block_x)[None, :]
    nans = tl.zeros((block_y, block_x), tl.int32)
    infinities = tl.zeros((block_y, block_x), tl.int32)
    saturated = tl.zeros((block_y, block_x), tl.int32)
    for c in tl.static_range(channels):
        # As a tensor: a stride or height of 1 is a constant by the time this is compiled, and has no 64 bits.
        plane = tl.full((1, 1), c, tl.int64)
        total = tl.zeros((block_y, block_x), tl.float32)
        for second in tl.static_range(2):
            row = pair * 2 + second
            kept = (row < height) & (column < width)
            offset = row.to(tl.int64) * stride_y + column.to(tl.int64) * stride_x + plane * stride_c
            value = tl.load(source + offset, mask=kept, other=0.0).to(tl.float32)
            nans += (value != value).to(tl.int32)
            infinities += (tl.abs(value) == float("inf")).to(tl.int32)
            if saturates:
                saturated += (tl.abs(value) == 65504.0).to(tl.int32)
            value = tl.minimum(tl.maximum(tl.where(value == value, value, 0.0), 0.0), 1.0)
            if white:
                value = value * white
                if dither:
                    value += _threshold(origin_y + row, origin_x + column)
                value = (value + 12582912.0) - 12582912.0  # to the nearest whole number, ties to even
            at = target + (plane * height + row) * width + column
            tl.store(at, value.to(target.dtype.element_ty), mask=kept)
            total += tl.where(kept, value, 0.0)
        if halve:
            total = tl.where(pair * 2 + 1 < height, total, total * 2.0)
            _store_half(half, plane, total, height, width, half_width, white, block_y, block_x)
    _count(nonfinite, nans)
    _count(nonfinite + 1, infinities)
    if saturates:
        _count(nonfinite + 2, saturated)


@jit()
def _count(counter: tl.tensor, found: tl.tensor) -> None:
    """Most programs find nothing and leave the counter, which all share, alone."""
    count = tl.sum(found).to(tl.int64)
    tl.atomic_add(counter, count, mask=count > 0, sem="relaxed")


@jit()
def _store_half(
    half: tl.tensor,
    plane: tl.tensor,
    total: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    half_width: tl.tensor,
    white: tl.constexpr,
    block_y: tl.constexpr,
    block_x: tl.constexpr,
) -> None:
    """``total``: float32 sums of two rows, exact for whole numbers. Averages neighbours, halves rounded up.

    A last column without a neighbour counts twice, as a last row already does.
    """
    half_height = (height + 1) // 2
    row = tl.program_id(1) * block_y + tl.arange(0, block_y)[:, None]
    column = tl.program_id(0) * (block_x // 2) + tl.arange(0, block_x // 2)[None, :]
    mean = tl.sum(tl.reshape(total, (block_y, block_x // 2, 2)), axis=2)
    mean = tl.where(column * 2 + 1 < width, mean, mean * 2.0)
    mean = (mean.to(tl.int32) + 2) >> 2 if white else mean * 0.25
    at = half + (plane * half_height + row) * half_width + column
    tl.store(at, mean.to(half.dtype.element_ty), mask=(row < half_height) & (column < half_width))


def trim(
    output: Tensor,
    core: Box,
    dtype: torch.dtype,
    *,
    origin: tuple[int, int] = (0, 0),
    dither: bool = False,
    halve: bool = False,
    out: Trimmed | None = None,
    use_triton: bool | None = None,
) -> Trimmed:
    """As ``trim_torch``, in one pass where there is a kernel: the output's core is read once."""
    if not takes_kernel(output.device, use_triton):
        return trim_torch(output, core, dtype, origin=origin, dither=dither, halve=halve, out=out)
    _check(output, core, dtype, origin, halve, out)
    kept = output[0][:, core.y0 : core.y1, core.x0 : core.x1]
    channels, height, width = kept.shape
    pixels, half, nonfinite = out or _new(kept, dtype, halve)
    nonfinite.zero_()
    (block_y, block_x), blocks = area(-(-height // 2), width, BLOCK)
    launch(
        _trim_kernel,
        blocks,
        *(kept, pixels, pixels if half is None else half, nonfinite, *kept.stride(), height, width, -(-width // 2)),
        *(origin[0] % 8, origin[1] % 8),
        channels=channels,
        white=MAX_VALUE[dtype],
        dither=dither,
        halve=halve,
        saturates=output.dtype == torch.float16,
        block_y=block_y,
        block_x=block_x,
        enable_fp_fusion=False,
    )
    return Trimmed(pixels, half, nonfinite)


def _new(kept: Tensor, dtype: torch.dtype, halve: bool) -> Trimmed:
    """Tensors for what is made of ``kept`` [C, h, w]."""
    channels, height, width = kept.shape
    half = kept.new_empty(channels, -(-height // 2), -(-width // 2), dtype=dtype) if halve else None
    return Trimmed(kept.new_empty(kept.shape, dtype=dtype), half, kept.new_empty(3, dtype=torch.int64))
