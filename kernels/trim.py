"""trim: from a network's output tile to the pixels that are written.

Cuts the crop out of the halo, counts NaN, infinity and saturated halves, and clamps to [0, 1]. The last stage's pixels are
quantised with round-half-even, on request with an ordered dither and with the next level of the pyramid in the same pass.
Pixels of other stages stay float32: the next network would amplify a rounding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from engine.geometry import Box
from engine.kernels.launch import block_and_grid, jit, launch, tl, use_kernel

MAX_VALUE = {torch.uint8: 255, torch.float32: 0}
"""Largest pixel value of each dtype that can be written; 0: values are not quantised."""

BLOCK = (2, 256)
"""Pairs of rows, and columns, of a program on a GPU: twice as many take all registers, and at times the stack."""

_LARGEST_HALF = 65504.0


class Trimmed(NamedTuple):
    """Result of ``trim``."""

    pixels: Tensor
    """[C, h, w] of the requested dtype."""

    half: Tensor | None
    """[C, ceil(h / 2), ceil(w / 2)] of the same dtype: the pixels halved, if requested; with a row above them h counts one
    more."""

    nonfinite: Tensor
    """int64 [3]: number of values that were NaN, infinite, and +-65504 (0 unless float16). It is on the device, so that
    the caller chooses when to wait for it."""

    @property
    def nonfinite_count(self) -> int:
        """Number of values that were NaN or infinite; waits for the device."""
        return int(self.nonfinite[:2].sum())


def trim_torch(
    output: Tensor,
    crop: Box,
    dtype: torch.dtype,
    *,
    origin: tuple[int, int] = (0, 0),
    dither: bool = False,
    halve: bool = False,
    above: Tensor | None = None,
    out: Trimmed | None = None,
) -> Trimmed:
    """Pixels of a tile. NaN becomes 0.

    Args:
        output: the network's output, [1, C, H, W], any float dtype and strides.
        crop: rectangle to cut out, in the output's coordinates.
        dtype: uint8, or float32, which is neither quantised nor dithered.
        origin: (y, x) of the crop in the whole image, which addresses the dither.
        dither: add an ordered dither before rounding.
        halve: average 2x2 pixels, too, from the crop's corner on; an odd last row or column is averaged with itself.
        above: pixels [C, w] of the row above the crop, of the requested dtype, with which its first row is averaged: where
            rows are halved while they stream by, a pair may straddle two crops.
        out: contiguous tensors of the result's shapes to fill and return.

    Raises:
        ValueError: another dtype, or ``above`` or ``out`` does not fit.
    """
    _check(output, crop, dtype, halve, above, out)
    source = output[0][:, crop.y0 : crop.y1, crop.x0 : crop.x1]
    nonfinite = _count_nonfinite(source)
    values = source.float()
    if not _is_known_zero(nonfinite[0]):
        values = values.nan_to_num(nan=0.0)
    values = values.clamp(0.0, 1.0)
    if not MAX_VALUE[dtype]:
        half = _sums_of_2x2(_below(above, values)) * 0.25 if halve else None
        return _into(out, Trimmed(values.contiguous(), half, nonfinite))
    levels = values * float(MAX_VALUE[dtype])
    if dither:
        levels = levels + thresholds(origin, crop.shape, output.device)
    levels = levels.round()
    half = (_sums_of_2x2(_below(above, levels.to(torch.int32))) + 2 >> 2).to(dtype) if halve else None
    return _into(out, Trimmed(levels.to(dtype).contiguous(), half, nonfinite))


def _into(out: Trimmed | None, result: Trimmed) -> Trimmed:
    """``result``, copied into the tensors of ``out`` if there are any."""
    for target, source in zip(out or (), result, strict=False):
        if target is not None and source is not None:
            target.copy_(source)
    return out or result


def _below(above: Tensor | None, pixels: Tensor) -> Tensor:
    """``pixels`` [C, h, w] below the row ``above`` [C, w], if there is one."""
    return pixels if above is None else torch.cat([above[:, None].to(pixels.dtype), pixels], 1)


def _half_shape(channels: int, shape: tuple[int, int], above: Tensor | None) -> tuple[int, int, int]:
    """Shape of the halved crop of (rows, columns)."""
    return channels, -(-(shape[0] + (above is not None)) // 2), -(-shape[1] // 2)


def _check(
    output: Tensor, crop: Box, dtype: torch.dtype, halve: bool, above: Tensor | None, out: Trimmed | None
) -> None:
    if dtype not in MAX_VALUE:
        raise ValueError(f"{dtype}: cannot be written; use one of {', '.join(map(str, MAX_VALUE))}")
    shape = (output.shape[1], *crop.shape)
    if above is not None and ((*above.shape,), above.dtype, above.stride(1)) != (shape[::2], dtype, 1):
        raise ValueError(
            f"row above of {(*above.shape,)}, {above.dtype}: does not fit; pass rows of {shape[::2]}, {dtype}"
        )
    if out is None:
        return
    half_shape = _half_shape(shape[0], crop.shape, above)
    expected = ((shape, dtype), (half_shape, dtype) if halve else None, ((3,), torch.int64))
    actual = tuple(None if t is None else (tuple(t.shape), t.dtype) for t in out)
    if actual != expected or not all(t is None or t.is_contiguous() for t in out):
        raise ValueError(f"out of {actual}: does not fit; pass contiguous tensors of {expected}")


def _count_nonfinite(source: Tensor) -> Tensor:
    """int64 [3]: NaN, infinite, saturated; on a CPU a single pass over finite values."""
    bad = source.numel() - torch.isfinite(source).sum()
    nan = bad if _is_known_zero(bad) else torch.isnan(source).sum()
    saturated = torch.zeros_like(bad)
    if source.dtype == torch.float16:
        saturated = (source.abs() == _LARGEST_HALF).sum()
    return torch.stack([nan, bad - nan, saturated])


def _is_known_zero(count: Tensor) -> bool:
    """Whether a count is zero, as far as can be told without waiting for a device."""
    return count.device.type == "cpu" and not int(count)


def thresholds(origin: tuple[int, int], shape: tuple[int, int], device: torch.device) -> Tensor:
    """Bayer's 8 x 8 matrix at absolute positions, float32 [h, w] in (-1/2, 1/2) with mean 0."""
    y = torch.arange(origin[0], origin[0] + shape[0], device=device)[:, None]
    x = torch.arange(origin[1], origin[1] + shape[1], device=device)
    both = x ^ y
    high = (both & 1) * 32 + (both >> 1 & 1) * 8 + (both >> 2 & 1) * 2
    low = (y & 1) * 16 + (y >> 1 & 1) * 4 + (y >> 2 & 1)
    return (high + low - 31.5) / 64.0


