"""Bands whose convolutions are the kernel's: their own whole image to the bit, the definition to a rounding, few launches."""

from collections import Counter

import pytest
import torch
from support.kernels import needs_triton, poison
from support.networks import lively, rrdb
from support.streams import bands, pour, whole
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine.archs.esrgan import RESIDUAL, SLOPE, RRDBNet
from engine.bands import rules
from engine.bands.graph import read_graph
from engine.bands.rules import Convolution3x3
from engine.bands.stream import RowStream, StreamPlan
from engine.device.queue import DeviceQueue
from engine.kernels.dense import conv3x3, dense


def kernel_stream(network, band, width, tail_band=None):
    graph = read_graph(network, 1, 3 + network.noise_channels, use_triton=True)
    return RowStream(StreamPlan(graph, band, width, tail_band))


def convolve(conv, x, out_dtype, slope=1.0, residual=None):
    """One convolution of [1, C, H, W] by the kernel, with what follows it."""
    out = torch.empty(1, *x.shape[2:], conv.out_channels, dtype=out_dtype)
    residual = None if residual is None else residual.permute(0, 2, 3, 1)
    pixels = x.permute(0, 2, 3, 1).contiguous()
    conv3x3(pixels, conv.weight, conv.bias, out, slope=slope, residual=residual, use_triton=True)
    return out.permute(0, 3, 1, 2)


