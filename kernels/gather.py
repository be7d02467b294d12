"""gather: from a block of the source level to a network's input tile.

Normalises to [0, 1], adds the noise, puts the noise channels behind the picture's, applies the border rule and casts,
giving [1, C, h, w] channels-last in the stage's dtype.

Border rule (no synthetic halo outside the true border): a tile reaches past the image only at the right and
the bottom, by less than one window, where the frame was padded to a multiple of the window. There the image is
reflected without repeating its edge; noise is reflected with it, because the reference pads after adding noise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from engine.geometry import Box
from engine.kernels.launch import area, jit, launch, takes_kernel, tl
from engine.kernels.noise import as_word, noise_at_torch, normals_at

_MAX_VALUE = 255.0


class Noise(NamedTuple):
    """The normal numbers of (seed, substream, position, channel): ``sigma`` times the first are added to the picture's
    channels, the next are ``channels`` of their own.
    """

    sigma: float
    seed: int
    substream: int
    channels: int = 0


def reflect(start: int, stop: int, size: int) -> list[int]:
    """Positions [start, stop) folded into [0, size) by reflection about the first and last position."""
    period = max(1, 2 * (size - 1))
    return [min(p % period, period - p % period) if size > 1 else 0 for p in range(start, stop)]


def gather_torch(
    block: Tensor,
    inside: Box,
    read: Box,
    size: tuple[int, int],
    noise: Noise | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The input tile of ``read``, a box in the padded frame of a level of ``size`` (height, width).

    ``block`` [C, h, w]: the level's pixels of the box ``inside``; uint8 or float in [0, 1], any strides. Nothing is clipped
    before the network. Returns [1, C + noise channels, h, w] of ``dtype``, channels-last, on ``device`` (by default the
    block's), or fills ``out`` of that shape and layout, as one image of a batch. Raises ValueError when the block lacks a
    pixel.
    """
    block = block if device is None else block.to(device)
    channels = block.shape[0] + (noise.channels if noise else 0)
    _check(block, inside, read, size, out, channels)
    tile = block.float() / _MAX_VALUE if block.dtype == torch.uint8 else block.float()
    if noise:
        at_y, at_x = (torch.arange(start, stop, device=block.device) for start, stop in _spans(inside))
        normals = noise_at_torch(noise.seed, noise.substream, at_y, at_x, channels)
        normals[: len(tile)] = tile + noise.sigma * normals[: len(tile)]
        tile = normals
    rows, columns = _lines(inside, read, size)
    # Indexing copies; a tile that does not touch the padding is a plain view.
    if rows != list(range(block.shape[1])):
        tile = tile[:, rows]
    if columns != list(range(block.shape[2])):
        tile = tile[:, :, columns]
    if out is not None:
        return out.copy_(tile)
    return tile[None].to(dtype).contiguous(memory_format=torch.channels_last)


def _spans(box: Box) -> tuple[tuple[int, int], tuple[int, int]]:
    """(start, stop) of the rows and of the columns."""
    return (box.y0, box.y1), (box.x0, box.x1)


def _lines(inside: Box, read: Box, size: tuple[int, int]) -> tuple[list[int], list[int]]:
    """Which row of the block each row of ``read`` is, and which column each column."""
    rows, columns = (
        [p - origin for p in reflect(start, stop, length)]
        for (start, stop), (origin, _), length in zip(_spans(read), _spans(inside), size, strict=True)
    )
    return rows, columns


def _check(block: Tensor, inside: Box, read: Box, size: tuple[int, int], out: Tensor | None, channels: int) -> None:
    """Raise ValueError unless the block has the shape of ``inside`` and holds all that ``read`` needs, and ``out`` fits."""
    if block.shape[1:] != inside.shape:
        raise ValueError(f"a block of {tuple(block.shape[1:])} is not the pixels of {inside}")
    for name, lines, count in zip(("row", "column"), _lines(inside, read, size), inside.shape, strict=True):
        if lines and not 0 <= min(lines) <= max(lines) < count:
            raise ValueError(f"{read} of a level of {size} needs a {name} that {inside} does not hold")
    shape = (1, channels, *read.shape)
    if out is not None and (out.shape != shape or not out.is_contiguous(memory_format=torch.channels_last)):
        raise ValueError(f"out of shape {tuple(out.shape)} is not {shape}, channels-last")


