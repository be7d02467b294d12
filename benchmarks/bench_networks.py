"""Networks on a GPU: RRDBNet 64x23 and SwinIR-M (x4, random weights), plain, compiled, and with this project's kernels.

    python benchmarks/bench_networks.py [--networks esrgan swinir] [--tiles 256 512] [--only WORD] [--repeats 10]

Each is timed as launched from Python (ms) and as a replayed CUDA graph (graph_ms): at small tiles the launches take longer
than the work. px_per_s (input pixels) and tflops are of the faster of the two; tflops count two operations for each
product of the convolutions, linear maps and attention, nothing else. Errors are against fp32 without TF32, in 8-bit levels.
cuDNN may choose its fastest algorithms. --only keeps the variants whose name holds the word. Appends to
results/networks.csv. Without CUDA it says so and ends.
"""

from __future__ import annotations

import argparse
import copy
from contextlib import contextmanager
from functools import partial
from unittest import mock

import torch
from harness import add_row, milliseconds
from torch.utils.flop_counter import FlopCounterMode

from engine.archs.esrgan import RESIDUAL, SLOPE, DenseBlock, RRDBNet
from engine.archs.swinir import SwinIR, WindowAttention
from engine.device.memory import PeakMemory
from engine.device.queue import device_queue
from engine.kernels.dense import dense, dense_by_input, pack_by_input
from engine.kernels.launch import is_interpreting
from engine.kernels.window_attention import window_attention

OWN = True if torch.cuda.is_available() or is_interpreting() else None
"""Insist on the kernels wherever they can run at all."""


@torch.no_grad()
def lively(network):
    """Weights under which every layer matters and the output varies around a half: errors then mean something."""
    for module in network.modules():
        if isinstance(module, DenseBlock):
            for conv in module.children():
                conv.weight.mul_(5)  # half of Kaiming's, where training starts at a tenth
        elif isinstance(module, WindowAttention):
            module.qkv.weight.mul_(4)  # logits of about 1
            module.relative_position_bias_table.mul_(25)
    probe = torch.rand(1, 3, 64, 64, device=network.conv_last.weight.device)
    network.conv_last.weight.mul_(0.15 / network(probe).std(dim=(2, 3)).mean())
    network.conv_last.bias.add_(0.5 - network(probe).mean(dim=(0, 2, 3)))
    return network.eval().requires_grad_(False)


@contextmanager
def forwards(kind, forward):
    """Every module of this class answers with ``forward`` instead."""
    original, kind.forward = kind.forward, forward
    try:
        yield
    finally:
        kind.forward = original


def weights_of(block):
    convs = [block.conv1, block.conv2, block.conv3, block.conv4, block.conv5]
    return [conv.weight for conv in convs], [conv.bias for conv in convs]


def dense_forward(block, x):
    return dense(x, *weights_of(block), SLOPE, RESIDUAL, use_triton=OWN)


def by_input_forward(block, x, sums_dtype=torch.float32):
    options = {"packed": block.packed, "sums_dtype": sums_dtype, "use_triton": OWN}
    return dense_by_input(x, *weights_of(block), SLOPE, RESIDUAL, **options)


def half_sums_forward(block, x):
    return by_input_forward(block, x, torch.float16)


def attention(own):
    """SwinIR's windows by our kernel, or by its twin in PyTorch."""
    return mock.patch(
        "engine.archs.swinir.window_attention", partial(window_attention, use_triton=OWN if own else False)
    )


def prepare(network):
    """What a kernel wants ready: the weights of each dense block by input."""
    for module in network.modules():
        if isinstance(module, DenseBlock):
            module.packed = pack_by_input(weights_of(module)[0])
    return network


def half(network):
    return prepare(copy.deepcopy(network).to_mixed(torch.float16).to(memory_format=torch.channels_last))


