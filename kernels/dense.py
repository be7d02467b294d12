"""dense: ESRGAN's residual dense block without concatenation (Wang et al., ECCV workshops 2018).

All feature maps of a block lie side by side in the channels of one channels-last buffer. Every 3x3 convolution reads a
prefix of the channels and writes the next ones; the last one adds the residual. ``conv3x3`` is one such convolution on
views, so that an executor of bands can pass it a window of rows. ``dense_by_input`` computes the same sums in another
order: each map is convolved once for all its consumers, whose partial sums wait in a second buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.kernels.launch import HALF, column_blocks, is_interpreting, jit, launch, tl, use_kernel
from engine.kernels.tuning import fastest, size_bucket

# block_y, block_x, vector, warps and pipeline stages: candidates that are measured for each shape of convolution. block_k is
# not among them: it sets the order of the sums, and equal plans must give equal bits. The first one never spills.
_TILES = (
    (8, 8, 8, 8, 3),
    (8, 16, 8, 4, 3),
    (8, 16, 4, 4, 3),
    (8, 16, 8, 4, 1),
    (8, 16, 8, 8, 3),
    (16, 16, 8, 8, 3),
    (16, 16, 4, 8, 2),
    (8, 8, 8, 4, 4),
)
_INTERPRETED_TILE = (16, 32, 8, 4, 1)
_TILE = ("block_y", "block_x", "vector", "num_warps", "num_stages")
_VERSION = "conv3x3 2"  # of the kernel, in the name of stored tiles


def dense_torch(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], slope: float = 0.2, residual: float = 0.2
) -> Tensor:
    """One dense block.

    Args:
        x: [B, C, H, W], in the weights' dtype or float32.
        weights: of convolution i [growth, C + i growth, 3, 3], of the last one [C, C + i growth, 3, 3].
        biases: of convolution i [growth], of the last one [C].
        slope: negative slope of the leaky ReLU after all convolutions but the last.
        residual: factor of the last convolution's result y.

    Returns:
        x + residual * y, [B, C, H, W] in x's dtype.
    """
    maps = x.to(weights[0].dtype)
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        maps = torch.cat([maps, F.leaky_relu(F.conv2d(maps, weight, bias, padding=1), slope)], 1)
    return torch.add(x, F.conv2d(maps, weights[-1], biases[-1], padding=1), alpha=residual)


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
    """Write rows [top, top + h) of a 3x3 convolution of ``x`` into ``out``. All values outside ``x`` are zero.

    Args:
        x: [B, H, W, K].
        weight: [N, K, 3, 3] in x's dtype.
        bias: [N].
        out: [B, h, W, N]. It and x may be views, for example of one buffer, but may not share elements.
        top: first row to compute, in rows of x; may be negative.
        slope: negative slope of a leaky ReLU after the convolution; 1 for none.
        residual: [B, h, W, N]; the result is then residual + scale * y.
        scale: factor of y beside a residual.
    """
    rows = x.new_zeros(x.shape[0], out.shape[1] + 2, *x.shape[2:])
    first, end = max(0, top - 1), min(x.shape[1], top + out.shape[1] + 1)
    if first < end:
        rows[:, first - top + 1 : end - top + 1] = x[:, first:end]
    y = F.leaky_relu(F.conv2d(rows.permute(0, 3, 1, 2), weight, bias, padding=(0, 1)), slope).permute(0, 2, 3, 1)
    out.copy_(y if residual is None else torch.add(residual, y, alpha=scale))


@jit()
def _epilogue(
    y: tl.tensor,
    n: tl.tensor,
    valid: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    sums: tl.tensor,
    out: tl.tensor,
    slope: tl.tensor,
    scale: tl.tensor,
    outputs: tl.constexpr,
    final: tl.constexpr,
    accumulate: tl.constexpr,
    has_residual: tl.constexpr,
) -> None:
    """Store the products ``y`` [pixels, n]: columns below ``final`` as results, the others as partial sums.

    ``residual``, ``sums`` and ``out`` are the addresses of each pixel's first column.
    """
    mask = valid[:, None] & (n < outputs)[None, :]
    if accumulate:
        y += tl.load(sums[:, None] + n[None, :], mask=mask, other=0.0).to(tl.float32)
    if final < outputs:
        tl.store(sums[:, None] + n[None, :], y.to(sums.dtype.element_ty), mask=mask & (n >= final)[None, :])
    mask = mask & (n < final)[None, :]
    y += tl.load(bias + n, mask=n < final, other=0.0).to(tl.float32)[None, :]
    y = tl.where(y >= 0, y, y * slope)
    if has_residual:
        y = tl.load(residual[:, None] + n[None, :], mask=mask, other=0.0).to(tl.float32) + scale * y
    tl.store(out[:, None] + n[None, :], y.to(out.dtype.element_ty), mask=mask)


@jit(do_not_specialize=("height", "width", "rows", "top"))
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
    final: tl.constexpr,
    accumulate: tl.constexpr,
    has_residual: tl.constexpr,
    upcast: tl.constexpr,
    block_y: tl.constexpr,
    block_x: tl.constexpr,
    vector: tl.constexpr,
    block_k: tl.constexpr,
    block_n: tl.constexpr,
    block_rest: tl.constexpr,
) -> None:
    """block_y x block_x pixels of [rows, width]: a product of [pixels, 9 inputs] with ``weight`` [outputs, 3, 3, inputs].

    ``outputs`` is often 3 or 5 times a power of two, so the columns come in two blocks; ``block_rest`` may be 0.
    ``vector``: elements that are copied at once. Copies of 16 bytes bypass the first-level cache, copies of 8 do not.
    """
    across, down = tl.cdiv(width, block_x), tl.cdiv(rows, block_y)
    tile = tl.program_id(0)
    image = (tile // (across * down)).to(tl.int64)
    row, column = tile // across % down * block_y, tile % across * block_x
    m = tl.arange(0, block_y * block_x)
    dy, dx = (m // block_x).to(tl.int64), m % block_x

    # Nine bits a pixel: which of its neighbours exist. The others are the zero padding.
    exists = tl.zeros([block_y * block_x], tl.int32)
    for corner in tl.static_range(9):
        y, x_at = row + top + dy + (corner // 3 - 1), column + dx + (corner % 3 - 1)
        exists |= ((y >= 0) & (y < height) & (x_at >= 0) & (x_at < width)).to(tl.int32) << corner

    k, n = tl.arange(0, block_k), tl.arange(0, block_n)
    source = x + image * x_batch + (row + top - 1).to(tl.int64) * x_row + (column - 1) * x_pixel
    source = source + (dy * x_row + dx * x_pixel)[:, None] + k[None, :]
    factors = weight + (n * (9 * inputs))[None, :] + k[:, None]
    rest = tl.arange(0, block_rest if block_rest else 16)
    rest_factors = weight + ((block_n + rest) * (9 * inputs))[None, :] + k[:, None]
    products = tl.zeros([block_y * block_x, block_n], tl.float32)
    rest_products = tl.zeros([block_y * block_x, block_rest if block_rest else 16], tl.float32)
    # All neighbours of one slice of the channels in turn, while the cache holds it.
    for step in range(9 * tl.cdiv(inputs, block_k)):
        tap, part = step % 9, step // 9 * block_k
        pixel_mask = ((exists >> tap) & 1 != 0)[:, None]
        mask = (n < outputs)[None, :]
        rest_mask = (block_n + rest < outputs)[None, :]
        if inputs % block_k:
            pixel_mask = pixel_mask & (k < inputs - part)[None, :]
            mask = mask & (k < inputs - part)[:, None]
            rest_mask = rest_mask & (k < inputs - part)[:, None]
        neighbour = tl.max_contiguous(source + (tap // 3 * x_row + tap % 3 * x_pixel + part), (1, vector))
        a = tl.load(neighbour, mask=pixel_mask, other=0.0, cache_modifier=".ca")
        b = tl.load(factors + (tap * inputs + part), mask=mask, other=0.0)
        if upcast:  # the interpreter multiplies the bits of bfloat16 as if they were integers
            a, b = a.to(tl.float32), b.to(tl.float32)
        products = tl.dot(a, b, acc=products, input_precision="ieee")
        if block_rest:
            c = tl.load(rest_factors + (tap * inputs + part), mask=rest_mask, other=0.0)
            if upcast:
                c = c.to(tl.float32)
            rest_products = tl.dot(a, c, acc=rest_products, input_precision="ieee")

    valid = (row + dy < rows) & (column + dx < width)
    residual = residual + image * residual_batch + (row + dy) * residual_row + (column + dx) * residual_pixel
    sums = sums + image * sums_batch + (row + dy) * sums_row + (column + dx) * sums_pixel
    out = out + image * out_batch + (row + dy) * out_row + (column + dx) * out_pixel
    _epilogue(products, n, valid, bias, residual, sums, out, slope, scale, outputs, final, accumulate, has_residual)
    if block_rest:
        _epilogue(
            rest_products,
            block_n + rest,
            valid,
            bias,
            residual,
            sums,
            out,
            slope,
            scale,
            outputs,
            final,
            accumulate,
            has_residual,
        )


def block_sizes(inputs: int, outputs: int) -> dict[str, int]:
    """``block_k``, ``block_n`` and ``block_rest`` for a convolution of these numbers of channels."""
    block_n, block_rest = column_blocks(outputs)
    wide = 64 if inputs % 64 == 0 and outputs <= 64 else 32  # three stages of 64 x 192 fit the H100 alone
    return {
        "block_k": min(wide, max(16, 1 << (inputs - 1).bit_length())),
        "block_n": block_n,
        "block_rest": block_rest,
    }


def _launch_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    top: int = 0,
    slope: float = 1.0,
    residual: Tensor | None = None,
    scale: float = 1.0,
    sums: Tensor | None = None,
    *,
    accumulate: bool = False,
) -> None:
    """``conv3x3_torch`` with partial sums.

    ``sums`` [B, h, W, N] takes the columns after those of ``out``; ``accumulate`` adds its values to the products.
    """
    for name, view in (("x", x), ("out", out), ("residual", residual), ("sums", sums)):
        if view is not None and view.stride(3) != 1:
            raise ValueError(
                f"{name}: channels with a stride of {view.stride(3)}; pass a channels-last tensor (stride 1)"
            )
    batch, height, width, inputs = x.shape
    absent = x[..., :0]
    tensors = [x, weight.contiguous(memory_format=torch.channels_last), bias]
    tensors += [absent if residual is None else residual, absent if sums is None else sums, out]
    strides = [t.stride()[:3] for t in (tensors[0], *tensors[3:])]
    options: dict[str, object] = {
        **dict(zip(("x_pixel", "residual_pixel", "sums_pixel", "out_pixel"), (s[2] for s in strides), strict=True)),
        **block_sizes(inputs, weight.shape[0]),
        "inputs": inputs,
        "outputs": weight.shape[0],
        "final": out.shape[3],
        "accumulate": accumulate,
        "has_residual": residual is not None,
        "upcast": is_interpreting() and x.dtype == torch.bfloat16,
    }
    scalars = [height, width, out.shape[1], top, *(stride for s in strides for stride in s[:2]), slope, scale]

    def start(tile: tuple[int, ...], launcher: Callable[..., None]) -> None:
        grid = (batch * -(-out.shape[1] // tile[0]) * -(-width // tile[1]),)
        launcher(_conv3x3_kernel, grid, *tensors, *scalars, **options, **dict(zip(_TILE, tile, strict=True)))

    if is_interpreting():
        start(_INTERPRETED_TILE, launch)
        return
    pixels = size_bucket(batch * out.shape[1] * width)
    shape = (
        inputs,
        weight.shape[0],
        out.shape[3],
        str(x.dtype),
        str(out.dtype),
        accumulate,
        residual is not None,
        pixels,
    )
    # A trial adds to what the last one left, unless its results have memory of their own.
    changed = [sums] if accumulate and sums is not None else []
    changed += [out] if residual is not None and residual.data_ptr() == out.data_ptr() else []
    start(fastest(_VERSION, _TILES, shape, x.device, start, changed), launch)


def _use_kernel(weight: Tensor, use_triton: bool | None) -> bool:
    """``use_kernel``, but float32 takes the definition unless forced: only half precision has matrix instructions."""
    if use_triton is None and weight.dtype not in HALF:
        return False
    return use_kernel(weight.device, use_triton)


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
    """``conv3x3_torch`` by the kernel where there is one.

    The kernel needs channels of stride 1 (ValueError). Keep the weights channels-last, or every call copies them.
    """
    if _use_kernel(weight, use_triton):
        _launch_conv(x, weight, bias, out, top, slope, residual, scale)
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
    """``dense_torch`` by the kernel where there is one.

    The kernel's result is channels-last. x and weights that are not are copied.
    """
    if not _use_kernel(weights[0], use_triton):
        return dense_torch(x, weights, biases, slope, residual)
    pixels = x.permute(0, 2, 3, 1).contiguous()  # [B, H, W, C]
    growth, end = weights[0].shape[0], pixels.shape[3]
    buffer = weights[0].new_empty(*pixels.shape[:3], end + (len(weights) - 1) * growth)
    buffer[..., :end] = pixels
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        _launch_conv(buffer[..., :end], weight, bias, buffer[..., end : end + growth], slope=slope)
        end += growth
    out = torch.empty_like(pixels)
    _launch_conv(buffer, weights[-1], biases[-1], out, residual=pixels, scale=residual)
    return out.permute(0, 3, 1, 2)


def pack_by_input(weights: Sequence[Tensor]) -> list[Tensor]:
    """Weights of a dense block in the order of ``dense_by_input``: for each map, those of all its consumers.

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
    """``dense`` with its sums in another order.

    Args:
        x, weights, biases, slope, residual, use_triton: as for ``dense``.
        packed: ``pack_by_input(weights)``, computed once by the caller; None packs them in every call.
        sums_dtype: dtype of the partial sums between the convolutions. Half precision halves their traffic and rounds
            each sum up to three times more.
    """
    if not _use_kernel(weights[0], use_triton):
        return dense_torch(x, weights, biases, slope, residual)
    pixels = x.permute(0, 2, 3, 1).contiguous()  # [B, H, W, C]
    growth, last_map = weights[0].shape[0], pixels.to(weights[0].dtype)
    packed = pack_by_input(weights) if packed is None else packed
    # Columns [i growth, (i + 1) growth) belong to convolution i. The first one's are final at once: never touched here.
    sums = torch.empty(*pixels.shape[:3], packed[0].shape[0], dtype=sums_dtype, device=x.device)
    for i, (weight, bias) in enumerate(zip(packed[:-1], biases[:-1], strict=True)):
        out = last_map.new_empty(*pixels.shape[:3], growth)
        _launch_conv(last_map, weight, bias, out, slope=slope, sums=sums[..., i * growth :], accumulate=i > 0)
        last_map = out
    out = torch.empty_like(pixels)
    last_sums = sums[..., (len(packed) - 1) * growth :]
    _launch_conv(
        last_map, packed[-1], biases[-1], out, residual=pixels, scale=residual, sums=last_sums, accumulate=True
    )
    return out.permute(0, 3, 1, 2)
