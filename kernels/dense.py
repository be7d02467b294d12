"""dense: ESRGAN's residual dense block without concatenation (Wang et al., ECCV workshops 2018).

All maps of a block live side by side in the channels of one channels-last buffer. Every 3x3 convolution reads a prefix
of the channels and writes the next ones; the last one adds the residual. ``conv3x3`` is that step alone: it takes views,
so an executor that streams bands of rows can give it a window of rows. ``dense_by_input`` computes the same sums in
another order: each map is convolved once for all its consumers, whose partial sums wait in a second buffer.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.kernels.launch import is_interpreting, jit, launch, takes_kernel, tl, triton

_HALF = (torch.float16, torch.bfloat16)
# block_y, block_x, vector, warps and pipeline stages, of which the fastest is measured for each shape of convolution.
# block_k is not among them: it sets the order of the sums, and equal plans must give equal bits.
_TILES = (
    (8, 16, 8, 4, 3),
    (8, 16, 4, 4, 3),
    (8, 16, 8, 4, 1),
    (8, 16, 8, 8, 3),
    (8, 8, 8, 8, 3),
    (16, 16, 8, 8, 3),
    (16, 16, 4, 8, 2),
    (8, 8, 8, 4, 4),
)
_INTERPRETED_TILE = (16, 32, 8)
_TILE = ("block_y", "block_x", "vector")


def dense_torch(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], slope: float = 0.2, residual: float = 0.2
) -> Tensor:
    """``x`` [B, C, H, W], in the weights' dtype or float32; ``weights``: [growth, C + i growth, 3, 3] for each i, last
    [C, C + i growth, 3, 3]; ``biases`` likewise.

    Returns x + residual * y as [B, C, H, W] in x's dtype.
    """
    seen = x.to(weights[0].dtype)
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        seen = torch.cat([seen, F.leaky_relu(F.conv2d(seen, weight, bias, padding=1), slope)], 1)
    return torch.add(x, F.conv2d(seen, weights[-1], biases[-1], padding=1), alpha=residual)


def conv3x3_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    top: int = 0,
    slope: float = 1.0,
    residual: Tensor | None = None,
    scale: float = 1.0,
) -> None:
    """Write the rows [top, top + h) of a 3x3 convolution of ``x`` [B, H, W, K] into ``out`` [B, h, W, N].

    All that lies outside ``x`` is zero; ``top`` may be negative. ``slope`` is that of the leaky ReLU, 1 for none. With
    ``residual`` [B, h, W, N] the result is residual + scale * y. ``weight`` [N, K, 3, 3] has x's dtype. x and out may be
    views, for example of one buffer; they may not share elements.
    """
    rows = x.new_zeros(x.shape[0], out.shape[1] + 2, *x.shape[2:])
    first, end = max(0, top - 1), min(x.shape[1], top + out.shape[1] + 1)
    if first < end:
        rows[:, first - top + 1 : end - top + 1] = x[:, first:end]
    y = F.leaky_relu(F.conv2d(rows.permute(0, 3, 1, 2), weight, bias, padding=(0, 1)), slope).permute(0, 2, 3, 1)
    out.copy_(y if residual is None else torch.add(residual, y, alpha=scale))


@jit()
def _finish(
    y: tl.tensor,
    n: tl.tensor,
    inside: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    sums: tl.tensor,
    out: tl.tensor,
    slope: tl.tensor,
    scale: tl.tensor,
    outputs: tl.constexpr,
    done: tl.constexpr,
    add: tl.constexpr,
    has_residual: tl.constexpr,
) -> None:
    """Store the products ``y`` [pixels, n]: columns below ``done`` are final, the others partial sums.

    ``residual``, ``sums`` and ``out`` are the addresses of each pixel's first column.
    """
    kept = inside[:, None] & (n < outputs)[None, :]
    if add:
        y += tl.load(sums[:, None] + n[None, :], mask=kept, other=0.0).to(tl.float32)
    if done < outputs:
        tl.store(sums[:, None] + n[None, :], y.to(sums.dtype.element_ty), mask=kept & (n >= done)[None, :])
    kept = kept & (n < done)[None, :]
    y += tl.load(bias + n, mask=n < done, other=0.0).to(tl.float32)[None, :]
    y = tl.where(y >= 0, y, y * slope)
    if has_residual:
        y = tl.load(residual[:, None] + n[None, :], mask=kept, other=0.0).to(tl.float32) + scale * y
    tl.store(out[:, None] + n[None, :], y.to(out.dtype.element_ty), mask=kept)


@jit(("height", "width", "rows", "top"))
def _conv3x3_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    sums: tl.tensor,
    out: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    rows: tl.tensor,
    top: tl.tensor,
    x_batch: tl.tensor,
    x_row: tl.tensor,
    residual_batch: tl.tensor,
    residual_row: tl.tensor,
    sums_batch: tl.tensor,
    sums_row: tl.tensor,
    out_batch: tl.tensor,
    out_row: tl.tensor,
    slope: tl.tensor,
    scale: tl.tensor,
    x_pixel: tl.constexpr,
    residual_pixel: tl.constexpr,
    sums_pixel: tl.constexpr,
    out_pixel: tl.constexpr,
    inputs: tl.constexpr,
    outputs: tl.constexpr,
    done: tl.constexpr,
    add: tl.constexpr,
    has_residual: tl.constexpr,
    widen: tl.constexpr,
    block_y: tl.constexpr,
    block_x: tl.constexpr,
    vector: tl.constexpr,
    block_k: tl.constexpr,
    block_n: tl.constexpr,
    block_rest: tl.constexpr,
) -> None:
    """block_y x block_x pixels of [rows, width]: a product of [pixels, 9 inputs] with ``weight`` [outputs, 3, 3, inputs].

    ``outputs`` is often 3 or 5 times a power of two, so the columns come in two blocks, of which ``block_rest`` may be 0.
    ``vector``: elements that are copied at once. Copies of 16 bytes pass the first-level cache by, copies of 8 do not.
    """
    across, down = tl.cdiv(width, block_x), tl.cdiv(rows, block_y)
    tile = tl.program_id(0)
    picture = (tile // (across * down)).to(tl.int64)
    row, column = tile // across % down * block_y, tile % across * block_x
    m = tl.arange(0, block_y * block_x)
    dy, dx = (m // block_x).to(tl.int64), m % block_x

    # Nine bits a pixel: which of its neighbours exist. The others are the zero padding.
    exists = tl.zeros([block_y * block_x], tl.int32)
    for corner in tl.static_range(9):
        y, x_at = row + top + dy + (corner // 3 - 1), column + dx + (corner % 3 - 1)
        exists |= ((y >= 0) & (y < height) & (x_at >= 0) & (x_at < width)).to(tl.int32) << corner

    k, n = tl.arange(0, block_k), tl.arange(0, block_n)
    read = x + picture * x_batch + (row + top - 1).to(tl.int64) * x_row + (column - 1) * x_pixel
    read = read + (dy * x_row + dx * x_pixel)[:, None] + tl.max_contiguous(k, vector)[None, :]
    factors = weight + (n * (9 * inputs))[None, :] + k[:, None]
    rest = tl.arange(0, block_rest if block_rest else 16)
    rest_factors = weight + ((block_n + rest) * (9 * inputs))[None, :] + k[:, None]
    products = tl.zeros([block_y * block_x, block_n], tl.float32)
    rest_products = tl.zeros([block_y * block_x, block_rest if block_rest else 16], tl.float32)
    # All neighbours of one slice of the channels in turn, while the cache holds it.
    for step in range(9 * tl.cdiv(inputs, block_k)):
        tap, part = step % 9, step // 9 * block_k
        existing = ((exists >> tap) & 1 != 0)[:, None]
        wanted = (n < outputs)[None, :]
        rest_wanted = (block_n + rest < outputs)[None, :]
        if inputs % block_k:
            existing = existing & (k < inputs - part)[None, :]
            wanted = wanted & (k < inputs - part)[:, None]
            rest_wanted = rest_wanted & (k < inputs - part)[:, None]
        neighbour = read + (tap // 3 * x_row + tap % 3 * x_pixel + part)
        a = tl.load(neighbour, mask=existing, other=0.0, cache_modifier=".ca")
        b = tl.load(factors + (tap * inputs + part), mask=wanted, other=0.0)
        if widen:  # the interpreter multiplies the bits of bfloat16 as if they were integers
            a, b = a.to(tl.float32), b.to(tl.float32)
        products = tl.dot(a, b, acc=products, input_precision="ieee")
        if block_rest:
            c = tl.load(rest_factors + (tap * inputs + part), mask=rest_wanted, other=0.0)
            if widen:
                c = c.to(tl.float32)
            rest_products = tl.dot(a, c, acc=rest_products, input_precision="ieee")

    inside = (row + dy < rows) & (column + dx < width)
    residual = residual + picture * residual_batch + (row + dy) * residual_row + (column + dx) * residual_pixel
    sums = sums + picture * sums_batch + (row + dy) * sums_row + (column + dx) * sums_pixel
    out = out + picture * out_batch + (row + dy) * out_row + (column + dx) * out_pixel
    _finish(products, n, inside, bias, residual, sums, out, slope, scale, outputs, done, add, has_residual)
    if block_rest:
        _finish(
            rest_products,
            block_n + rest,
            inside,
            bias,
            residual,
            sums,
            out,
            slope,
            scale,
            outputs,
            done,
            add,
            has_residual,
        )


@functools.cache
def _tuned(in_place: bool) -> Any:  # noqa: ANN401
    """The kernel with the fastest of ``_TILES`` for each shape; trials of a kernel that adds in place are undone."""
    configs = [
        triton.Config(dict(zip(_TILE, tile, strict=True)), num_warps=warps, num_stages=stages)
        for *tile, warps, stages in _TILES
    ]
    shape = ["inputs", "outputs", "done"]
    return triton.autotune(configs, shape, restore_value=["sums"] if in_place else None)(_conv3x3_kernel)


def blocks(inputs: int, outputs: int) -> dict[str, int]:
    """block_k, block_n and block_rest for a convolution of these numbers of channels."""
    whole = max(16, 1 << (outputs.bit_length() - 1))
    rest = outputs - whole
    wide = 64 if inputs % 64 == 0 and outputs <= 64 else 32  # three stages of 64 x 192 fit the H100 alone
    return {
        "block_k": min(wide, max(16, 1 << (inputs - 1).bit_length())),
        "block_n": whole,
        "block_rest": max(16, 1 << (rest - 1).bit_length()) if rest > 0 else 0,
    }


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    top: int = 0,
    slope: float = 1.0,
    residual: Tensor | None = None,
    scale: float = 1.0,
    sums: Tensor | None = None,
    add: bool = False,
) -> None:
    """``conv3x3_torch`` with ``sums`` [B, h, W, N]: the columns after those of ``out`` go there, ``add`` adds the old ones."""
    for name, view in (("x", x), ("out", out), ("residual", residual), ("sums", sums)):
        if view is not None and view.stride(3) != 1:
            raise ValueError(f"the channels of {name} are {view.stride(3)} elements apart; neighbours were expected")
    batch, height, width, inputs = x.shape
    absent = x[..., :0]
    arguments = [x, weight.contiguous(memory_format=torch.channels_last), bias]
    arguments += [absent if residual is None else residual, absent if sums is None else sums, out]
    strides = [a.stride()[:3] for a in (arguments[0], *arguments[3:])]
    options: dict[str, object] = {
        **dict(zip(("x_pixel", "residual_pixel", "sums_pixel", "out_pixel"), (s[2] for s in strides), strict=True)),
        **blocks(inputs, weight.shape[0]),
        "inputs": inputs,
        "outputs": weight.shape[0],
        "done": out.shape[3],
        "add": add,
        "has_residual": residual is not None,
        "widen": is_interpreting() and x.dtype == torch.bfloat16,
    }
    numbers = [height, width, out.shape[1], top, *(number for s in strides for number in s[:2]), slope, scale]
    if is_interpreting():
        options |= dict(zip(_TILE, _INTERPRETED_TILE, strict=True))

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (batch * triton.cdiv(out.shape[1], meta["block_y"]) * triton.cdiv(width, meta["block_x"]),)

    kernel = _conv3x3_kernel if is_interpreting() else _tuned(add)
    launch(kernel, cast(Any, grid), *arguments, *numbers, **options)


def _takes_kernel(weight: Tensor, use_triton: bool | None) -> bool:
    """Only half precision has matrix instructions; float32 is the twin's unless the kernel is insisted on."""
    if use_triton is None and weight.dtype not in _HALF:
        return False
    return takes_kernel(weight.device, use_triton)


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    top: int = 0,
    slope: float = 1.0,
    residual: Tensor | None = None,
    scale: float = 1.0,
    *,
    use_triton: bool | None = None,
) -> None:
    """See ``conv3x3_torch``. The kernel wants channels that are neighbours in memory (ValueError), of weights too: keep
    them channels-last, or every call copies them.
    """
    if _takes_kernel(weight, use_triton):
        _launch(x, weight, bias, out, top, slope, residual, scale)
    else:
        conv3x3_torch(x, weight, bias, out, top, slope, residual, scale)


