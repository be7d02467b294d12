"""norm_linear: LayerNorm of the float32 residual stream and the linear map that reads it, in one pass.

The normalised pixels stay on the chip. SwinIR's queries, keys and values begin so.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.kernels.launch import HALF, column_blocks, is_hopper, is_interpreting, jit, launch, tl, use_kernel
from engine.kernels.layer_norm import EPSILON, normalised, normalised_torch

_TILE = (128, 64, 8, 2)  # pixels of a program, outputs of a product, warps, pipeline stages
# ptxas would take 128 and spill in bf16, to fit two programs on a multiprocessor. Only an H100 has the shared memory for two.
_REGISTERS = 168
_LARGEST = 256  # channels that fit the registers of a program


def norm_linear_torch(x: Tensor, channels: int, weight: Tensor, bias: Tensor) -> Tensor:
    """LayerNorm and a linear map of every pixel; ``fold_norm`` moves LayerNorm's own weights into the map's.

    Args:
        x: [..., C] float32; channels past ``channels`` are zero.
        channels: number of channels that are normalised.
        weight: [N, C], half precision or float32; columns past ``channels`` are zero.
        bias: [N] in the weight's dtype.

    Returns:
        [..., N] in the weight's dtype, to which the normalised channels are rounded before the product.
    """
    return F.linear(normalised_torch(x, channels, weight.dtype), weight, bias)


def fold_norm(norm: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [N, C] and bias [N] of the map that reads LayerNorm before its own weights ``norm`` and ``norm_bias`` [C]."""
    return weight * norm, bias + weight @ norm_bias


@jit(do_not_specialize=("pixels",))
def _norm_linear_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    pixels: tl.tensor,
    eps: tl.tensor,
    channels: tl.constexpr,
    outputs: tl.constexpr,
    upcast: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block: tl.constexpr,
    rest: tl.constexpr,
) -> None:
    """All ``outputs`` of ``block_m`` pixels, ``block_n`` at a time; the pixels are read and normalised once.

    The pixels of the last program overlap with its neighbour's, so nothing is masked.
    """
    width: tl.constexpr = block + rest
    first = min(tl.program_id(0) * block_m, pixels - block_m).to(tl.int64)
    m, c, n = tl.arange(0, block_m), tl.arange(0, block), tl.arange(0, block_n)
    c_rest = block + tl.arange(0, rest if rest else 16)
    a = tl.load(x + first * width + (m * width)[:, None] + c[None, :])
    a_rest = tl.zeros([block_m, 16], tl.float32)
    if rest:
        a_rest = tl.load(x + first * width + (m * width)[:, None] + c_rest[None, :])
    a, a_rest = normalised(a, a_rest, eps, channels, block, rest)
    a, a_rest = a.to(weight.dtype.element_ty), a_rest.to(weight.dtype.element_ty)
    if upcast:  # the interpreter multiplies the bits of bfloat16 as if they were integers
        a, a_rest = a.to(tl.float32), a_rest.to(tl.float32)
    target = out + first * outputs + (m * outputs)[:, None] + n[None, :]
    for start in range(0, outputs, block_n):
        factors = weight + start * width + (n * width)[None, :]
        b = tl.load(factors + c[:, None])
        if upcast:
            b = b.to(tl.float32)
        y = tl.dot(a, b, input_precision="ieee")
        if rest:
            b_rest = tl.load(factors + c_rest[:, None])
            if upcast:
                b_rest = b_rest.to(tl.float32)
            y = tl.dot(a_rest, b_rest, acc=y, input_precision="ieee")
        y += tl.load(bias + start + n).to(tl.float32)[None, :]
        tl.store(target + start, y.to(out.dtype.element_ty))


def norm_linear(x: Tensor, channels: int, weight: Tensor, bias: Tensor, *, use_triton: bool | None = None) -> Tensor:
    """``norm_linear_torch`` by the kernel where there is one.

    The kernel is for 128 pixels and more of two blocks of channels (``column_blocks``) and outputs that are a multiple of 16.
    Unless forced (ValueError), other shapes take the definition, and so do float32, more than 256 channels and training.
    """
    (outputs, width), (block_m, block_n, warps, stages) = weight.shape, _TILE
    block, rest = column_blocks(width)
    pixels, block_n = x.numel() // width, min(block_n, outputs & -outputs)
    fits = block + rest == width and block_n >= 16 and pixels >= block_m
    if use_triton is None:
        is_small = weight.dtype in HALF and width <= _LARGEST
        use_triton = None if fits and is_small and not torch.is_grad_enabled() else False
    if not use_kernel(x.device, use_triton):
        return norm_linear_torch(x, channels, weight, bias)
    if not fits:
        raise ValueError(f"{pixels} pixels, {width} -> {outputs}: not for this kernel; leave out use_triton")
    x, weight = x.contiguous(), weight.contiguous()
    out = weight.new_empty(*x.shape[:-1], outputs)
    launch(
        _norm_linear_kernel,
        (-(-pixels // block_m),),
        *(x, weight, bias, out, pixels, EPSILON),
        channels=channels,
        outputs=outputs,
        upcast=is_interpreting() and weight.dtype == torch.bfloat16,
        block_m=block_m,
        block_n=block_n,
        block=block,
        rest=rest,
        num_warps=warps,
        num_stages=stages,
        maxnreg=None if is_hopper(x.device) else _REGISTERS,
    )
    return out
