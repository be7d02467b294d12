"""window_attention: SwinIR's attention between its qkv and its output projection, in one pass.

Multi-head self-attention inside windows of w x w pixels that start at the origin or, cyclically shifted, at (s, s), with
a bias for every relative position (Liu et al., "Swin Transformer", ICCV 2021; Liang et al., "SwinIR", ICCV workshops
2021). The kernel finds each window's pixels through the shift, so nothing is rolled and no window is copied.

An image that is streamed in bands of rows shifts only its columns: its rows arrive on the layer's own grid. The caller
names the rows of windows (``seams``) that hold pixels of both the upper and the lower border of the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from engine.kernels.launch import is_interpreting, jit, launch, tl, use_kernel

MASKED = -100.0
"""Added to the logit of two pixels that share a window only because the shift is cyclic."""

_WINDOWS = 4  # windows of a program: a head's bias is loaded once for all of them
_LARGEST = 64  # pixels of a window and channels of a head that fit the registers of a program


def _check(qkv: Tensor, bias: Tensor, window: int, shift: int) -> tuple[int, int]:
    """(heads, channels of a head). Raises ValueError for shapes that do not fit together."""
    heads, pixels = bias.shape[0], window * window
    if bias.shape != (heads, pixels, pixels):
        raise ValueError(f"bias of {list(bias.shape)}: no window of {window}; pass [heads, {pixels}, {pixels}]")
    _, height, width, channels = qkv.shape
    if height % window or width % window:
        raise ValueError(f"{height} x {width} pixels: no multiple of the window of {window}; pad the image first")
    if channels % (3 * heads):
        raise ValueError(f"{channels} channels: no multiple of 3 x {heads} heads; pass queries, keys and values")
    if not 0 <= shift < window:
        raise ValueError(f"shift of {shift}: outside the window; choose one of 0 to {window - 1}")
    return heads, channels // (3 * heads)


def _seam_pair(rows: int, seams: Sequence[int] | None) -> tuple[int, int]:
    """Numbers of the two rows of windows that are seams, -1 for none."""
    if seams is None:
        return rows - 1, -1
    if len(seams) > 2:
        raise ValueError(f"{len(seams)} seams in one band: an image has two borders; pass at most 2")
    first, second = (*seams, -1, -1)[:2]
    return first, second


def _shift_masks(window: int, shift: int, device: torch.device) -> Tensor:
    """[3, N, N]: the mask of the last row of windows, of the last column, and of the window in both."""
    shifted = torch.arange(window, device=device) >= window - shift
    bottom, right = shifted.repeat_interleave(window).int(), shifted.repeat(window).int()
    kinds = torch.stack([bottom, right, 2 * bottom + right])
    return (kinds[:, :, None] != kinds[:, None, :]).float() * MASKED


def window_attention_torch(
    qkv: Tensor,
    bias: Tensor,
    window: int,
    shift: int = 0,
    scale: float | None = None,
    seams: Sequence[int] | None = None,
) -> Tensor:
    """Attention inside windows. Logits and softmax are float32.

    Args:
        qkv: [B, H, W, 3 * heads * d]; H and W are multiples of ``window``.
        bias: [heads, N, N] float32, N = window**2.
        window: side of a window in pixels.
        shift: offset of the windows in pixels, 0 to window - 1.
        scale: factor of the queries; 1 / sqrt(d) if None. Heads that are padded with zeros need that of the true d.
        seams: None for a whole image. For a band, whose rows are not shifted, its rows of windows with pixels of both
            borders: two at most.

    Returns:
        [B, H, W, heads * d] in qkv's dtype.

    Raises:
        ValueError: shapes that do not fit together.
    """
    heads, d = _check(qkv, bias, window, shift)
    batch, height, width, _ = qkv.shape
    rows, columns = height // window, width // window
    row_shift = shift if seams is None else 0
    x = torch.roll(qkv, (-row_shift, -shift), (1, 2)) if shift else qkv
    x = x.reshape(batch, rows, window, columns, window, 3, heads, d)
    # 3 of [B, rows, columns, heads, N, d]
    query, key, value = x.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(5, 6).unbind(0)
    logits = (query * (d**-0.5 if scale is None else scale)) @ key.transpose(-2, -1) + bias
    if shift:
        bottom, right, corner = _shift_masks(window, shift, qkv.device)
        seam_rows = sorted({row for row in _seam_pair(rows, seams) if row >= 0})
        for row in seam_rows:
            logits[:, row, :-1].add_(bottom)  # += would also copy the result to itself
            logits[:, row, -1].add_(corner)
        # The last column's other windows, those between two seams at a time.
        for before, after in pairwise((-1, *seam_rows, rows)):
            if after - before > 1:
                logits[:, before + 1 : after, -1].add_(right)
    y = logits.softmax(-1).to(value.dtype) @ value
    y = y.reshape(batch, rows, columns, heads, window, window, d).permute(0, 1, 4, 2, 5, 3, 6)
    y = y.reshape(batch, height, width, heads * d)
    return torch.roll(y, (row_shift, shift), (1, 2)) if shift else y


@jit(do_not_specialize=("windows", "rows", "columns", "seam", "other_seam"))
def _window_attention_kernel(
    qkv: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    windows: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    seam: tl.tensor,
    other_seam: tl.tensor,
    qkv_batch: tl.tensor,
    qkv_row: tl.tensor,
    scale: tl.tensor,
    qkv_pixel: tl.constexpr,
    heads: tl.constexpr,
    d: tl.constexpr,
    window: tl.constexpr,
    shift: tl.constexpr,
    shift_rows: tl.constexpr,
    masked: tl.constexpr,
    upcast: tl.constexpr,
    program_windows: tl.constexpr,
    block_n: tl.constexpr,
    block_d: tl.constexpr,
) -> None:
    """One head in ``program_windows`` windows.

    ``windows`` counts the whole batch, ``rows`` x ``columns`` one image. ``shift_rows``: whether rows are shifted, as the
    columns are. The heads of one group of windows are neighbours in the grid: their slices of a pixel share cache lines.
    """
    pixels: tl.constexpr = window * window
    head = tl.program_id(0) % heads
    first = tl.program_id(0) // heads * program_windows
    token, channel = tl.arange(0, block_n), tl.arange(0, block_d)
    down, right = token // window, token % window
    pair = (token < pixels)[:, None] & (token < pixels)[None, :]
    start = bias + head * pixels * pixels + token[:, None] * pixels + token[None, :]
    start = tl.where((token < pixels)[None, :], tl.load(start, mask=pair, other=0.0).to(tl.float32), float("-inf"))
    mask = (token < pixels)[:, None] & (channel < d)[None, :]
    slot = head * d + channel

    for step in range(program_windows):
        index = min(first + step, windows - 1)  # the last program computes the last window again
        image, position = index // (rows * columns), index % (rows * columns)
        row, column = position // columns, position % columns
        y, x = row * window + down, column * window + right + shift
        if shift_rows:
            y = tl.where(y + shift >= rows * window, y + shift - rows * window, y + shift)
        y = y.to(tl.int64)
        x = tl.where(x >= columns * window, x - columns * window, x)
        pixel = image.to(tl.int64) * qkv_batch + y * qkv_row + x * qkv_pixel
        source = qkv + pixel[:, None] + slot[None, :]
        query = tl.load(source, mask=mask, other=0.0)
        key = tl.load(source + heads * d, mask=mask, other=0.0)
        value = tl.load(source + 2 * heads * d, mask=mask, other=0.0)
        query = (query.to(tl.float32) * scale).to(qkv.dtype.element_ty)
        if upcast:  # the interpreter multiplies the bits of bfloat16 as if they were integers
            query, key, value = query.to(tl.float32), key.to(tl.float32), value.to(tl.float32)

        logits = tl.dot(query, tl.trans(key), acc=start, input_precision="ieee")
        if shift:
            below = ((row == seam) | (row == other_seam)) & (down >= window - shift)
            beyond = (column == columns - 1) & (right >= window - shift)
            kind = below.to(tl.int32) * 2 + beyond.to(tl.int32)
            logits = tl.where(kind[:, None] == kind[None, :], logits, logits + masked)
        power = tl.exp(logits - tl.max(logits, 1)[:, None])
        total = tl.sum(power, 1)
        power = power.to(qkv.dtype.element_ty)
        if upcast:
            power = power.to(tl.float32)
        result = tl.dot(power, value, input_precision="ieee") / total[:, None]

        pixel = ((image.to(tl.int64) * rows * window + y) * columns * window + x) * (heads * d)
        tl.store(out + pixel[:, None] + slot[None, :], result.to(out.dtype.element_ty), mask=mask)


def window_attention(
    qkv: Tensor,
    bias: Tensor,
    window: int,
    shift: int = 0,
    scale: float | None = None,
    seams: Sequence[int] | None = None,
    *,
    use_triton: bool | None = None,
) -> Tensor:
    """``window_attention_torch`` by the kernel where there is one. A last stride other than 1 costs a copy.

    Unless forced, the kernel is not taken for windows of more than 64 pixels, for heads of more than 64 channels, nor for
    training: it has no derivative.
    """
    heads, d = _check(qkv, bias, window, shift)
    if use_triton is None and (max(window * window, d) > _LARGEST or torch.is_grad_enabled()):
        use_triton = False
    if not use_kernel(qkv.device, use_triton):
        return window_attention_torch(qkv, bias, window, shift, scale, seams)
    batch, height, width, _ = qkv.shape
    qkv = qkv if qkv.stride(3) == 1 else qkv.contiguous()
    out = qkv.new_empty(batch, height, width, heads * d)
    windows = batch * (height // window) * (width // window)
    rows = height // window
    arguments = (
        qkv,
        bias.contiguous(),
        out,
        windows,
        rows,
        width // window,
        *_seam_pair(rows, seams),
        *qkv.stride()[:2],
    )
    launch(
        _window_attention_kernel,
        (heads * -(-windows // _WINDOWS),),
        *arguments,
        d**-0.5 if scale is None else scale,
        qkv_pixel=qkv.stride(2),
        heads=heads,
        d=d,
        window=window,
        shift=shift,
        shift_rows=seams is None,
        masked=MASKED,
        upcast=is_interpreting() and qkv.dtype == torch.bfloat16,
        program_windows=_WINDOWS,
        block_n=max(16, 1 << (window * window - 1).bit_length()),
        block_d=max(16, 1 << (d - 1).bit_length()),
        # Without matrix instructions, float32 needs the registers of twice the threads.
        num_warps=8 if qkv.dtype == torch.float32 else 4,
    )
    return out