@torch.inference_mode()
def whole_by_kernels(network, image):
    """The whole image of an RRDBNet, layer by layer with the kernels for whole images."""
    half = network.conv_body.weight.dtype
    first = x = convolve(network.conv_first, image[None], torch.float32)
    for group in network.body:
        before, x = x, x.to(half)
        for block in (group.rdb1, group.rdb2, group.rdb3):
            convs = (block.conv1, block.conv2, block.conv3, block.conv4, block.conv5)
            weights, biases = [c.weight for c in convs], [c.bias for c in convs]
            x = dense(x, weights, biases, SLOPE, block.residual, use_triton=True)
        x = torch.add(before, x, alpha=RESIDUAL)
    x = convolve(network.conv_body, x.to(half), half, residual=first)
    for conv, dtype in ((network.conv_up1, half), (network.conv_up2, half)):
        x = convolve(conv, nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"), dtype, SLOPE)
    x = convolve(network.conv_hr, x, torch.float32, SLOPE)
    return convolve(network.conv_last, x, torch.float32)[0]


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_bands_equal_their_own_whole_image(picture, dtype):
    """Bit for bit, in bands of any height; the whole image is computed layer by layer."""
    network, image = rrdb().to_inference(dtype), picture(20, 9)
    expected = whole_by_kernels(network, image)
    for band, tail_band in ((20, None), (8, 4)):
        rows = kernel_stream(network, band, 9, tail_band)
        streamed = pour(rows, image)
        assert streamed.std() > 0.1
        assert torch.equal(streamed, expected), (band, tail_band)


@needs_triton
def test_bands_equal_the_definition_within_half_precision(picture):
    """The kernel rounds less often than PyTorch: its error against float32 is no larger."""
    image, errors = picture(24, 12), {}
    exact = whole(rrdb_of(torch.float32), image)
    network = rrdb_of(torch.float16)
    for name, image_of in {"kernel": lambda: pour(kernel_stream(network, 24, 12), image),
                           "torch": lambda: whole(network, image)}.items():  # fmt: skip
        difference = (image_of() - exact).abs()
        errors[name] = float(difference.mean())
    assert 0 < errors["kernel"] <= 1.2 * errors["torch"]
    assert errors["torch"] < 1e-3 * float(exact.max() - exact.min())


def rrdb_of(dtype):
    torch.manual_seed(0)
    network = lively(RRDBNet(channels=16, blocks=1, growth=8))
    return network if dtype is torch.float32 else network.to_inference(dtype)


@needs_triton
@pytest.mark.slow
def test_no_row_is_read_before_it_is_written(picture):
    """Rows that are saved in vain, in a block with others, are never read."""
    network, image = rrdb().to_inference(torch.float16), picture(12, 6)
    rows = kernel_stream(network, 8, 6, 4)
    expected = pour(rows, image)
    arena = {
        b._rows.untyped_storage().data_ptr(): b._rows
        for s in rows._arenas[0]._streams.values()
        for b in s._buffers
        if not b.plan.slides
    }

    def spoil():
        for view in arena.values():
            poison(torch.empty(0, dtype=torch.uint8).set_(view.untyped_storage()))

    assert torch.equal(pour(rows, image, before_push=spoil), expected)


class Launches(TorchDispatchMode):
    """Counts launches: operations that compute or copy, and the passes that PyTorch adds to a convolution."""

    VIEWS = {
        "view",
        "slice",
        "permute",
        "narrow",
        "select",
        "expand",
        "unsqueeze",
        "as_strided",
        "empty",
        "alias",
        "detach",
    }

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name not in self.VIEWS:
            self.counts[name] += 1
        if name == "conv2d":
            self.counts["bias"] += args[2] is not None
            self.counts["dense input"] += not args[0].is_contiguous(memory_format=torch.channels_last)
        return func(*args, **kwargs or {})


@pytest.fixture
def meta(monkeypatch):
    """Function ``meta(kernels)``: launches of an inner band of RRDBNet 64x23, by name."""
    monkeypatch.setattr("engine.bands.stream.device_queue", DeviceQueue)

    def count(kernels):
        launches = Launches()

        def launch(x, weight, bias, out, **_):
            assert weight.is_contiguous(memory_format=torch.channels_last)  # else every launch would copy it
            assert x.stride(3) == out.stride(3) == 1
            launches.counts["conv3x3"] += 1

        with monkeypatch.context() as patch, torch.device("meta"):
            patch.setattr(rules, "use_kernel", lambda device, forced: kernels)
            patch.setattr(rules, "conv3x3", launch)
            network = RRDBNet().eval().requires_grad_(False).to_inference(torch.float16)
            network = network.to(memory_format=torch.channels_last)
            rows = RowStream(StreamPlan(read_graph(network, 1), 32, 1024, 8), "meta")
            rows.start(0, 10**6)
            pushed = bands(torch.empty(3, 10**6, 1024), 32)
            for _ in range(24):
                for _ in rows.push(next(pushed)):
                    pass
            launches.counts.clear()
            with launches:
                for _ in rows.push(next(pushed)):
                    pass
        return launches.counts, rows.plan

    return count


def test_launches_of_a_band(meta):
    """2,400 or more by PyTorch, 950 by the kernel: no input is copied, and no bias, activation or sum is on its own."""
    (by_torch, torch_plan), (by_kernel, kernel_plan) = meta(False), meta(True)
    assert 2400 < by_torch.total() < 2600
    assert by_kernel.total() < 1000
    assert by_kernel["conv3x3"] == 23 * 3 * 5 + 1 + 3 * 4  # the tail has four bands
    assert by_kernel["add"] == 23  # around a group
    assert by_kernel["leaky_relu"] == by_kernel["cat"] == 0
    assert by_kernel["conv2d"] == 2 + 4  # the first convolution, which runs twice, and the last one are in float32
    assert kernel_plan.nbytes < 1.05 * torch_plan.nbytes


def test_convolutions_take_what_follows():
    """Leaky ReLU, sum and cast; a sum whose factor is the convolution's own place; nothing that another operation reads."""
    network = rrdb().to_mixed(torch.float16)
    graph = read_graph(network, 1, use_triton=True)
    stores = [op.rule.store for op in graph.ops if isinstance(op.rule.store, Convolution3x3)]
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert len(stores) == len(convolutions) + 1  # the first one runs twice
    by_layer = {next(n for n, m in network.named_modules() if m is s.conv): s for s in stores}
    assert by_layer["body.0.rdb1.conv1"].slope == by_layer["conv_up1"].slope == by_layer["conv_hr"].slope == SLOPE
    assert (by_layer["body.0.rdb2.conv5"].scale, by_layer["body.0.rdb2.conv5"].has_residual) == (RESIDUAL, True)
    assert (by_layer["conv_body"].scale, by_layer["conv_body"].has_residual) == (1, True)
    assert not by_layer["conv_last"].has_residual
    assert (
        graph.values[next(op.name for op in graph.ops if op.rule.store is by_layer["conv_hr"])].dtype == torch.float32
    )


def test_float32_and_devices_without_kernels_stay_with_pytorch():
    for network in (rrdb(), rrdb().to_inference(torch.float16)):
        stores = [op.rule.store for op in read_graph(network, 1).ops]
        assert not any(isinstance(store, Convolution3x3) for store in stores)
