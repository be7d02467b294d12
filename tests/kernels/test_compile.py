"""Launches compile for sm_80, sm_89 and sm_90 without a GPU: no spills, and wide loads and stores."""

import re

import pytest
import torch
from support.kernels import assert_all_compile, launches, needs_triton

from engine.geometry import Box
from engine.kernels.blend import blend
from engine.kernels.gather import Noise, gather
from engine.kernels.trim import trim


def call_gather(source, target, channels=0):
    frame = Box(0, 0, 32, 512)
    gather(torch.empty(3, 32, 512, dtype=source), frame, frame, (32, 512), Noise(0.1, 1, 2, channels), dtype=target)


def call_trim(source, target, memory_format=torch.contiguous_format):
    output = torch.empty(1, 3, 64, 512, dtype=source).contiguous(memory_format=memory_format)
    trim(output, Box(0, 0, 64, 512), target, dither=True, halve=True)


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
    "trim fp32 -> fp32": (16, 16),
    "blend fp32 -> u8": (16, 8),
    "blend fp16 -> fp32": (16, 16),
}


def widest(ptx, access):
    """Bytes of the widest access to global memory: "ld.global ... .v4.b32" moves 16."""
    accesses = re.findall(rf"{access}\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)", ptx)
    return max(int(lanes or 1) * int(bits) // 8 for lanes, bits in accesses)


def check(monkeypatch, names, **options):
    cases = {name: launches(monkeypatch, CALLS[name]) for name in names}
    assert all(len(case) == 1 for case in cases.values())
    results = assert_all_compile([case[0] for case in cases.values()], **options)
    for name, result in zip(cases, results, strict=True):
        for architecture, compiled in result.items():
            assert compiled.shared <= 48 << 10, (name, architecture)
            # A fused multiply-add would round once where the twin rounds twice; .ftz is the logarithm's own.
            assert not re.search(r"\bfma\.rn\.f32|\bmul\.f32|\badd\.f32", compiled.ptx), (name, architecture)
            for access, width in zip(("ld", "st"), WIDTHS.get(name, ()), strict=False):
                assert widest(compiled.ptx, access) >= width, (name, access, architecture)


@needs_triton
def test_a_launch_of_each_kernel_compiles(monkeypatch):
    check(monkeypatch, ("gather u8 -> fp16", "trim fp16 -> u8", "blend fp32 -> u8"), architectures=(90,))


@needs_triton
@pytest.mark.slow
def test_all_launches_compile(monkeypatch):
    check(monkeypatch, CALLS)
