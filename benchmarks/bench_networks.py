"""Networks on a GPU: RRDBNet 64x23 and SwinIR-M (x4, random weights), plain, compiled, and with this project's kernels.

    python benchmarks/bench_networks.py [--networks esrgan swinir] [--tiles 256 512] [--only WORD] [--repeats 10]

Each is timed as launched from Python (ms) and as a replayed CUDA graph (graph_ms): at small tiles the launches take longer
than the work. px_per_s (input pixels) and tflops belong to the faster of the two. tflops counts two operations for each
product of the convolutions, linear maps and attention, nothing else. Errors are against fp32 without TF32, in 8-bit levels.
cuDNN may choose its fastest algorithms. --only selects the variants whose name contains the word. Appends to
results/networks.csv. Without CUDA nothing is measured.
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
from engine.device.choose import choose_device
from engine.device.memory import PeakMemory
from engine.device.queue import device_queue
from engine.kernels.dense import dense, dense_by_input, pack_by_input
from engine.kernels.launch import is_interpreting
from engine.kernels.window_attention import window_attention

USE_TRITON = True if torch.cuda.is_available() or is_interpreting() else None
"""Force the kernels wherever they can run at all."""


@torch.no_grad()
def lively(network):
    """Scale random weights so that every layer matters and the output varies around a half: errors then mean something."""
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
def patched_forward(module_class, forward):
    """Replace the forward of every module of a class."""
    original, module_class.forward = module_class.forward, forward
    try:
        yield
    finally:
        module_class.forward = original


def weights_of(block):
    convs = [block.conv1, block.conv2, block.conv3, block.conv4, block.conv5]
    return [conv.weight for conv in convs], [conv.bias for conv in convs]


def dense_forward(block, x):
    return dense(x, *weights_of(block), SLOPE, RESIDUAL, use_triton=USE_TRITON)


def by_input_forward(block, x, sums_dtype=torch.float32):
    options = {"packed": block.packed, "sums_dtype": sums_dtype, "use_triton": USE_TRITON}
    return dense_by_input(x, *weights_of(block), SLOPE, RESIDUAL, **options)


def half_sums_forward(block, x):
    return by_input_forward(block, x, torch.float16)


def attention(use_kernel):
    """SwinIR's window attention by the kernel, or by its twin in PyTorch."""
    return mock.patch(
        "engine.archs.swinir.window_attention",
        partial(window_attention, use_triton=USE_TRITON if use_kernel else False),
    )


def pack(network):
    """Pack the weights of each dense block for ``dense_by_input``."""
    for module in network.modules():
        if isinstance(module, DenseBlock):
            module.packed = pack_by_input(weights_of(module)[0])
    return network


def half(network):
    return pack(copy.deepcopy(network).to_mixed(torch.float16).to(memory_format=torch.channels_last))


def variants(name, network):
    """(name, network, context to run it in) of each variant; the first is the reference."""
    yield "eager fp32", network, attention(use_kernel=False)
    mixed = half(network)
    yield "eager fp16 channels-last", mixed, attention(use_kernel=False)
    # Without a GPU nothing is timed, and the compiler would take minutes.
    compiled = partial(torch.compile, backend="inductor" if torch.cuda.is_available() else "eager")
    yield "compiled fp16", compiled(mixed), attention(use_kernel=False)
    if name == "esrgan":
        yield "fp16, dense", mixed, patched_forward(DenseBlock, dense_forward)
        yield "fp16, dense by input, fp32 sums", mixed, patched_forward(DenseBlock, by_input_forward)
        yield "fp16, dense by input, fp16 sums", mixed, patched_forward(DenseBlock, half_sums_forward)
    else:
        yield "fp16, window attention", mixed, attention(use_kernel=True)
        torch.compiler.reset()  # or the variant compiled without the kernel would be taken
        yield "compiled fp16, window attention", compiled(mixed), attention(use_kernel=True)


def flops_per_pixel(network):
    with FlopCounterMode(display=False) as counter:
        network(torch.rand(1, 3, 64, 64, device=network.conv_last.weight.device))
    return counter.get_total_flops() / 64**2


def replayed(network, x, repeats):
    """Milliseconds of the network as a CUDA graph, without the host's time for launches; NaN if it cannot be captured."""
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
    """(float32 output on the host, row). The peak is the increase of the process's device memory, without the graph."""
    with context:
        output = network(x).float().cpu()  # compiles and tunes
        with PeakMemory(x.device) as peak:
            row = {"ms": milliseconds(x.device, partial(network, x), repeats)}
        row["graph_ms"] = replayed(network, x, repeats)
    error = (output - (output if reference is None else reference)).abs() * 255
    increase = (peak.device - peak.device_start) / 2**30
    return output, {**row, "max_error": float(error.max()), "mean_error": float(error.mean()), "peak_gib": increase}


def rows(name, network, tile, device, only="", repeats=10):
    """Yield a row for every variant; one that fails is printed and does not stop the others."""
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
    """Turn off TF32, and let cuDNN try its algorithms."""
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = flags


def network_of(name, device, tiny=False):
    """RRDBNet 64x23 or SwinIR-M with random weights; ``tiny``: small enough for an interpreter."""
    torch.manual_seed(0)
    small = {
        "esrgan": {"channels": 16, "blocks": 1, "growth": 16},
        "swinir": {"dim": 32, "depths": (2,), "heads": (2,)},
    }
    network_class = {"esrgan": RRDBNet, "swinir": SwinIR}[name]
    return lively(network_class(**(small[name] if tiny else {})).to(device))


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
    device = choose_device("cuda")
    for name in arguments.networks:
        network = network_of(name, device)
        for tile in arguments.tiles:
            torch.compiler.reset()
            with full_precision(), torch.inference_mode():
                for row in rows(name, network, tile, device, arguments.only, arguments.repeats):
                    add_row("networks", row)


if __name__ == "__main__":
    main()
