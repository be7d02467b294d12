"""The last convolution: float32's accuracy from products of halves."""

import pytest
import torch
from support.kernels import BOTH, assert_all_compile, launches, layouts, needs_triton

from engine.kernels import last_conv as op
from engine.kernels.last_conv import last_conv, last_conv_torch, pack_last


def case(shape, dtype):
    """Features, weights and bias: weights of many magnitudes, so that a lost part of one would show."""
    batch, channels, height, width = shape
    weight = (
        torch.randn(3, channels, 3, 3) * (9 * channels) ** -0.5 * 10 ** torch.empty(3, channels, 3, 3).uniform_(-3, 0)
    )
    x = torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
    return x, weight, torch.randn(3)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float16, 24), (torch.bfloat16, 23)])
def test_parts_sum_to_the_weights(dtype, bits):
    weight = torch.randn(3, 20, 3, 3) * 10 ** torch.empty(3, 20, 3, 3).uniform_(-3, 0)
    factors, scales = pack_last(weight, dtype)
    whole = torch.einsum("tkn,cn->cktn", factors.double(), scales.double()).sum(3).reshape(weight.shape)
    assert float(((whole - weight).abs() / weight.abs()).max()) < 2.0**-bits


@needs_triton
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((1, 64, 17, 70), torch.float16), ((2, 12, 5, 3), torch.float16), ((1, 1, 1, 1), torch.float16),
     ((1, 70, 9, 5), torch.bfloat16)],
)  # fmt: skip
def test_kernel_is_as_exact_as_float32(shape, dtype):
    """Against float64, not worse than PyTorch in float32; and far better than a convolution in half precision."""
    x, weight, bias = case(shape, dtype)
    exact = last_conv_torch(x.double(), weight.double(), bias.double())
    result, twin = (last_conv(x, weight, bias, use_triton=use) for use in (True, False))
    assert (result.shape, result.dtype) == (twin.shape, torch.float32)
    error, twins = (float((t.double() - exact).abs().max()) for t in (result, twin))
    assert error <= 2 * twins + 2e-7
    if x.shape[1] > 1:
        rounded = last_conv_torch(x, weight.to(dtype).float(), bias)
        assert error < 0.01 * float((rounded.double() - exact).abs().max())


@needs_triton
def test_layouts():
    x, weight, bias = case((1, 16, 6, 7), torch.float16)
    packed = pack_last(weight, torch.float16)
    whole = last_conv(x, weight, bias, packed, use_triton=True)
    for _, same in layouts(x):
        assert torch.equal(last_conv(same, weight, bias, use_triton=True), whole)


@BOTH
def test_rows_are_those_of_the_whole(use_triton):
    x, weight, bias = case((1, 16, 9, 7), torch.float16)
    whole = last_conv(x, weight, bias, use_triton=use_triton)
    for top, rows in ((1, 7), (0, 9), (8, 1)):
        assert torch.equal(
            last_conv(x, weight, bias, None, top, rows, use_triton=use_triton), whole[:, :, top : top + rows]
        )


def test_float32_features_take_the_definition():
    x, weight, bias = case((1, 8, 6, 7), torch.float32)
    assert torch.equal(last_conv(x, weight, bias, use_triton=True), last_conv_torch(x, weight, bias))


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_compiles_to_tensor_cores_without_spills(monkeypatch, dtype):
    x, weight, bias = case((1, 64, 64, 64), dtype)
    monkeypatch.setattr(op, "is_interpreting", lambda: False)
    cases = launches(monkeypatch, lambda: last_conv(x, weight, bias))
    (compiled,) = assert_all_compile(cases, (80, 86, 89, 90, 120))
    for architecture, result in compiled.items():
        assert "wgmma.mma_async" in result.ptx if architecture == 90 else "mma.sync" in result.ptx
    assert op.PARTS * op.COLORS <= op.COLUMNS
