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
import statistics
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from harness import add_row
from torch.utils.flop_counter import FlopCounterMode

from engine.archs.esrgan import RESIDUAL, SLOPE, DenseBlock, RRDBNet
from engine.archs.swinir import SwinIR, WindowAttention
from engine.kernels.dense import by_input, dense, dense_by_input
from engine.kernels.window_attention import window_attention


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
    return dense(x, *weights_of(block), SLOPE, RESIDUAL, use_triton=True)


def by_input_forward(block, x, sums_dtype=torch.float32):
    options = {"packed": block.packed, "sums_dtype": sums_dtype, "use_triton": True}
    return dense_by_input(x, *weights_of(block), SLOPE, RESIDUAL, **options)


def half_sums_forward(block, x):
    return by_input_forward(block, x, torch.float16)


def attention_forward(layer, x):
    y = window_attention(layer.qkv(x), layer.matrix, layer.window, layer.shift, use_triton=True)
    return layer.proj(y)


def prepare(network):
    """What the kernels want ready: the bias matrix of each attention, the weights of each dense block by input."""
    for module in network.modules():
        if isinstance(module, WindowAttention):
            module.matrix = module._bias().contiguous()
        elif isinstance(module, DenseBlock):
            module.packed = by_input(weights_of(module)[0])
    return network


def half(network):
    return prepare(copy.deepcopy(network).to_mixed(torch.float16).to(memory_format=torch.channels_last))


def variants(name, network):
    """Name, network, context to run it in. The first is the reference."""
    yield "eager fp32", network, nullcontext()
    mixed = half(network)
    yield "eager fp16 channels-last", mixed, nullcontext()
    yield "compiled fp16", torch.compile(mixed), nullcontext()
    if name == "esrgan":
        yield "fp16, dense", mixed, forwards(DenseBlock, dense_forward)
        yield "fp16, dense by input, fp32 sums", mixed, forwards(DenseBlock, by_input_forward)
        yield "fp16, dense by input, fp16 sums", mixed, forwards(DenseBlock, half_sums_forward)
    else:
        yield "fp16, window attention", mixed, forwards(WindowAttention, attention_forward)
        torch.compiler.reset()  # what was compiled without the kernel must not be taken for it
        yield "compiled fp16, window attention", torch.compile(mixed), forwards(WindowAttention, attention_forward)


def flops_per_pixel(network):
    with FlopCounterMode(display=False) as counter:
        network(torch.rand(1, 3, 64, 64, device=network.conv_last.weight.device))
    return counter.get_total_flops() / 64**2


def milliseconds(call, repeats):
    """Median time of a call, by events on the device."""
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def replayed(network, x, repeats):
    """The same without the host's time for launches: the network recorded as a CUDA graph. NaN where that fails."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            output = network(x)
        time = milliseconds(graph.replay, repeats)
        return time if output.isfinite().all() else float("nan")
    except RuntimeError as error:
        print(f"no CUDA graph: {str(error).splitlines()[0]}", flush=True)
        return float("nan")


def measure(network, context, x, reference, repeats):
    """(output in fp32 on the host, row). The peak is PyTorch's own, weights included, without the graph."""
    with context:
        output = network(x).float().cpu()  # compiles and tunes
        milliseconds(partial(network, x), 2)
        torch.cuda.reset_peak_memory_stats()
        row = {"ms": milliseconds(partial(network, x), repeats)}
        peak = torch.cuda.max_memory_allocated() / 2**30
        row["graph_ms"] = replayed(network, x, repeats)
    error = (output - (output if reference is None else reference)).abs() * 255
    return output, {**row, "max_error": float(error.max()), "mean_error": float(error.mean()), "peak_gib": peak}


def run(name, network, tile, only, repeats):
    x = torch.rand(1, 3, tile, tile, device="cuda").contiguous(memory_format=torch.channels_last)
    flops, reference = flops_per_pixel(network), None
    for variant, candidate, context in variants(name, network):
        if only not in variant and reference is not None:
            continue
        try:
            output, row = measure(candidate, context, x, reference, repeats)
        except Exception as error:  # one variant that fails must not hide the others
            print(f"{name} {tile} {variant}: {type(error).__name__}: {str(error)[:2000]}", flush=True)
            if reference is None:
                return
            continue
        reference = output if reference is None else reference
        best = min(ms for ms in (row["ms"], row["graph_ms"]) if ms == ms)  # one of them may be NaN
        row |= {"px_per_s": tile**2 / best * 1000, "tflops": flops * tile**2 / best / 1e9}
        row = {key: float(f"{value:.4g}") for key, value in row.items()}
        print(f"{name} {tile} {variant}: {row}", flush=True)
        add_row("networks", {"network": name, "tile": tile, "variant": variant, **row})
        torch.cuda.empty_cache()


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
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    for name in arguments.networks:
        torch.manual_seed(0)
        network = lively((RRDBNet() if name == "esrgan" else SwinIR()).to("cuda"))
        for tile in arguments.tiles:
            torch.compiler.reset()
            with torch.inference_mode():
                run(name, network, tile, arguments.only, arguments.repeats)


if __name__ == "__main__":
    main()