def dense(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    slope: float = 0.2,
    residual: float = 0.2,
    *,
    use_triton: bool | None = None,
) -> Tensor:
    """See ``dense_torch``. The kernel's result is channels-last; x and the weights should be, or are copied."""
    if not _takes_kernel(weights[0], use_triton):
        return dense_torch(x, weights, biases, slope, residual)
    pixels = x.permute(0, 2, 3, 1).contiguous()  # [B, H, W, C]
    growth, end = weights[0].shape[0], pixels.shape[3]
    buffer = weights[0].new_empty(*pixels.shape[:3], end + (len(weights) - 1) * growth)
    buffer[..., :end] = pixels
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        _launch(buffer[..., :end], weight, bias, buffer[..., end : end + growth], slope=slope)
        end += growth
    out = torch.empty_like(pixels)
    _launch(buffer, weights[-1], biases[-1], out, residual=pixels, scale=residual)
    return out.permute(0, 3, 1, 2)


def by_input(weights: Sequence[Tensor]) -> list[Tensor]:
    """A dense block's weights for ``dense_by_input``: for each map, what all its consumers do with it.

    Map i has K channels (C, then growth): [growth + ... + growth + C, K, 3, 3], channels-last.
    """
    ends = [weight.shape[1] for weight in weights]
    slices = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    return [
        torch.cat([weight[:, part] for weight in weights[i:]]).contiguous(memory_format=torch.channels_last)
        for i, part in enumerate(slices)
    ]