def _sums_of_2x2(pixels: Tensor) -> Tensor:
    """Sums of 2 x 2 values of [C, h, w]; an odd last row or column counts twice."""
    if pixels.shape[1] % 2:
        pixels = torch.cat([pixels, pixels[:, -1:]], 1)
    if pixels.shape[2] % 2:
        pixels = torch.cat([pixels, pixels[:, :, -1:]], 2)
    rows = pixels[:, ::2] + pixels[:, 1::2]
    return (rows[:, :, ::2] + rows[:, :, 1::2]).contiguous()


@jit()
def _threshold(y: tl.tensor, x: tl.tensor) -> tl.tensor:
    """``thresholds`` of int32 positions."""
    both = x ^ y
    high = (both & 1) * 32 + (both >> 1 & 1) * 8 + (both >> 2 & 1) * 2
    low = (y & 1) * 16 + (y >> 1 & 1) * 4 + (y >> 2 & 1)
    return ((high + low).to(tl.float32) - 31.5) / 64.0


@jit(do_not_specialize=("origin_y", "origin_x"))
def _trim_kernel(
    source: tl.tensor,
    target: tl.tensor,
    half: tl.tensor,
    above: tl.tensor,
    nonfinite: tl.tensor,
    above_c: tl.tensor,
    stride_c: tl.tensor,
    stride_y: tl.tensor,
    stride_x: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    half_width: tl.tensor,
    origin_y: tl.tensor,
    origin_x: tl.tensor,
    channels: tl.constexpr,
    max_value: tl.constexpr,
    dither: tl.constexpr,
    halve: tl.constexpr,
    has_above: tl.constexpr,
    is_half: tl.constexpr,
    block_y: tl.constexpr,
    block_x: tl.constexpr,
) -> None:
    """``block_y`` pairs of rows of all channels; the rows of a pair are separate, so that their sum stays in its thread.

    With ``has_above``, the first pair is the row above and row 0.
    """
    pair = tl.program_id(1) * block_y + tl.arange(0, block_y)[:, None]
    column = tl.program_id(0) * block_x + tl.arange(0, block_x)[None, :]
    nans = tl.zeros((block_y, block_x), tl.int32)
    infinities = tl.zeros((block_y, block_x), tl.int32)
    saturated = tl.zeros((block_y, block_x), tl.int32)
    for c in tl.static_range(channels):
        # As a tensor: a stride or height of 1 is a constant in the compiled kernel, and has no 64 bits.
        plane = tl.full((1, 1), c, tl.int64)
        total = tl.zeros((block_y, block_x), tl.float32)
        for second in tl.static_range(2):
            row = pair * 2 + second
            valid = column < width
            if has_above:
                row -= 1
                valid &= row >= 0
            valid &= row < height
            offset = row.to(tl.int64) * stride_y + column.to(tl.int64) * stride_x + plane * stride_c
            value = tl.load(source + offset, mask=valid, other=0.0).to(tl.float32)
            nans += (value != value).to(tl.int32)
            infinities += (tl.abs(value) == float("inf")).to(tl.int32)
            if is_half:
                saturated += (tl.abs(value) == 65504.0).to(tl.int32)
            value = tl.minimum(tl.maximum(tl.where(value == value, value, 0.0), 0.0), 1.0)
            if max_value:
                value = value * max_value
                if dither:
                    value += _threshold(origin_y + row, origin_x + column)
                value = (value + 12582912.0) - 12582912.0  # to the nearest whole number, ties to even
            pixel = target + (plane * height + row) * width + column
            tl.store(pixel, value.to(target.dtype.element_ty), mask=valid)
            total += tl.where(valid, value, 0.0)
        if halve:
            rows = height
            if has_above:
                rows += 1
                is_first = (pair == 0) & (column < width)
                total += tl.load(above + plane * above_c + column, mask=is_first, other=0.0).to(tl.float32)
            total = tl.where(pair * 2 + 1 < rows, total, total * 2.0)
            _store_half(half, plane, total, rows, width, half_width, max_value, block_y, block_x)
    _add_to_counter(nonfinite, nans)
    _add_to_counter(nonfinite + 1, infinities)
    if is_half:
        _add_to_counter(nonfinite + 2, saturated)


