"""Window attention: the twin is SwinIR's own, the kernel equals the twin on every shape and layout."""

from functools import partial

import pytest
import torch
from support.kernels import BOTH, assert_close_to_twin, needs_triton, poisoned

from engine.archs.swinir import WindowAttention
from engine.kernels import window_attention as op
from engine.kernels.window_attention import window_attention, window_attention_torch

# batch, height, width, window, heads, channels of a head, shift
SHAPES = [
    (1, 16, 24, 8, 2, 30, 4),  # SwinIR-M's window and head; six windows are a whole program and a part of one
    (1, 16, 24, 8, 6, 30, 0),
    (2, 8, 16, 8, 2, 30, 4),  # one row of windows, which is the first and the last
    (1, 8, 8, 8, 1, 30, 4),
    (3, 12, 8, 4, 3, 16, 2),  # 16 pixels a window, the fewest that a matrix product takes
    (1, 14, 21, 7, 2, 33, 3),  # 49 pixels: neither side a power of two
    (1, 6, 10, 2, 1, 5, 1),
    (1, 15, 9, 3, 2, 64, 1),
]
# The interpreter cuts bfloat16 off where a GPU rounds.
FACTORS = {torch.float32: 3.0, torch.float16: 2.0, torch.bfloat16: 4.0}


def inputs(batch, height, width, window, heads, d, dtype=torch.float32):
    """qkv and bias, lively enough that a wrong neighbour shows."""
    return torch.randn(batch, height, width, 3 * heads * d).to(dtype), torch.randn(heads, window**2, window**2)


@needs_triton
@pytest.mark.parametrize("shift", [0, 4])
def test_swinirs_layer_with_the_kernel(monkeypatch, shift):
    """The layer as a GPU runs it; tests/archs compares the twin with attention over all pixels."""
    layer = WindowAttention(dim=60, heads=2, window=8, shift=shift).requires_grad_(False)
    torch.nn.init.normal_(layer.relative_position_bias_table)
    x = torch.randn(2, 16, 24, 60)
    kernel = partial(window_attention, use_triton=True)
    for seams in (None, (), (0,), (1, 0)):
        plain = layer.attend(x, seams)
        with monkeypatch.context() as patch:
            patch.setattr("engine.archs.swinir.window_attention", kernel)
            assert_close_to_twin(layer.attend(x, seams), plain, atol=2e-6)


def test_training_takes_the_twin(monkeypatch):
    """The kernel has no derivative."""
    choices = []
    monkeypatch.setattr(op, "use_kernel", lambda device, use_triton: choices.append(use_triton))
    qkv, bias = inputs(1, 8, 8, 8, 1, 6)
    window_attention(qkv.requires_grad_(), bias, 8).sum().backward()
    assert qkv.grad is not None
    with torch.no_grad():
        window_attention(qkv, bias, 8)
    assert choices == [False, None]


@needs_triton
@pytest.mark.parametrize("dtype", FACTORS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_is_the_twin(shape, dtype):
    *sizes, shift = shape
    window = shape[3]
    qkv, bias = inputs(*sizes, dtype)
    twin = window_attention_torch(qkv, bias, window, shift)
    exact = window_attention_torch(qkv.double(), bias.double(), window, shift)
    result = window_attention(qkv, bias, window, shift, use_triton=True)
    assert_close_to_twin(result, twin, exact=exact, factor=FACTORS[dtype])


@needs_triton
def test_bands():
    """Rows that are on the grid already, with both borders of the image in none, one or two rows of windows."""
    qkv, bias = inputs(2, 24, 16, 8, 2, 6)
    for seams in ((), (0,), (1, 2), (2, 0)):
        twin = window_attention_torch(qkv, bias, 8, 4, seams=seams)
        result = window_attention(qkv, bias, 8, 4, seams=seams, use_triton=True)
        assert_close_to_twin(result, twin, atol=2e-6)
    with pytest.raises(ValueError, match="3 seams"):
        window_attention(qkv, bias, 8, 4, seams=(0, 1, 2), use_triton=True)


@needs_triton
@pytest.mark.parametrize("shift", [0, 4])
def test_layouts(shift):
    """Planes cost a copy; a window of a larger buffer is read in place."""
    qkv, bias = inputs(2, 16, 8, 8, 2, 6)
    larger = poisoned((2, 19, 13, 40))
    window = larger[:, 1:17, 2:10, 3:39].copy_(qkv)
    planes = qkv.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    whole = window_attention(qkv, bias, 8, shift, use_triton=True)
    for same in (window, planes):
        assert not same.is_contiguous()
        assert torch.equal(window_attention(same, bias, 8, shift, use_triton=True), whole)
    strided = bias.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(window_attention(qkv, strided, 8, shift, use_triton=True), whole)


@BOTH
def test_padded_heads(use_triton):
    """Heads of 30 may be padded to 32 in the weights, for aligned loads, with the scale of 30."""
    qkv, bias = inputs(1, 8, 16, 8, 2, 30)
    padded = torch.nn.functional.pad(qkv.unflatten(-1, (6, 30)), (0, 2)).flatten(-2)
    result = window_attention(padded, bias, 8, 4, 30**-0.5, use_triton=use_triton).unflatten(-1, (2, 32))
    assert (result[..., 30:] == 0).all()
    expected = window_attention_torch(qkv, bias, 8, 4).unflatten(-1, (2, 30))
    torch.testing.assert_close(result[..., :30], expected, atol=2e-6, rtol=0.0)


@needs_triton
def test_large_logits_do_not_overflow():
    qkv, bias = inputs(1, 8, 8, 8, 1, 30, torch.float16)
    twin = window_attention_torch(qkv * 30, bias, 8, 4)
    assert torch.isfinite(twin).all()
    result = window_attention(qkv * 30, bias, 8, 4, use_triton=True)
    torch.testing.assert_close(result, twin, atol=0.2, rtol=0.0)


def test_refusals():
    for shape, window, shift, message in [
        ((1, 12, 8, 6), 8, 4, "12 x 8 pixels"),
        ((1, 8, 20, 6), 8, 4, "8 x 20 pixels"),
        ((1, 8, 8, 8), 8, 4, "8 channels"),
        ((1, 8, 8, 6), 8, 8, "shift of 8"),
        ((1, 8, 8, 6), 4, 0, "no window of 4"),
    ]:
        for function in (window_attention, window_attention_torch):
            with pytest.raises(ValueError, match=message):
                function(torch.zeros(shape), torch.zeros(2, 64, 64), window, shift)


def test_without_a_gpu_it_is_the_twin():
    qkv, bias = inputs(1, 16, 16, 8, 2, 6)
    for shift in (0, 4):
        assert torch.equal(window_attention(qkv, bias, 8, shift), window_attention_torch(qkv, bias, 8, shift))
