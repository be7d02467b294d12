"""mlp: the second half of a Swin layer in one pass (Liu et al., "Swin Transformer", ICCV 2021).

The attention's output projection, LayerNorm, two linear maps with a GELU between them, and both residuals. Between the
attention and the next layer, the residual stream is read once and written once; the hidden channels never leave the chip.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.kernels.launch import HALF, column_blocks, is_hopper, is_interpreting, jit, launch, tl, use_kernel
from engine.kernels.layer_norm import EPSILON, normalised, normalised_torch

# Pixels and hidden channels of a product, warps, pipeline stages. Twice the hidden channels spill where the operands of
# matrix instructions lie in registers, which is everywhere but on compute capability 9.0.
_TILE = (128, 16, 8, 2)
_HOPPER_TILE = (128, 32, 8, 2)
_LARGEST = 256  # channels of the residual stream that fit the registers of a program


class MlpWeights(NamedTuple):
    """Weights of ``mlp``, in one dtype; those of LayerNorm are in ``fc1`` (``norm_linear.fold_norm``)."""

    proj: Tensor
    """[C, A]"""

    proj_bias: Tensor
    """[C]"""

    fc1: Tensor
    """[hidden, C]"""

    fc1_bias: Tensor
    """[hidden]"""

    fc2: Tensor
    """[C, hidden]"""

    fc2_bias: Tensor
    """[C]"""


def mlp_torch(x: Tensor, y: Tensor, weights: MlpWeights, channels: int) -> Tensor:
    """``z + fc2(gelu(fc1(layer_norm(z))))`` with ``z = x + proj(y)``, of every pixel.

    Args:
        x: [..., C] float32, the residual stream; channels past ``channels`` are zero.
        y: [..., A] in the dtype of the linear maps, the attention's output.
        weights: the weights; their rows and columns past ``channels`` are zero.
        channels: number of channels that LayerNorm is over.

    Returns:
        [..., C] float32. GELU is the exact one. The operands of every product are rounded to the weights' dtype.
    """
    z = x + F.linear(y, weights.proj, weights.proj_bias)
    hidden = normalised_torch(z, channels, weights.fc1.dtype)
    hidden = F.gelu(F.linear(hidden, weights.fc1, weights.fc1_bias))
    return z + F.linear(hidden, weights.fc2, weights.fc2_bias)


@jit(do_not_specialize=("pixels",))
def _mlp_kernel(
    x: tl.tensor,
    y: tl.tensor,
    proj: tl.tensor,
    proj_bias: tl.tensor,
    fc1: tl.tensor,
    fc1_bias: tl.tensor,
    fc2: tl.tensor,
    fc2_bias: tl.tensor,
    out: tl.tensor,
    pixels: tl.tensor,
    eps: tl.tensor,
    channels: tl.constexpr,
    inner: tl.constexpr,
    hidden: tl.constexpr,
    upcast: tl.constexpr,
    block_m: tl.constexpr,
    block_k: tl.constexpr,
    block: tl.constexpr,
    rest: tl.constexpr,
) -> None:
    """``block_m`` pixels, in two blocks of columns: 192 channels are no power of two.

    The residual stream is the initial value of the products' sums, so it takes no registers of its own. ``block_k``: slice
    of the attention's ``inner`` channels, then of the ``hidden`` ones. The pixels of the last program overlap with its
    neighbour's, so nothing is masked.
    """
    width: tl.constexpr = block + rest
    first = min(tl.program_id(0) * block_m, pixels - block_m).to(tl.int64)
    m, c, k = tl.arange(0, block_m), tl.arange(0, block), tl.arange(0, block_k)
    c_rest = block + tl.arange(0, rest if rest else 16)
    at, at_rest = (m * width)[:, None] + c[None, :], (m * width)[:, None] + c_rest[None, :]

    z, z_rest = tl.load(x + first * width + at), tl.zeros([block_m, 16], tl.float32)
    if rest:
        z_rest = tl.load(x + first * width + at_rest)
    z += tl.load(proj_bias + c).to(tl.float32)[None, :]
    if rest:
        z_rest += tl.load(proj_bias + c_rest).to(tl.float32)[None, :]
    for start in range(0, inner, block_k):
        a = tl.load(y + first * inner + start + (m * inner)[:, None] + k[None, :])
        b = tl.load(proj + start + (c * inner)[None, :] + k[:, None])
        if upcast:  # the interpreter multiplies the bits of bfloat16 as if they were integers
            a, b = a.to(tl.float32), b.to(tl.float32)
        z = tl.dot(a, b, acc=z, input_precision="ieee")
        if rest:
            b_rest = tl.load(proj + start + (c_rest * inner)[None, :] + k[:, None])
            if upcast:
                b_rest = b_rest.to(tl.float32)
            z_rest = tl.dot(a, b_rest, acc=z_rest, input_precision="ieee")

    n, n_rest = normalised(z, z_rest, eps, channels, block, rest)
    half = fc1.dtype.element_ty
    n, n_rest = n.to(half), n_rest.to(half)
    if upcast:
        n, n_rest = n.to(tl.float32), n_rest.to(tl.float32)
    for start in range(0, hidden, block_k):
        factors = fc1 + start * width + (k * width)[None, :]
        b = tl.load(factors + c[:, None])
        if upcast:
            b = b.to(tl.float32)
        h = tl.dot(n, b, input_precision="ieee")
        if rest:
            b_rest = tl.load(factors + c_rest[:, None])
            if upcast:
                b_rest = b_rest.to(tl.float32)
            h = tl.dot(n_rest, b_rest, acc=h, input_precision="ieee")
        h += tl.load(fc1_bias + start + k).to(tl.float32)[None, :]
        h = (0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))).to(half)
        b = tl.load(fc2 + start + (c * hidden)[None, :] + k[:, None])
        if upcast:
            h, b = h.to(tl.float32), b.to(tl.float32)
        z = tl.dot(h, b, acc=z, input_precision="ieee")
        if rest:
            b_rest = tl.load(fc2 + start + (c_rest * hidden)[None, :] + k[:, None])
            if upcast:
                b_rest = b_rest.to(tl.float32)
            z_rest = tl.dot(h, b_rest, acc=z_rest, input_precision="ieee")

    z += tl.load(fc2_bias + c).to(tl.float32)[None, :]
    tl.store(out + first * width + at, z)
    if rest:
        z_rest += tl.load(fc2_bias + c_rest).to(tl.float32)[None, :]
        tl.store(out + first * width + at_rest, z_rest)


def mlp(x: Tensor, y: Tensor, weights: MlpWeights, channels: int, *, use_triton: bool | None = None) -> Tensor:
    """``mlp_torch`` by the kernel where there is one.

    The kernel is for 128 pixels and more of two blocks of channels (``column_blocks``) and attention and hidden channels that are
    multiples of 16. Unless forced (ValueError), other shapes take the definition, and so do float32, more than 256 channels
    and training.
    """
    width, inner, hidden = x.shape[-1], y.shape[-1], weights.fc1.shape[0]
    block, rest = column_blocks(width)
    block_m, block_k, warps, stages = _HOPPER_TILE if is_hopper(x.device) else _TILE
    pixels = x.numel() // width
    block_k = min(block_k, (inner | hidden) & -(inner | hidden))
    fits = block + rest == width and block_k >= 16 and pixels >= block_m
    if use_triton is None:
        is_small = weights.fc1.dtype in HALF and width <= _LARGEST
        use_triton = None if fits and is_small and not torch.is_grad_enabled() else False
    if not use_kernel(x.device, use_triton):
        return mlp_torch(x, y, weights, channels)
    if not fits:
        raise ValueError(
            f"{pixels} pixels, {width} + {inner} -> {hidden} -> {width}: not for this kernel; leave out use_triton"
        )
    x, y = x.contiguous(), y.contiguous()
    out = torch.empty_like(x)
    launch(
        _mlp_kernel,
        (-(-pixels // block_m),),
        *(x, y, *(tensor.contiguous() for tensor in weights), out, pixels, EPSILON),
        channels=channels,
        inner=inner,
        hidden=hidden,
        upcast=is_interpreting() and weights.fc1.dtype == torch.bfloat16,
        block_m=block_m,
        block_k=block_k,
        block=block,
        rest=rest,
        num_warps=warps,
        num_stages=stages,
    )
    return out
