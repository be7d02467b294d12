"""Every kernel against its twin: equal values, and the share of the memory's own speed.

    python benchmarks/bench_kernels.py [--only WORD]

Question: how much faster is one pass, and how far is it from a plain copy? Bytes are the least that must move: every
input once, every output once. The ceilings, a copy of 1 GiB and a matrix product, are measured in the same run. Appends to
results/kernels.csv. Without CUDA nothing is timed or written; with TRITON_INTERPRET=1 small cases then run in Triton's
interpreter.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from harness import add_row, milliseconds

from engine.device.choose import choose_device
from engine.geometry import Box
from engine.kernels.blend import blend, blend_torch
from engine.kernels.dense import dense, dense_torch
from engine.kernels.gather import Noise, gather, gather_torch
from engine.kernels.launch import is_interpreting
from engine.kernels.trim import trim, trim_torch
from engine.kernels.window_attention import window_attention, window_attention_torch


@dataclass
class Case:
    """One call of a kernel and of its twin."""

    name: str
    """Dtypes, layout and size."""

    run: Callable[[bool], list[torch.Tensor | None]]
    """Run the kernel (True) or its twin (False); returns tensors, or None, to compare."""

    bytes_moved: float
    """Bytes of all inputs and outputs."""

    atol: float = 0.0
    """Largest difference of floats; integers must be equal."""

    operations: float = 0.0
    """Floating-point operations; 0 where memory is the limit."""


def pair(kernel, twin, *arguments, **options):
    """``Case.run`` of a kernel and its definition, which take the same arguments."""

    def run(use_triton):
        result = kernel(*arguments, **options, use_triton=True) if use_triton else twin(*arguments, **options)
        return list(result) if isinstance(result, tuple) else [result]

    return run


def short(*words):
    return " ".join(str(word).removeprefix("torch.") for word in words)


def gather_cases(device, side):
    frame = Box(0, 0, side, side)
    for source, target, sigma in (
        (torch.uint8, torch.float16, 0.1),
        (torch.uint8, torch.float16, 0.0),
        (torch.float32, torch.float32, 0.1),
    ):
        values = torch.rand(3, side, side, device=device)
        block = (values * 255).to(source) if source == torch.uint8 else values
        noise = Noise(sigma, 1, 65_536) if sigma else None
        run = pair(gather, gather_torch, block, frame, frame, frame.shape, noise, dtype=target)
        atol = (4e-7 if target == torch.float32 else 2**-10) if sigma else 0.0
        bytes_moved = 3 * frame.area * (source.itemsize + target.itemsize)
        yield Case(short(source, "->", target, "sigma", sigma, f"3x{side}x{side}"), run, bytes_moved, atol)


def trim_cases(device, side):
    crop = Box(64, 64, side + 64, side + 64)
    for source, layout, target, halve in (
        (torch.float16, torch.channels_last, torch.uint8, True),
        (torch.float16, torch.contiguous_format, torch.uint8, True),
        (torch.float32, torch.channels_last, torch.uint8, True),
        (torch.float32, torch.channels_last, torch.float32, False),
    ):
        output = (torch.rand(1, 3, side + 128, side + 128, device=device) * 1.4 - 0.2).to(source)
        output = output.contiguous(memory_format=layout)
        run = pair(trim, trim_torch, output, crop, target, halve=halve, dither=halve)
        bytes_moved = 3 * crop.area * (source.itemsize + target.itemsize * (1.25 if halve else 1.0))
        kind = "planes" if layout == torch.contiguous_format else "channels-last"
        yield Case(
            short(source, kind, "->", target, "and half" if halve else "alone", f"3x{side}x{side}"), run, bytes_moved
        )


def blend_cases(device, side):
    for axis, target in (("x", torch.uint8), ("y", torch.float32)):
        shape = (3, side, 64) if axis == "x" else (3, 64, side)
        first, second = torch.rand(shape, device=device), torch.rand(shape, device=device)
        run = pair(blend, blend_torch, first, second, axis, "cosine", target)
        bytes_moved = first.numel() * (8 + target.itemsize)
        yield Case(short("float32 ->", target, "along", axis, "x".join(map(str, shape))), run, bytes_moved)


def attention_cases(device, side):
    """SwinIR-M: 6 heads of 30 channels, windows of 8 x 8."""
    qkv = torch.randn(1, side, side, 540, device=device).half()
    bias = torch.randn(6, 64, 64, device=device)
    for shift in (0, 4):
        run = pair(window_attention, window_attention_torch, qkv, bias, 8, shift)
        operations = 2 * 2 * 64 * 180 * side**2
        yield Case(f"float16 {side}x{side} shift {shift}", run, 8 * 180 * side**2, atol=1e-2, operations=operations)


def dense_cases(device, side):
    """RRDBNet 64x23: 64 channels, and four convolutions that add 32 each."""
    x = torch.randn(1, 64, side, side, device=device).half().contiguous(memory_format=torch.channels_last)
    inputs, outputs = (64, 96, 128, 160, 192), (32, 32, 32, 32, 64)
    weights = [
        (torch.randn(m, n, 3, 3, device=device) / (3 * n**0.5)).half().contiguous(memory_format=torch.channels_last)
        for n, m in zip(inputs, outputs, strict=True)
    ]
    biases = [torch.randn(m, device=device).half() for m in outputs]
    operations = 2 * 9 * side**2 * sum(n * m for n, m in zip(inputs, outputs, strict=True))
    run = pair(dense, dense_torch, x, weights, biases)
    yield Case(f"float16 {side}x{side}", run, 4 * 64 * side**2, atol=2e-2, operations=operations)


CASES = {
    "gather": (gather_cases, 2048),
    "trim": (trim_cases, 4096),
    "blend": (blend_cases, 4096),
    "window_attention": (attention_cases, 512),
    "dense": (dense_cases, 512),
}
"""Kernel -> (generator of its cases from (device, side), side on a GPU)."""


def largest_error(case):
    """Largest difference from the twin. Raises AssertionError above ``case.atol``; for integers, above 0."""
    worst = 0.0
    for ours, theirs in zip(case.run(True), case.run(False), strict=True):
        if ours is None or theirs is None:
            assert ours is theirs
            continue
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        difference = float((ours.double() - theirs.double()).abs().max())
        limit = case.atol if ours.is_floating_point() else 0.0
        assert difference <= limit, f"{case.name}: {difference} is more than {limit}"
        worst = max(worst, difference)
    return worst


def check_addresses(device):
    """Assert that addresses have 64 bits: more than 2^31 elements. Only the last rows are compared with the twin."""
    output = torch.zeros(1, 3, 32_768, 24_576, dtype=torch.float16, device=device)
    output[:, :, -64:] = torch.rand(1, 3, 64, 24_576, device=device)
    whole = trim(output, Box(0, 0, *output.shape[2:]), torch.uint8, use_triton=True).pixels
    part = trim_torch(output[:, :, -64:], Box(0, 0, 64, 24_576), torch.uint8).pixels
    assert torch.equal(whole[:, -64:], part)
    assert not whole[:, :-64].any()


def copy_speed(device, size=1 << 30):
    """GB/s, read plus written, of a copy of ``size`` bytes."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / milliseconds(device, lambda: target.copy_(source), 20) / 1e6


