"""gather: from a block of the source image to a network's input tile.

Normalises to [0, 1], adds the noise, appends the noise channels, applies the border rule and casts. The result is
[1, C, h, w], channels-last, in the stage's dtype.

Border rule: there is no synthetic halo outside the image. A tile reaches past it only at the right and the bottom, by less
than one window, where the frame was padded to a multiple of the window. There the image is reflected without repeating its
edge. Its noise is reflected with it, because the reference pads after adding noise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from engine.geometry import Box
from engine.kernels.launch import block_and_grid, jit, launch, tl, use_kernel
from engine.kernels.noise import as_word, noise_at_torch, normals_at

_BEYOND = 2**31 - 1
"""Period of positions that do not repeat, which are below it."""


class Noise(NamedTuple):
    """Standard normal numbers that a tile's input gets, addressed by position."""

    sigma: float
    """Amplitude of the noise that is added to the image's channels."""

    seed: int
    """64 bits."""

    substream: int
    """Use of the seed: separates the super-resolution steps."""

    channels: int = 0
    """Number of further input channels that are noise, not scaled."""

    period: tuple[int, int] = (0, 0)
    """Rows and columns after which the noise repeats; 0 along an axis where it does not."""

    start: tuple[int, int] = (0, 0)
    """Position of the source image's first pixel among those of the noise, along axes where it repeats."""


def reflect(start: int, stop: int, size: int) -> list[int]:
    """Positions [start, stop) folded into [0, size) by reflection about the first and the last position."""
    period = max(1, 2 * (size - 1))
    return [min(p % period, period - p % period) if size > 1 else 0 for p in range(start, stop)]