@jit()
def _add_to_counter(counter: tl.tensor, counts: tl.tensor) -> None:
    """Most programs count nothing and leave the counter, which all share, alone."""
    count = tl.sum(counts).to(tl.int64)
    tl.atomic_add(counter, count, mask=count > 0, sem="relaxed")


@jit()
def _store_half(
    half: tl.tensor,
    plane: tl.tensor,
    total: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    half_width: tl.tensor,
    max_value: tl.constexpr,
    block_y: tl.constexpr,
    block_x: tl.constexpr,
) -> None:
    """Average neighbours of ``total``: float32 sums of two rows, exact for whole numbers. Halves are rounded up.

    A last column without a neighbour counts twice, as a last row already does.
    """
    half_height = (height + 1) // 2
    row = tl.program_id(1) * block_y + tl.arange(0, block_y)[:, None]
    column = tl.program_id(0) * (block_x // 2) + tl.arange(0, block_x // 2)[None, :]
    mean = tl.sum(tl.reshape(total, (block_y, block_x // 2, 2)), axis=2)
    mean = tl.where(column * 2 + 1 < width, mean, mean * 2.0)
    mean = (mean.to(tl.int32) + 2) >> 2 if max_value else mean * 0.25
    pixel = half + (plane * half_height + row) * half_width + column
    tl.store(pixel, mean.to(half.dtype.element_ty), mask=(row < half_height) & (column < half_width))


def trim(
    output: Tensor,
    crop: Box,
    dtype: torch.dtype,
    *,
    origin: tuple[int, int] = (0, 0),
    dither: bool = False,
    halve: bool = False,
    above: Tensor | None = None,
    out: Trimmed | None = None,
    use_triton: bool | None = None,
) -> Trimmed:
    """``trim_torch`` in one pass where there is a kernel: the crop is read once."""
    if not use_kernel(output.device, use_triton):
        return trim_torch(output, crop, dtype, origin=origin, dither=dither, halve=halve, above=above, out=out)
    _check(output, crop, dtype, halve, above, out)
    source = output[0][:, crop.y0 : crop.y1, crop.x0 : crop.x1]
    channels, height, width = source.shape
    pixels, half, nonfinite = out or _empty(source, dtype, halve, above)
    nonfinite.zero_()
    has_above = halve and above is not None
    row_above = pixels[:, 0] if above is None else above
    (block_y, block_x), grid = block_and_grid(-(-(height + has_above) // 2), width, BLOCK)
    launch(
        _trim_kernel,
        grid,
        *(source, pixels, pixels if half is None else half, row_above, nonfinite, row_above.stride(0)),
        *(*source.stride(), height, width, -(-width // 2), origin[0] % 8, origin[1] % 8),
        channels=channels,
        max_value=MAX_VALUE[dtype],
        dither=dither,
        halve=halve,
        has_above=has_above,
        is_half=output.dtype == torch.float16,
        block_y=block_y,
        block_x=block_x,
        enable_fp_fusion=False,
    )
    return Trimmed(pixels, half, nonfinite)


def _empty(source: Tensor, dtype: torch.dtype, halve: bool, above: Tensor | None) -> Trimmed:
    """Tensors for the result of trimming ``source`` [C, h, w]."""
    channels, height, width = source.shape
    half = source.new_empty(_half_shape(channels, (height, width), above), dtype=dtype) if halve else None
    return Trimmed(source.new_empty(source.shape, dtype=dtype), half, source.new_empty(3, dtype=torch.int64))