def product_speed(device, side=8192, dtype=torch.float16):
    """TFLOP/s of the product of two square matrices."""
    first, second = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / milliseconds(device, lambda: first @ second, 20) / 1e9


def measure(name, case, device, copy, product, repeats=20):
    """A row: time of a kernel and of its twin, shares of the ceilings ``copy`` (GB/s) and ``product`` (TFLOP/s)."""
    error = largest_error(case)
    kernel, twin = (milliseconds(device, partial(case.run, use_triton), repeats) for use_triton in (True, False))
    speed = case.bytes_moved / kernel / 1e6
    row = {
        "kernel": name,
        "case": case.name,
        "mbytes": f"{case.bytes_moved / 1e6:.1f}",
        "ms": f"{kernel:.4f}",
        "gb_s": f"{speed:.0f}",
        "of_copy": f"{speed / copy:.2f}",
        "tflop_s": "",
        "of_product": "",
        "twin_ms": f"{twin:.4f}",
        "max_error": f"{error:.1e}",
    }
    if case.operations:
        speed = case.operations / kernel / 1e9
        row |= {"tflop_s": f"{speed:.0f}", "of_product": f"{speed / product:.2f}"}
    return row


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="measure only kernels whose name contains this word")
    chosen = {name: entry for name, entry in CASES.items() if parser.parse_args().only in name}
    torch.manual_seed(0)
    if not torch.cuda.is_available():
        small = [case for cases, _ in chosen.values() for case in cases("cpu", 48)] if is_interpreting() else []
        errors = "".join(f"; {case.name}: largest error {largest_error(case):.1e}" for case in small)
        print(f"no CUDA device: nothing is timed{errors}")
        return
    device = choose_device("cuda")
    copy, product = copy_speed(device), product_speed(device)
    print(f"{torch.cuda.get_device_name()}: copy {copy:.0f} GB/s, matrix product {product:.0f} TFLOP/s")
    if "trim" in chosen:
        check_addresses(device)
    for name, (cases, side) in chosen.items():
        for case in cases(device, side):
            row = measure(name, case, device, copy, product)
            add_row("kernels", row)
            print("  ".join(f"{key} {value}" for key, value in row.items() if value), flush=True)


if __name__ == "__main__":
    main()