def dense_by_input(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    slope: float = 0.2,
    residual: float = 0.2,
    packed: Sequence[Tensor] | None = None,
    sums_dtype: torch.dtype = torch.float32,
    *,
    use_triton: bool | None = None,
) -> Tensor:
    """``dense`` with its sums in another order. ``packed``: ``by_input(weights)``, to be made once.

    ``sums_dtype`` is that of the partial sums between the convolutions; half precision halves their traffic and rounds
    each sum up to three times more.
    """
    if not _takes_kernel(weights[0], use_triton):
        return dense_torch(x, weights, biases, slope, residual)
    pixels = x.permute(0, 2, 3, 1).contiguous()  # [B, H, W, C]
    growth, seen = weights[0].shape[0], pixels.to(weights[0].dtype)
    packed = by_input(weights) if packed is None else packed
    # Columns [i growth, (i + 1) growth) belong to convolution i. The first one's are final at once: never touched here.
    sums = torch.empty(*pixels.shape[:3], packed[0].shape[0], dtype=sums_dtype, device=x.device)
    for i, (weight, bias) in enumerate(zip(packed[:-1], biases[:-1], strict=True)):
        out = seen.new_empty(*pixels.shape[:3], growth)
        _launch(seen, weight, bias, out, slope=slope, sums=sums[..., i * growth :], add=i > 0)
        seen = out
    out = torch.empty_like(pixels)
    last = sums[..., (len(packed) - 1) * growth :]
    _launch(seen, packed[-1], biases[-1], out, residual=pixels, scale=residual, sums=last, add=True)
    return out.permute(0, 3, 1, 2)