def gather_torch(
    block: Tensor,
    box: Box,
    read: Box,
    size: tuple[int, int],
    noise: Noise | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Input tile of ``read``. Nothing is clipped before the network.

    Args:
        block: pixels of the source image, [C, h, w], uint8 or float in [0, 1], any strides.
        box: position of the block in the source image.
        read: position of the tile in the padded frame.
        size: (height, width) of the source image.
        noise: noise to add and to append.
        dtype: dtype of the result.
        device: device of the result; the block's if None.
        out: tensor to fill instead of a new one, of the result's shape and layout: one image of a batch.

    Returns:
        [1, C + noise channels, h, w], channels-last.

    Raises:
        ValueError: the block lacks a pixel or has another dtype, or ``out`` does not fit.
    """
    block = block if device is None else block.to(device)
    channels = block.shape[0] + (noise.channels if noise else 0)
    _check(block, box, read, size, out, channels)
    tile = block.float() / _max_value(block)
    if noise:
        y, x = (
            _repeated(torch.arange(start, stop, device=block.device), first, period)
            for (start, stop), first, period in zip(_spans(box), noise.start, noise.period, strict=True)
        )
        normals = noise_at_torch(noise.seed, noise.substream, y, x, channels)
        normals[: len(tile)] = tile + noise.sigma * normals[: len(tile)]
        tile = normals
    for axis, lines in enumerate(_lines(box, read, size), start=1):
        tile = _taken(tile, axis, lines)
    if out is not None:
        return out.copy_(tile)
    return tile[None].to(dtype).contiguous(memory_format=torch.channels_last)


def _taken(tile: Tensor, axis: int, lines: list[int]) -> Tensor:
    """These lines of an axis. Indexing copies; a tile that does not touch the padding is a plain view."""
    first = lines[0] if lines else 0
    if lines == list(range(first, first + len(lines))):
        return tile.narrow(axis, first, len(lines))
    return tile.index_select(axis, torch.tensor(lines, device=tile.device))


def _repeated(positions: Tensor, start: int, period: int) -> Tensor:
    """Positions of the noise of these of the source image."""
    return (positions + start) % period if period else positions


def _max_value(block: Tensor) -> float:
    """Pixel value that stands for 1."""
    return 255.0 if block.dtype == torch.uint8 else 1.0


def _spans(box: Box) -> tuple[tuple[int, int], tuple[int, int]]:
    """(start, stop) of the rows and of the columns."""
    return (box.y0, box.y1), (box.x0, box.x1)


def _lines(box: Box, read: Box, size: tuple[int, int]) -> tuple[list[int], list[int]]:
    """The block's row for each row of ``read``, and its column for each column."""
    rows, columns = (
        [position - origin for position in reflect(start, stop, length)]
        for (start, stop), (origin, _), length in zip(_spans(read), _spans(box), size, strict=True)
    )
    return rows, columns


def _check(block: Tensor, box: Box, read: Box, size: tuple[int, int], out: Tensor | None, channels: int) -> None:
    """Raise ValueError unless the block is that of ``box`` and holds all that ``read`` needs, and ``out`` fits."""
    if block.dtype != torch.uint8 and not block.is_floating_point():
        raise ValueError(f"block of {block.dtype}: neither uint8 nor float; convert it")
    if block.shape[1:] != box.shape:
        raise ValueError(f"block of {tuple(block.shape[1:])}: not the pixels of {box}; pass the block of this box")
    for name, lines, count in zip(("row", "column"), _lines(box, read, size), box.shape, strict=True):
        if lines and not 0 <= min(lines) <= max(lines) < count:
            raise ValueError(f"{read} of an image of {size}: needs a {name} outside {box}; pass a larger block")
    shape = (1, channels, *read.shape)
    if out is not None and (out.shape != shape or not out.is_contiguous(memory_format=torch.channels_last)):
        raise ValueError(f"out of shape {tuple(out.shape)}: not {shape}, channels-last; pass such a tensor")


@jit()
def _reflect(position: tl.tensor, size: tl.tensor) -> tl.tensor:
    """``reflect`` of int32 positions; the remainder of a negative number is negative, as in C."""
    period = tl.maximum(2 * size - 2, 1)
    remainder = position % period
    remainder = tl.where(remainder < 0, remainder + period, remainder)
    return tl.minimum(remainder, period - remainder)


@jit(
    do_not_specialize=(
        *("stride_c", "stride_y", "height", "width", "read_y", "read_x", "image_h", "image_w", "box_y", "box_x"),
        *("sigma", "k0", "k1", "substream", "start_y", "start_x", "period_y", "period_x"),
    )
)
def _gather_kernel(
    source: tl.tensor,
    target: tl.tensor,
    stride_c: tl.tensor,
    stride_y: tl.tensor,
    stride_x: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    read_y: tl.tensor,
    read_x: tl.tensor,
    image_h: tl.tensor,
    image_w: tl.tensor,
    box_y: tl.tensor,
    box_x: tl.tensor,
    sigma: tl.tensor,
    k0: tl.tensor,
    k1: tl.tensor,
    substream: tl.tensor,
    start_y: tl.tensor,
    start_x: tl.tensor,
    period_y: tl.tensor,
    period_x: tl.tensor,
    image_channels: tl.constexpr,
    channels: tl.constexpr,
    max_value: tl.constexpr,
    has_noise: tl.constexpr,
    repeats: tl.constexpr,
    block_y: tl.constexpr,
    block_x: tl.constexpr,
) -> None:
    """One block of pixels with all its channels, so that the normals of four channels are computed once."""
    row = tl.program_id(1) * block_y + tl.arange(0, block_y)[:, None]
    column = tl.program_id(0) * block_x + tl.arange(0, block_x)[None, :]
    y, x = _reflect(read_y + row, image_h), _reflect(read_x + column, image_w)
    source_pixel = source + (y - box_y).to(tl.int64) * stride_y + (x - box_x).to(tl.int64) * stride_x
    target_pixel = target + (row.to(tl.int64) * width + column) * channels
    valid = (row < height) & (column < width)
    if repeats:
        y, x = (y + start_y) % period_y, (x + start_x) % period_x
    for c in tl.static_range(channels):
        if has_noise and c % 4 == 0:
            n0, n1, n2, n3 = normals_at(y, x, c // 4, substream, k0, k1)
        if c < image_channels:
            value = tl.load(source_pixel, mask=valid, other=0).to(tl.float32)
            source_pixel += stride_c
            if max_value != 1.0:
                value = tl.div_rn(value, max_value)
            if has_noise:
                value += sigma * n0
        else:
            value = n0
        if has_noise:
            n0, n1, n2 = n1, n2, n3
        tl.store(target_pixel + c, value.to(target.dtype.element_ty), mask=valid)


def gather(
    block: Tensor,
    box: Box,
    read: Box,
    size: tuple[int, int],
    noise: Noise | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
    use_triton: bool | None = None,
) -> Tensor:
    """``gather_torch`` in one pass where there is a kernel: neither the noise nor a float block is stored."""
    block = block if device is None else block.to(device)
    if not use_kernel(block.device, use_triton):
        return gather_torch(block, box, read, size, noise, dtype=dtype, out=out)
    channels = block.shape[0] + (noise.channels if noise else 0)
    _check(block, box, read, size, out, channels)
    if out is None:
        out = torch.empty(1, channels, *read.shape, dtype=dtype, device=block.device, memory_format=torch.channels_last)
    sigma, seed, substream, _, period, start = noise or Noise(0.0, 0, 0)
    # Where the noise does not repeat, its period is beyond all positions. The kernel's remainders are of positive numbers.
    periods = [n or _BEYOND for n in period]
    starts = [first % n if n else 0 for first, n in zip(start, period, strict=True)]
    (block_y, block_x), grid = block_and_grid(*read.shape)
    launch(
        _gather_kernel,
        grid,
        *(block, out, *block.stride(), *read.shape, read.y0, read.x0, *size, box.y0, box.x0),
        *(float(sigma), as_word(seed), as_word(seed >> 32), as_word(substream), *starts, *periods),
        image_channels=block.shape[0],
        channels=channels,
        max_value=_max_value(block),
        has_noise=noise is not None,
        repeats=any(period),
        block_y=block_y,
        block_x=block_x,
        enable_fp_fusion=False,
    )
    return out
