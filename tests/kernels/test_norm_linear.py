"""LayerNorm with a linear map: the definition is PyTorch's two modules, the kernel equals the definition."""

import pytest
import torch
from support.kernels import assert_close_to_twin, launches, needs_triton
from torch import nn
from torch.nn import functional as F

from engine.kernels.norm_linear import fold_norm, norm_linear, norm_linear_torch


def inputs(pixels, channels, width, outputs, dtype):
    """(x, channels, weight, bias); channels past ``channels`` are zero."""
    x, weight = torch.randn(pixels, channels) * 2 + 1, torch.randn(outputs, channels) * channels**-0.5
    x, weight = (F.pad(tensor, (0, width - channels)) for tensor in (x, weight))
    return x, channels, weight.to(dtype), torch.randn(outputs).to(dtype)


def test_weights_of_the_norm_are_folded():
    norm, linear = nn.LayerNorm(30).double(), nn.Linear(30, 20).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 5, 7, 30).double() + 3
    weight, bias = fold_norm(norm.weight, norm.bias, linear.weight, linear.bias)
    result = norm_linear(F.pad(x, (0, 2)), 30, F.pad(weight, (0, 2)), bias)
    torch.testing.assert_close(result, linear(norm(x)), atol=1e-12, rtol=0)


CASES = [(200, 180, 192, 576), (128, 60, 64, 32), (131, 16, 16, 48), (150, 90, 96, 144)]
"""Pixels, channels, padded channels, outputs."""


@needs_triton
@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, torch.float16) for case in CASES), (CASES[1], torch.bfloat16), (CASES[1], torch.float32)],
    ids=str,
)
def test_kernel_is_the_definition(case, dtype):
    x, channels, weight, bias = inputs(*case, dtype)
    exact = norm_linear_torch(x.double(), channels, weight.double(), bias.double())
    twin = norm_linear_torch(x, channels, weight, bias)
    result = norm_linear(x, channels, weight, bias, use_triton=True)
    # The interpreter cuts bfloat16 off where a GPU rounds.
    assert_close_to_twin(result, twin, exact=exact, factor=4.0 if dtype == torch.bfloat16 else 2.0, atol=2e-6)


@needs_triton
def test_any_number_of_dimensions():
    x, *others = inputs(256, 30, 32, 96, torch.float16)
    flat = norm_linear(x, *others, use_triton=True)
    assert torch.equal(norm_linear(x.view(1, 8, 32, 32), *others, use_triton=True), flat.view(1, 8, 32, 96))


@needs_triton
def test_shapes_that_do_not_fit_take_the_definition(monkeypatch):
    for shape in ((127, 64, 64, 64), (128, 72, 72, 64), (128, 64, 64, 40)):
        arguments = inputs(*shape, torch.float16)
        assert not launches(monkeypatch, lambda arguments=arguments: norm_linear(*arguments))
        with pytest.raises(ValueError, match=f"{shape[0]} pixels, {shape[2]} -> {shape[3]}"):
            norm_linear(*arguments, use_triton=True)
    half, single = (inputs(128, 64, 64, 64, dtype) for dtype in (torch.float16, torch.float32))
    assert launches(monkeypatch, lambda: norm_linear(*half))
    assert not launches(monkeypatch, lambda: norm_linear(*single))