def variants(name, network):
    """Name, network, context to run it in. The first is the reference."""
    yield "eager fp32", network, attention(own=False)
    mixed = half(network)
    yield "eager fp16 channels-last", mixed, attention(own=False)
    # Without a GPU the compiler itself is of no interest, and takes minutes.
    compiled = partial(torch.compile, backend="inductor" if torch.cuda.is_available() else "eager")
    yield "compiled fp16", compiled(mixed), attention(own=False)
    if name == "esrgan":
        yield "fp16, dense", mixed, forwards(DenseBlock, dense_forward)
        yield "fp16, dense by input, fp32 sums", mixed, forwards(DenseBlock, by_input_forward)
        yield "fp16, dense by input, fp16 sums", mixed, forwards(DenseBlock, half_sums_forward)
    else:
        yield "fp16, window attention", mixed, attention(own=True)
        torch.compiler.reset()  # what was compiled without the kernel must not be taken for it
        yield "compiled fp16, window attention", compiled(mixed), attention(own=True)


def flops_per_pixel(network):
    with FlopCounterMode(display=False) as counter:
        network(torch.rand(1, 3, 64, 64, device=network.conv_last.weight.device))
    return counter.get_total_flops() / 64**2


def replayed(network, x, repeats):
    """The same without the host's time for launches: the network recorded as a CUDA graph. NaN where that fails."""
    queue = device_queue(x.device)
    output = torch.empty_like(network(x))

    def work():
        output.copy_(network(x))

    try:
        queue.warm_up(work)
        time = milliseconds(x.device, queue.capture(work), repeats)
        return time if output.isfinite().all() else float("nan")
    except RuntimeError as error:
        print(f"no CUDA graph: {str(error).splitlines()[0]}", flush=True)
        return float("nan")


def measure(network, context, x, reference, repeats):
    """(output in fp32 on the host, row). The peak is what the process takes more of the device, without the graph."""
    with context:
        output = network(x).float().cpu()  # compiles and tunes
        with PeakMemory(x.device) as peak:
            row = {"ms": milliseconds(x.device, partial(network, x), repeats)}
        row["graph_ms"] = replayed(network, x, repeats)
    error = (output - (output if reference is None else reference)).abs() * 255
    more = (peak.device - peak.device_start) / 2**30
    return output, {**row, "max_error": float(error.max()), "mean_error": float(error.mean()), "peak_gib": more}


def rows(name, network, tile, device, only="", repeats=10):
    """Yields a row for every variant; one that fails is said and does not hide the others."""
    x = torch.rand(1, 3, tile, tile, device=device).contiguous(memory_format=torch.channels_last)
    flops, reference = flops_per_pixel(network), None
    for variant, candidate, context in variants(name, network):
        if only not in variant and reference is not None:
            continue
        try:
            output, row = measure(candidate, context, x, reference, repeats)
        except Exception as error:
            print(f"{name} {tile} {variant}: {type(error).__name__}: {str(error)[:2000]}", flush=True)
            if reference is None:
                return
            continue
        reference = output if reference is None else reference
        best = min(ms for ms in (row["ms"], row["graph_ms"]) if ms == ms)  # one of them may be NaN
        row |= {"px_per_s": tile**2 / best * 1000, "tflops": flops * tile**2 / best / 1e9}
        row = {key: float(f"{value:.4g}") for key, value in row.items()}
        print(f"{name} {tile} {variant}: {row}", flush=True)
        yield {"network": name, "tile": tile, "variant": variant, **row}


@contextmanager
def full_precision():
    """fp32 without TF32; cuDNN may try its algorithms."""
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = flags


def network_of(name, device, tiny=False):
    """RRDBNet 64x23 or SwinIR-M, random; ``tiny``: the same in a size that an interpreter can bear."""
    torch.manual_seed(0)
    small = {
        "esrgan": {"channels": 16, "blocks": 1, "growth": 16},
        "swinir": {"dim": 32, "depths": (2,), "heads": (2,)},
    }
    kind = {"esrgan": RRDBNet, "swinir": SwinIR}[name]
    return lively(kind(**(small[name] if tiny else {})).to(device))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["esrgan", "swinir"], choices=["esrgan", "swinir"])
    parser.add_argument("--tiles", nargs="+", type=int, default=[256, 512])
    parser.add_argument("--only", default="")
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_networks: no CUDA device here; nothing was measured")
        return
    device = torch.device("cuda")
    for name in arguments.networks:
        network = network_of(name, device)
        for tile in arguments.tiles:
            torch.compiler.reset()
            with full_precision(), torch.inference_mode():
                for row in rows(name, network, tile, device, arguments.only, arguments.repeats):
                    add_row("networks", row)


if __name__ == "__main__":
    main()
