"""Launches compile for every supported GPU without one: no spills, matrix instructions, and wide loads and stores."""

import re
from unittest import mock

import pytest
import torch
from support.kernels import assert_all_compile, launches, needs_triton

from engine.geometry import Box
from engine.kernels import dense, mlp
from engine.kernels.blend import blend
from engine.kernels.gather import Noise, gather
from engine.kernels.layer_norm import layer_norm
from engine.kernels.norm_linear import norm_linear
from engine.kernels.trim import trim
from engine.kernels.window_attention import window_attention


def call_gather(source, target, channels=0):
    frame = Box(0, 0, 32, 512)
    gather(torch.empty(3, 32, 512, dtype=source), frame, frame, (32, 512), Noise(0.1, 1, 2, channels), dtype=target)


def call_trim(source, target, memory_format=torch.contiguous_format, rows_straddle=False):
    output = torch.empty(1, 3, 64, 512, dtype=source).contiguous(memory_format=memory_format)
    above = torch.empty(3, 512, dtype=target)
    trim(output, Box(0, 0, 64, 512), target, dither=True, halve=True, above=above if rows_straddle else None)


def call_blend(source, target, axis):
    strip = torch.empty(3, 64, 512, dtype=source)
    blend(strip, strip, axis, "cosine", target)


CALLS = {
    "gather u8 -> fp16": lambda: call_gather(torch.uint8, torch.float16),
    "gather fp32 with noise channels": lambda: call_gather(torch.float32, torch.float32, 16),
    "gather u8 -> bf16": lambda: call_gather(torch.uint8, torch.bfloat16),
    "trim fp16 -> u8": lambda: call_trim(torch.float16, torch.uint8),
    "trim fp32 channels-last -> u8": lambda: call_trim(torch.float32, torch.uint8, torch.channels_last),
    "trim bf16 -> u8": lambda: call_trim(torch.bfloat16, torch.uint8),
    "trim fp32 -> u8, below a row": lambda: call_trim(torch.float32, torch.uint8, rows_straddle=True),
    "trim fp32 -> fp32": lambda: call_trim(torch.float32, torch.float32),
    "blend fp32 -> u8": lambda: call_blend(torch.float32, torch.uint8, "x"),
    "blend fp16 -> fp32": lambda: call_blend(torch.float16, torch.float32, "y"),
    "trim of a pixel": lambda: trim(torch.empty(1, 1, 1, 1), Box(0, 0, 1, 1), torch.uint8, halve=True),
    "blend of a pixel": lambda: blend(torch.empty(1, 1, 1), torch.empty(1, 1, 1), "x"),
}

# Least bytes of a thread's widest load and store. Neighbours in channels-last planes are not adjacent.
WIDTHS = {
    "trim fp16 -> u8": (8, 4),
    "trim fp32 channels-last -> u8": (4, 4),
    "trim bf16 -> u8": (8, 4),
    "trim fp32 -> u8, below a row": (16, 4),
    "trim fp32 -> fp32": (16, 16),
    "blend fp32 -> u8": (16, 8),
    "blend fp16 -> fp32": (16, 16),
}