@jit()
def _reflect(position: tl.tensor, size: tl.tensor) -> tl.tensor:
    """``reflect`` of int32 positions; the remainder of a negative number is negative, as in C."""
    period = tl.maximum(2 * size - 2, 1)
    remainder = position % period
    remainder = tl.where(remainder < 0, remainder + period, remainder)
    return tl.minimum(remainder, period - remainder)


@jit(
    volatile=(
        *("stride_c", "stride_y", "height", "width", "read_y", "read_x", "level_h", "level_w", "inside_y", "inside_x"),
        *("sigma", "k0", "k1", "substream"),
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
    level_h: tl.tensor,
    level_w: tl.tensor,
    inside_y: tl.tensor,
    inside_x: tl.tensor,
    sigma: tl.tensor,
    k0: tl.tensor,
    k1: tl.tensor,
    substream: tl.tensor,
    pictures: tl.constexpr,
    channels: tl.constexpr,
    white: tl.constexpr,
    noisy: tl.constexpr,
    block_y: tl.constexpr,
    block_x: tl.constexpr,
) -> None:
    """One block of pixels with all its ``channels``, of which the first ``pictures`` are the picture's: the normals of four
    channels are made once.
    """
    row = tl.program_id(1) * block_y + tl.arange(0, block_y)[:, None]
    column = tl.program_id(0) * block_x + tl.arange(0, block_x)[None, :]
    y, x = _reflect(read_y + row, level_h), _reflect(read_x + column, level_w)
    taken = source + (y - inside_y).to(tl.int64) * stride_y + (x - inside_x).to(tl.int64) * stride_x
    put = target + (row.to(tl.int64) * width + column) * channels
    valid = (row < height) & (column < width)
    for c in tl.static_range(channels):
        if noisy and c % 4 == 0:
            n0, n1, n2, n3 = normals_at(y, x, c // 4, substream, k0, k1)
        if c < pictures:
            value = tl.load(taken, mask=valid, other=0).to(tl.float32)
            taken += stride_c
            if white != 1.0:
                value = tl.div_rn(value, white)
            if noisy:
                value += sigma * n0
        else:
            value = n0
        if noisy:
            n0, n1, n2 = n1, n2, n3
        tl.store(put + c, value.to(target.dtype.element_ty), mask=valid)


def gather(
    block: Tensor,
    inside: Box,
    read: Box,
    size: tuple[int, int],
    noise: Noise | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
    use_triton: bool | None = None,
) -> Tensor:
    """As ``gather_torch``, in one pass where there is a kernel: neither the noise nor a float block is stored."""
    block = block if device is None else block.to(device)
    if not takes_kernel(block.device, use_triton):
        return gather_torch(block, inside, read, size, noise, dtype=dtype, out=out)
    channels = block.shape[0] + (noise.channels if noise else 0)
    _check(block, inside, read, size, out, channels)
    if out is None:
        out = torch.empty(1, channels, *read.shape, dtype=dtype, device=block.device, memory_format=torch.channels_last)
    sigma, seed, substream, _ = noise or Noise(0.0, 0, 0)
    (block_y, block_x), blocks = area(*read.shape)
    launch(
        _gather_kernel,
        blocks,
        *(block, out, *block.stride(), *read.shape, read.y0, read.x0, *size, inside.y0, inside.x0),
        *(float(sigma), as_word(seed), as_word(seed >> 32), as_word(substream)),
        pictures=block.shape[0],
        channels=channels,
        white=_MAX_VALUE if block.dtype == torch.uint8 else 1.0,
        noisy=noise is not None,
        block_y=block_y,
        block_x=block_x,
        enable_fp_fusion=False,
    )
    return out
