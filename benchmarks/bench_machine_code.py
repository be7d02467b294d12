"""Machine code of the kernels with matrix products, for five GPUs, without a GPU.

    python benchmarks/bench_machine_code.py [--only WORD]

Question: how many of the instructions that a multiprocessor issues are matrix products? Kernels are compiled at the shapes of
RRDBNet 64x23 and SwinIR-M in fp16, as a render launches them. The share is that of the innermost loop with the products. An
HGMMA (compute capability 9.0) multiplies four to sixteen times as much as an HMMA. Appends to results/machine_code.csv.
"""

from __future__ import annotations

import argparse
import os
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported: ask for it on a machine without CUDA, to compile

import torch  # noqa: E402
from harness import add_row  # noqa: E402

from engine.kernels import dense, mlp, norm_linear, window_attention  # noqa: E402
from engine.kernels.launch import triton  # noqa: E402
from engine.kernels.machine_code import (  # noqa: E402
    ARCHITECTURES,
    TENSOR_CORE,
    code,
    compile_for,
    resources,
    signature,
    tensor_share,
)

TILE = (8, 16, 8, 4, 3)
"""Tile of the convolutions: 8 x 16 pixels, 4 warps."""


def empty(*shape, dtype=torch.float16):
    return torch.empty(shape, dtype=dtype)


def conv(inputs, outputs):
    buffer = empty(1, 64, 64, 256)
    x, out = buffer[..., :inputs], buffer[..., inputs : inputs + outputs]
    dense.conv3x3(x, empty(outputs, inputs, 3, 3), empty(outputs), out, slope=0.2)


def last_conv():
    stream = empty(1, 64, 64, 64, dtype=torch.float32)
    dense.conv3x3(empty(1, 64, 64, 192), empty(64, 192, 3, 3), empty(64), stream, residual=stream, scale=0.2)


def attention(d):
    bias = empty(6, 64, 64, dtype=torch.float32)
    window_attention.window_attention(empty(1, 64, 64, 18 * d), bias, 8, 4, 30**-0.5)


def stream():
    return empty(64, 64, 192, dtype=torch.float32)


def second_half():
    weights = mlp.MlpWeights(empty(192, 192), empty(192), empty(384, 192), empty(384), empty(192, 384), empty(192))
    mlp.mlp(stream(), empty(64, 64, 192), weights, 180)


CASES = {
    "conv3x3 64 -> 32": lambda: conv(64, 32),
    "conv3x3 160 -> 32": lambda: conv(160, 32),
    "conv3x3 192 -> 64, residual": lambda: last_conv(),
    "window_attention, heads of 30": lambda: attention(30),
    "window_attention, heads of 32": lambda: attention(32),
    "norm_linear 192 -> 576": lambda: norm_linear.norm_linear(stream(), 180, empty(576, 192), empty(576)),
    "mlp 192 -> 384 -> 192": second_half,
}
"""Name -> one launch on a GPU."""


def launched(call, architecture):
    """(kernel, signature) of a launch on a GPU, which is recorded in place of being started."""
    launches = []

    def record(kernel, grid, *arguments, **options):
        launches.append((kernel, signature(kernel, arguments, options)))

    with torch.no_grad(), mock.patch.object(dense, "fastest", return_value=TILE):
        modules = (dense, mlp, norm_linear, window_attention)
        patches = [mock.patch.object(module, "use_kernel", return_value=True) for module in modules]
        patches += [mock.patch.object(module, "launch", record) for module in modules]
        patches += [mock.patch.object(m, "is_hopper", return_value=architecture == 90) for m in (mlp, norm_linear)]
        for patch in patches:
            patch.start()
        try:
            call()
        finally:
            mock.patch.stopall()
    (launch,) = launches
    return launch


def measure(name, architecture):
    compiled = compile_for(*launched(CASES[name], architecture), architecture)
    registers, stack = resources(compiled.asm["cubin"])
    instructions = code(compiled.asm["cubin"])
    return {
        "kernel": name,
        "architecture": f"sm_{architecture}",
        "registers": registers,
        "stack": stack,
        "shared": compiled.metadata.shared,
        "instructions": instructions.all.total(),
        "loop": instructions.loop.total(),
        "tensor_core": sum(instructions.loop[instruction] for instruction in TENSOR_CORE),
        "share": f"{tensor_share(instructions.loop):.3f}",
        "triton": triton.__version__,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="compile only kernels whose name contains this word")
    arguments = parser.parse_args()
    for name in CASES:
        for architecture in ARCHITECTURES if arguments.only in name else ():
            row = measure(name, architecture)
            add_row("machine_code", row)
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
