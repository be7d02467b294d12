"""LayerNorm of padded channels: the definition is PyTorch's, the kernel equals the definition."""

import pytest
import torch
from support.kernels import assert_close_to_twin, launches, needs_triton
from torch.nn import functional as F

from engine.kernels.layer_norm import layer_norm, layer_norm_torch


def padded_inputs(pixels, channels, width, offset=0.0):
    """(x, weight, bias) with zeros past ``channels``."""
    x, weight, bias = torch.randn(pixels, channels) * 3 + offset, torch.randn(channels), torch.randn(channels)
    return [F.pad(tensor, (0, width - channels)) for tensor in (x, weight, bias)]


def test_padding_is_left_out_and_stays_zero():
    x, weight, bias = padded_inputs(7, 30, 32)
    norm = torch.nn.LayerNorm(30).requires_grad_(False)
    norm.weight[:], norm.bias[:] = weight[:30], bias[:30]
    result = layer_norm_torch(x, weight, bias, 30, torch.float32)
    assert torch.equal(result[:, :30], norm(x[:, :30]))
    assert not result[:, 30:].any()


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("pixels", "channels", "width"), [(300, 180, 192), (16, 60, 64), (37, 16, 16), (21, 90, 96)], ids=str
)
def test_kernel_is_the_definition(pixels, channels, width, dtype):
    arguments = (*padded_inputs(pixels, channels, width, offset=50.0), channels, dtype)
    exact = layer_norm_torch(*(tensor.double() for tensor in arguments[:3]), channels, torch.float64)
    result, twin = layer_norm(*arguments, use_triton=True), layer_norm_torch(*arguments)
    # The interpreter cuts bfloat16 off where a GPU rounds.
    assert_close_to_twin(result, twin, exact=exact, factor=3.0 if dtype == torch.bfloat16 else 1.0, atol=2e-6)
    assert not result[:, channels:].any()


@needs_triton
def test_shapes_that_do_not_fit_take_the_definition(monkeypatch):
    for pixels, width in ((15, 64), (64, 72)):
        arguments = (*padded_inputs(pixels, width, width), width, torch.float16)
        assert not launches(monkeypatch, lambda arguments=arguments: layer_norm(*arguments))
        with pytest.raises(ValueError, match=f"{pixels} pixels of {width} channels"):
            layer_norm(*arguments, use_triton=True)
