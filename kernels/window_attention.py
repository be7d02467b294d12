"""window_attention: what SwinIR's attention computes between its qkv and its output projection, in one pass.

Multi-head self-attention inside windows of w x w pixels that start at the origin or, cyclically shifted, at (s, s), with
a bias for every relative position (Liu et al., "Swin Transformer", ICCV 2021; Liang et al., "SwinIR", ICCV workshops
2021). The kernel finds each window's pixels through the shift, so nothing is rolled and no window is copied.

A picture that is streamed in bands of rows shifts only its columns: its rows arrive on the layer's own grid, and the
caller names the rows of windows (``seams``) that hold pixels of both borders of the picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.kernels.launch import is_interpreting, jit, launch, takes_kernel, tl

MASKED = -100.0  # added to the logit of a pair that is together in a window only because the picture is cyclic
_STRIP = 4  # windows a program: a head's bias is loaded once for all of them
_LARGEST = 64  # pixels a window and channels a head that fit the registers of a program


def _check(qkv: Tensor, bias: Tensor, window: int, shift: int) -> tuple[int, int]:
    """(heads, channels a head); ValueError where shapes do not fit together."""
    heads, pixels = bias.shape[0], window * window
    if bias.shape != (heads, pixels, pixels):
        raise ValueError(
            f"a bias of {list(bias.shape)} fits no window of {window}: [heads, {pixels}, {pixels}] was expected"
        )
    _, height, width, channels = qkv.shape
    if height % window or width % window:
        raise ValueError(f"{height} x {width} pixels are no multiple of the window of {window}: pad the picture first")
    if channels % (3 * heads):
        raise ValueError(f"{channels} channels are no queries, keys and values of {heads} heads")
    if not 0 <= shift < window:
        raise ValueError(f"a shift of {shift} is outside 0 .. {window - 1}")
    return heads, channels // (3 * heads)


def _two(rows: int, seams: Sequence[int] | None) -> tuple[int, int]:
    """The numbers of the two rows of windows that are seams, -1 for none."""
    if seams is None:
        return rows - 1, -1
    if len(seams) > 2:
        raise ValueError(f"{len(seams)} seams in one band: a picture has two borders")
    first, second = (*seams, -1, -1)[:2]
    return first, second


def _seams(window: int, shift: int, device: torch.device) -> Tensor:
    """[3, N, N]: the mask of the last row of windows, of the last column, and of the one in both."""
    rolled = torch.arange(window, device=device) >= window - shift
    bottom, right = rolled.repeat_interleave(window).int(), rolled.repeat(window).int()
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
    """``qkv`` [B, H, W, 3 * heads * d], H and W multiples of ``window``; ``bias`` [heads, N, N] float32, N = window**2.

    ``scale`` of the queries: 1 / sqrt(d) unless d holds padding. ``seams``: None for a whole picture, or the at most two
    such rows of windows in a band whose rows are not to be shifted. Logits and softmax are float32. Returns
    [B, H, W, heads * d] in qkv's dtype. Raises ValueError.
    """
    heads, d = _check(qkv, bias, window, shift)
    batch, height, width, _ = qkv.shape
    rows, columns = height // window, width // window
    down = shift if seams is None else 0
    x = torch.roll(qkv, (-down, -shift), (1, 2)) if shift else qkv
    x = x.reshape(batch, rows, window, columns, window, 3, heads, d)
    # 3 of [B, rows, columns, heads, N, d]
    query, key, value = x.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(5, 6).unbind(0)
    logits = (query * (d**-0.5 if scale is None else scale)) @ key.transpose(-2, -1) + bias
    if shift:
        bottom, right, corner = _seams(window, shift, qkv.device)
        for row in range(rows):
            is_seam = row == rows - 1 if seams is None else row in seams
            if is_seam:
                logits[:, row, :-1] += bottom
            logits[:, row, -1] += corner if is_seam else right
    y = logits.softmax(-1).to(value.dtype) @ value
    y = y.reshape(batch, rows, columns, heads, window, window, d).permute(0, 1, 4, 2, 5, 3, 6)
    y = y.reshape(batch, height, width, heads * d)
    return torch.roll(y, (down, shift), (1, 2)) if shift else y


@jit(("windows", "rows", "columns", "seam", "other_seam"))
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
    rolled: tl.constexpr,
    masked: tl.constexpr,
    widen: tl.constexpr,
    strip: tl.constexpr,
    block_n: tl.constexpr,
    block_d: tl.constexpr,
) -> None:
    """One head in ``strip`` windows. ``windows`` counts the whole batch, ``rows`` x ``columns`` those of a picture.

    ``rolled``: whether the rows are to be shifted, as the columns are.

    The heads of one strip are neighbours in the grid: their slices of a pixel share cache lines.
    """
    pixels: tl.constexpr = window * window
    head = tl.program_id(0) % heads
    first = tl.program_id(0) // heads * strip
    token, channel = tl.arange(0, block_n), tl.arange(0, block_d)
    down, right = token // window, token % window
    pair = (token < pixels)[:, None] & (token < pixels)[None, :]
    start = bias + head * pixels * pixels + token[:, None] * pixels + token[None, :]
    start = tl.where((token < pixels)[None, :], tl.load(start, mask=pair, other=0.0).to(tl.float32), float("-inf"))
    kept = (token < pixels)[:, None] & (channel < d)[None, :]
    lane = head * d + channel

    for turn in range(strip):
        index = min(first + turn, windows - 1)  # the last strip computes its last window again
        picture, at = index // (rows * columns), index % (rows * columns)
        row, column = at // columns, at % columns
        y, x = row * window + down, column * window + right + shift
        if rolled:
            y = tl.where(y + shift >= rows * window, y + shift - rows * window, y + shift)
        y = y.to(tl.int64)
        x = tl.where(x >= columns * window, x - columns * window, x)
        pixel = picture.to(tl.int64) * qkv_batch + y * qkv_row + x * qkv_pixel
        read = qkv + pixel[:, None] + lane[None, :]
        query = tl.load(read, mask=kept, other=0.0)
        key = tl.load(read + heads * d, mask=kept, other=0.0)
        value = tl.load(read + 2 * heads * d, mask=kept, other=0.0)
        query = (query.to(tl.float32) * scale).to(qkv.dtype.element_ty)
        if widen:  # the interpreter multiplies the bits of bfloat16 as if they were integers
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
        if widen:
            power = power.to(tl.float32)
        result = tl.dot(power, value, input_precision="ieee") / total[:, None]

        pixel = ((picture.to(tl.int64) * rows * window + y) * columns * window + x) * (heads * d)
        tl.store(out + pixel[:, None] + lane[None, :], result.to(out.dtype.element_ty), mask=kept)


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
    """See ``window_attention_torch``. A last stride other than 1 costs a copy.

    Windows of more than 64 pixels, heads of more than 64 channels and training (the kernel has no derivative) take the twin
    unless the kernel is insisted on.
    """
    heads, d = _check(qkv, bias, window, shift)
    if use_triton is None and (max(window * window, d) > _LARGEST or torch.is_grad_enabled()):
        use_triton = False
    if not takes_kernel(qkv.device, use_triton):
        return window_attention_torch(qkv, bias, window, shift, scale, seams)
    batch, height, width, _ = qkv.shape
    qkv = qkv if qkv.stride(3) == 1 else qkv.contiguous()
    out = qkv.new_empty(batch, height, width, heads * d)
    windows = batch * (height // window) * (width // window)
    rows = height // window
    arguments = (qkv, bias.contiguous(), out, windows, rows, width // window, *_two(rows, seams), *qkv.stride()[:2])
    launch(
        _window_attention_kernel,
        (heads * -(-windows // _STRIP),),
        *arguments,
        d**-0.5 if scale is None else scale,
        qkv_pixel=qkv.stride(2),
        heads=heads,
        d=d,
        window=window,
        shift=shift,
        rolled=seams is None,
        masked=MASKED,
        widen=is_interpreting() and qkv.dtype == torch.bfloat16,
        strip=_STRIP,
        block_n=max(16, 1 << (window * window - 1).bit_length()),
        block_d=max(16, 1 << (d - 1).bit_length()),
        # Without matrix instructions, float32 needs the registers of twice the threads.
        num_warps=8 if qkv.dtype == torch.float32 else 4,
    )
    return out