def widest(ptx, access):
    """Bytes of the widest access to global memory: "ld.global ... .v4.b32" moves 16."""
    accesses = re.findall(rf"{access}\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)", ptx)
    return max(int(lanes or 1) * int(bits) // 8 for lanes, bits in accesses)


# The kernels with matrix products, at the shapes of SwinIR-M and RRDBNet 64x23.


def call_conv(inputs, outputs, tile, dtype=torch.float16, residual=False):
    x, out = torch.empty(1, 32, 32, 192).to(dtype)[..., :inputs], torch.empty(1, 32, 32, outputs)
    weight, stream = torch.empty(outputs, inputs, 3, 3).to(dtype), out if residual else None
    with mock.patch.object(dense, "_TILES", (tile,)):
        dense.conv3x3(x, weight, torch.empty(outputs).to(dtype), out if residual else out.to(dtype), residual=stream)


def call_conv_by_input(tile):
    """Partial sums of a map for all its consumers, added in place."""
    x, sums = torch.empty(1, 32, 32, 32).half(), torch.empty(1, 32, 32, 160)
    weight, bias, out = torch.empty(160, 32, 3, 3).half(), torch.empty(32).half(), torch.empty(1, 32, 32, 32).half()
    with mock.patch.object(dense, "_TILES", (tile,)):
        dense._launch_conv(x, weight, bias, out, sums=sums, accumulate=True)


def call_attention(dtype, d, shift):
    qkv = torch.empty(1, 32, 32, 18 * d).to(dtype)
    window_attention(qkv, torch.empty(6, 64, 64), 8, shift, 30**-0.5)


def call_layer_norm(dtype):
    layer_norm(torch.empty(256, 192), torch.empty(192), torch.empty(192), 180, dtype)


def call_norm_linear(dtype):
    norm_linear(torch.empty(256, 192), 180, torch.empty(576, 192).to(dtype), torch.empty(576).to(dtype))


def call_mlp(dtype):
    shapes = (192, 192), (192,), (384, 192), (384,), (192, 384), (192,)
    weights = mlp.MlpWeights(*(torch.empty(shape).to(dtype) for shape in shapes))
    mlp.mlp(torch.empty(256, 192), torch.empty(256, 192).to(dtype), weights, 180)


PRODUCTS = {
    "conv3x3 160 -> 32": lambda: call_conv(160, 32, (8, 16, 8, 4, 3)),
    "window_attention, padded heads": lambda: call_attention(torch.float16, 32, 4),
    "norm_linear": lambda: call_norm_linear(torch.float16),
    "mlp": lambda: call_mlp(torch.float16),
    "conv3x3 64 -> 32, narrow copies": lambda: call_conv(64, 32, (8, 16, 4, 4, 3)),
    "conv3x3 192 -> 64 with residual": lambda: call_conv(192, 64, (8, 16, 8, 8, 3), torch.bfloat16, residual=True),
    "conv3x3 by input": lambda: call_conv_by_input((8, 8, 8, 8, 3)),
    "window_attention": lambda: call_attention(torch.bfloat16, 30, 0),
    "norm_linear bf16": lambda: call_norm_linear(torch.bfloat16),
    "mlp bf16": lambda: call_mlp(torch.bfloat16),
}
"""Launches in half precision, which take the tensor cores."""

OTHERS = {
    "layer_norm": lambda: call_layer_norm(torch.float16),
    "layer_norm fp32": lambda: call_layer_norm(torch.float32),
    "window_attention fp32": lambda: call_attention(torch.float32, 30, 4),
}

ONE_EACH = (
    *("gather u8 -> fp16", "trim fp16 -> u8", "blend fp32 -> u8", "layer_norm"),
    *("conv3x3 160 -> 32", "window_attention, padded heads", "norm_linear", "mlp"),
)
"""A launch of each kernel, as a render on a GPU makes it most."""

SHARED = 99 << 10
"""Bytes of shared memory that a program may have on every GPU but those of 8.0 and 9.0."""


def check(monkeypatch, names, **options):
    cases = {name: launches(monkeypatch, {**CALLS, **PRODUCTS, **OTHERS}[name]) for name in names}
    assert all(len(case) == 1 for case in cases.values())
    results = assert_all_compile([case[0] for case in cases.values()], **options)
    for name, result in zip(cases, results, strict=True):
        for architecture, compiled in result.items():
            if name in PRODUCTS:
                assert compiled.shared <= SHARED or architecture == 90, (name, architecture)
                instruction = "wgmma.mma_async" if architecture == 90 else "mma.sync.aligned.m16n8k16"
                assert instruction in compiled.ptx, (name, architecture)
            if name in CALLS:
                check_pixels(name, compiled)


def check_pixels(name, compiled):
    """Bits of the definition, and wide accesses."""
    assert compiled.shared <= 48 << 10, name
    # A fused multiply-add would round once where the twin rounds twice; .ftz is the logarithm's own.
    assert not re.search(r"\bfma\.rn\.f32|\bmul\.f32|\badd\.f32", compiled.ptx), name
    for access, width in zip(("ld", "st"), WIDTHS.get(name, ()), strict=False):
        assert widest(compiled.ptx, access) >= width, (name, access)


@needs_triton
def test_a_launch_of_each_pixel_kernel_compiles(monkeypatch):
    check(monkeypatch, ("gather u8 -> fp16", "trim fp16 -> u8", "blend fp32 -> u8"), architectures=(90,))


@needs_triton
@pytest.mark.slow
def test_a_launch_of_each_kernel_compiles(monkeypatch):
    check(monkeypatch, ONE_EACH)


@needs_triton
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_all_launches_compile(monkeypatch):
    check(monkeypatch, [*CALLS, *PRODUCTS, *OTHERS])


@needs_triton
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_an_h100_has_launches_of_its_own(monkeypatch):
    """A wider tile of the MLP, which spills on all others, and fewer registers for two programs."""
    names = [name for name in PRODUCTS if name.startswith(("mlp", "norm_linear"))]
    for module in ("mlp", "norm_linear"):
        monkeypatch.setattr(f"engine.kernels.{module}.is_hopper", lambda _: True)
    cases = [case for name in names for case in launches(monkeypatch, PRODUCTS[name])]
    for name, compiled in zip(names, assert_all_compile(cases, architectures=(90,)), strict=True):
        assert compiled[90].shared <= 113 << 10
        assert name.startswith("mlp") or compiled[90].registers <= 128
