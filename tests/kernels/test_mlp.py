"""The second half of a Swin layer: the definition is SwinIR's own layer, the kernel equals the definition."""

import pytest
import torch
from support.kernels import assert_close_to_twin, launches, needs_triton
from torch.nn import functional as F

from engine.archs.swinir import SwinLayer
from engine.kernels import mlp as op
from engine.kernels.mlp import MlpWeights, mlp, mlp_torch
from engine.kernels.norm_linear import fold_norm


def inputs(pixels, channels, width, inner, hidden, dtype):
    """(x, y, weights, channels); everything past ``channels`` is zero."""
    extra = width - channels
    x, y = F.pad(torch.randn(pixels, channels) * 2 + 1, (0, extra)), torch.randn(pixels, inner).to(dtype)
    weights = MlpWeights(
        proj=F.pad(torch.randn(channels, inner) * inner**-0.5, (0, 0, 0, extra)),
        proj_bias=F.pad(torch.randn(channels), (0, extra)),
        fc1=F.pad(torch.randn(hidden, channels) * channels**-0.5, (0, extra)),
        fc1_bias=torch.randn(hidden),
        fc2=F.pad(torch.randn(channels, hidden) * hidden**-0.5, (0, 0, 0, extra)),
        fc2_bias=F.pad(torch.randn(channels), (0, extra)),
    )
    return x, y, MlpWeights(*(tensor.to(dtype) for tensor in weights)), channels


def double(x, y, weights, channels):
    return x.double(), y.double(), MlpWeights(*(tensor.double() for tensor in weights)), channels


def test_definition_is_swinirs_layer():
    layer = SwinLayer(12, 2, 4, 2, 20).double().requires_grad_(False)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    x, expected = (x := torch.randn(1, 8, 8, 12).double()), layer(x)
    maps = (*layer.attn.proj.parameters(), *folded(layer.norm2, layer.mlp.fc1), *layer.mlp.fc2.parameters())
    layer.attn.proj = torch.nn.Identity()
    y = layer.attn(layer.norm1(x))
    torch.testing.assert_close(mlp(x, y, MlpWeights(*maps), 12), expected, atol=1e-12, rtol=0)


def folded(norm, linear):
    return fold_norm(norm.weight, norm.bias, linear.weight, linear.bias)


CASES = [(200, 180, 192, 192, 384), (128, 60, 64, 96, 64), (131, 16, 16, 16, 48), (150, 90, 96, 48, 96)]
"""Pixels, channels, padded channels, channels of the attention's output, hidden channels."""


@needs_triton
@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, torch.float16) for case in CASES), (CASES[1], torch.bfloat16), (CASES[1], torch.float32)],
    ids=str,
)
def test_kernel_is_the_definition(case, dtype):
    arguments = inputs(*case, dtype)
    exact, twin = mlp_torch(*double(*arguments)), mlp_torch(*arguments)
    # The interpreter cuts bfloat16 off where a GPU rounds.
    factor = 4.0 if dtype == torch.bfloat16 else 2.0
    assert_close_to_twin(mlp(*arguments, use_triton=True), twin, exact=exact, factor=factor, atol=2e-6)


@needs_triton
def test_the_wider_tile_gives_the_same(monkeypatch):
    arguments = inputs(256, 30, 32, 32, 64, torch.float16)
    narrow = mlp(*arguments, use_triton=True)
    monkeypatch.setattr(op, "is_hopper", lambda _: True)
    torch.testing.assert_close(mlp(*arguments, use_triton=True), narrow, atol=1e-5, rtol=0)


@needs_triton
def test_shapes_that_do_not_fit_take_the_definition(monkeypatch):
    for shape in ((127, 64, 64, 64, 64), (128, 72, 72, 64, 64), (128, 64, 64, 40, 64), (128, 64, 64, 64, 72)):
        arguments = inputs(*shape, torch.float16)
        assert not launches(monkeypatch, lambda arguments=arguments: mlp(*arguments))
        with pytest.raises(ValueError, match=f"{shape[0]} pixels, {shape[2]}"):
            mlp(*arguments, use_triton=True)
    half, single = (inputs(128, 64, 64, 64, 64, dtype) for dtype in (torch.float16, torch.float32))
    assert launches(monkeypatch, lambda: mlp(*half))
    assert not launches(monkeypatch, lambda: mlp(*single))
