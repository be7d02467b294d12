"""RRDBNet 64x23 and SwinIR-M (x4, random weights) in half precision, several ways: a part of benchmarks/gpu_quick.py.

Each way is timed as launched from Python (ms) and as a replayed CUDA graph (graph_ms): at small tiles the launches take longer
than the work. px_per_s (input pixels) and tflops belong to the faster of the two. tflops counts two operations for each
product of the convolutions, linear maps and attention, nothing else. Errors are against fp32 without TF32, in 8-bit levels.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from unittest import mock

import torch
from harness import milliseconds
from torch.utils.flop_counter import FlopCounterMode

from engine.archs import to_mixed
from engine.archs.esrgan import RESIDUAL, SLOPE, DenseBlock, RRDBNet
from engine.archs.swinir import SwinIR, WindowAttention
from engine.device.memory import PeakMemory
from engine.device.queue import device_queue, full_float32
from engine.kernels.dense import dense, dense_by_input, pack_by_input
from engine.kernels.last_conv import last_conv
from engine.kernels.launch import is_interpreting
from engine.kernels.up_conv import up_conv
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
    """SwinIR's window attention by the kernel, or by its twin in PyTorch. A packed network takes all its kernels."""
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


def tail_forward(network, x):
    """RRDBNet's tail by this project's kernels."""
    for conv in (network.conv_up1, network.conv_up2):
        x = up_conv(x, conv.weight, conv.bias, SLOPE, use_triton=USE_TRITON)
    x = torch.nn.functional.leaky_relu(network.conv_hr(x), SLOPE)
    return last_conv(x, network.conv_last.weight, network.conv_last.bias, use_triton=USE_TRITON)


@contextmanager
def cudnn_tries():
    """Let cuDNN measure its algorithms, which the engine never does."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def compiled_blocks(network):
    """The network with one compiled dense block for all its uses: seconds to compile, where all of it takes minutes."""
    # Without a GPU nothing is timed, and the compiler would take minutes.
    forward = torch.compile(DenseBlock.forward, backend="inductor" if torch.cuda.is_available() else "eager")
    return patched_forward(DenseBlock, forward)


def variants(name, network) -> Iterator[tuple[str, torch.nn.Module, AbstractContextManager[object]]]:
    """(name, network, context to run it in) of each way; the first is the reference."""
    yield "eager fp32", network, attention(use_kernel=False)
    mixed = half(network)
    yield "eager fp16 channels-last", mixed, attention(use_kernel=False)
    if name == "esrgan":
        yield "fp16, cuDNN tries its algorithms", mixed, cudnn_tries()
        yield "fp16, dense block compiled", mixed, compiled_blocks(mixed)
        yield "fp16, tail by up_conv and last_conv", mixed, mock.patch.object(RRDBNet, "tail", tail_forward)
        yield "fp16, dense", mixed, patched_forward(DenseBlock, dense_forward)
        yield "fp16, dense by input", mixed, patched_forward(DenseBlock, by_input_forward)
        yield "fp16, dense by input, fp16 sums", mixed, patched_forward(DenseBlock, half_sums_forward)
    else:
        yield "fp16, window attention", mixed, attention(use_kernel=True)
        packed = to_mixed(copy.deepcopy(network), torch.float16, kernels=True)
        yield "fp16, packed", packed.to(memory_format=torch.channels_last), attention(use_kernel=True)


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


def rows(name, network, tile, device, repeats=10):
    """Yield a row for every way; one that fails is a row with its error and does not stop the others."""
    x = torch.rand(1, 3, tile, tile, device=device).contiguous(memory_format=torch.channels_last)
    flops, reference = flops_per_pixel(network), None
    for variant, candidate, context in variants(name, network):
        case = {"network": name, "tile": tile, "variant": variant}
        try:
            with full_float32(), torch.inference_mode():
                output, row = measure(candidate, context, x, reference, repeats)
        except Exception as error:
            yield {**case, "failed": f"{type(error).__name__}: {str(error).strip()[:300]}"}
            if reference is None:
                return
            continue
        reference = output if reference is None else reference
        best = min(ms for ms in (row["ms"], row["graph_ms"]) if ms == ms)  # one of them may be NaN
        yield {**case, **row, "px_per_s": tile**2 / best * 1000, "tflops": flops * tile**2 / best / 1e9}


def network_of(name, device, tiny=False):
    """RRDBNet 64x23 or SwinIR-M with random weights; ``tiny``: small enough for an interpreter."""
    torch.manual_seed(0)
    small = {
        "esrgan": {"channels": 16, "blocks": 1, "growth": 16},
        "swinir": {"dim": 32, "depths": (2,), "heads": (2,)},
    }
    network_class = {"esrgan": RRDBNet, "swinir": SwinIR}[name]
    return lively(network_class(**(small[name] if tiny else {})).to(device))
