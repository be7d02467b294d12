"""Upsampling and its convolution as four phases of the small map."""

import pytest
import torch
from support.kernels import assert_all_compile, assert_close_to_twin, launches, layouts, needs_triton
from torch.nn import functional as F

from engine.kernels import up_conv as op
from engine.kernels.up_conv import PHASES, pack_phases, up_conv, up_conv_torch


def case(shape, outputs, dtype):
    """Features, weight and bias."""
    batch, channels, height, width = shape
    weight = (torch.randn(outputs, channels, 3, 3) * (9 * channels) ** -0.5).to(dtype)
    x = torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
    return x, weight, torch.randn(outputs).to(dtype)


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (8, 9)])
def test_phases_are_the_convolution_of_the_enlarged_map(size):
    """In float64, also at the borders, where the enlarged map is padded with zeros."""
    x, weight, bias = case((2, 6, *size), 4, torch.float64)
    padded, result = F.pad(x, (1, 1, 1, 1)), torch.empty(2, 4, 2 * size[0], 2 * size[1], dtype=torch.float64)
    for (a, b), phase in zip(PHASES, pack_phases(weight), strict=True):
        window = padded[:, :, a : a + size[0] + 1, b : b + size[1] + 1]
        result[:, :, a::2, b::2] = F.conv2d(window, phase.permute(3, 2, 0, 1), bias)
    torch.testing.assert_close(F.leaky_relu(result, 0.2), up_conv_torch(x, weight, bias), atol=1e-12, rtol=0.0)


@needs_triton
@pytest.mark.parametrize(
    ("shape", "outputs", "dtype"),
    [((1, 64, 9, 35), 64, torch.float16), ((2, 12, 5, 3), 20, torch.float16), ((1, 1, 1, 1), 1, torch.float16),
     ((1, 24, 5, 7), 12, torch.bfloat16)],
)  # fmt: skip
def test_kernel_is_the_twins(shape, outputs, dtype):
    """Summed weights are rounded once more than single ones, and fewer products are added."""
    x, weight, bias = case(shape, outputs, dtype)
    exact = up_conv_torch(x.double(), weight.double(), bias.double())
    result, twin = up_conv(x, weight, bias, use_triton=True), up_conv_torch(x, weight, bias)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert_close_to_twin(result.contiguous(), twin.contiguous(), exact=exact, factor=3.0, atol=1e-3)


@needs_triton
def test_layouts():
    x, weight, bias = case((1, 16, 6, 7), 16, torch.float16)
    packed = pack_phases(weight)
    whole = up_conv(x, weight, bias, 0.1, packed, use_triton=True)
    for _, same in layouts(x):
        assert torch.equal(up_conv(same, weight, bias, 0.1, use_triton=True), whole)


def test_float32_takes_the_definition():
    x, weight, bias = case((1, 8, 6, 7), 8, torch.float32)
    assert torch.equal(up_conv(x, weight, bias, use_triton=True), up_conv_torch(x, weight, bias))


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("outputs", [64, 128])
def test_compiles_to_tensor_cores_without_spills(monkeypatch, outputs):
    x, weight, bias = case((1, 64, 64, 64), outputs, torch.float16)
    monkeypatch.setattr(op, "is_interpreting", lambda: False)
    (compiled,) = assert_all_compile(launches(monkeypatch, lambda: up_conv(x, weight, bias)), (80, 86, 89, 90, 120))
    for architecture, result in compiled.items():
        assert "wgmma.mma_async" in result.ptx if architecture == 90 else "mma.sync" in result.ptx
