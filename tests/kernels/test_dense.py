"""Dense blocks: the twins are ESRGAN's and PyTorch's, the kernel equals the twin, whole or in bands of rows."""

import re
from collections import Counter
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.kernels import (
    assert_close_to_twin,
    compile_all,
    launches,
    layouts,
    needs_triton,
    on_a_gpu,
    poisoned,
)
from torch.nn import functional as F

from engine.archs.esrgan import RESIDUAL, SLOPE, DenseBlock
from engine.kernels import dense as op
from engine.kernels import tuning
from engine.kernels.dense import block_sizes, conv3x3, conv3x3_torch, dense, dense_by_input, dense_torch, pack_by_input
from engine.kernels.machine_code import signature

# The interpreter cuts bfloat16 off where a GPU rounds.
FACTORS = {torch.float32: 3.0, torch.float16: 2.0, torch.bfloat16: 5.0}
BLOCKS = pytest.mark.parametrize("function", [dense, dense_by_input])


def weights_of(channels, growth, dtype=torch.float32):
    """Five weights and biases that keep the size of the maps, so that no share of a sum is lost in the tolerance."""
    sizes = [(channels if i == 4 else growth, channels + i * growth) for i in range(5)]
    weights = [(torch.randn(n, k, 3, 3) * (2 / (9 * k)) ** 0.5).to(dtype) for n, k in sizes]
    return weights, [torch.randn(n).to(dtype) for n, _ in sizes]


def double(tensors):
    return [tensor.double() for tensor in tensors]


@pytest.mark.parametrize("mixed", [None, torch.bfloat16])
def test_twin_is_esrgans_dense_block(mixed):
    block = DenseBlock(16, 8).requires_grad_(False)
    for conv in block.children():
        conv.weight.mul_(10)
        torch.nn.init.normal_(conv.bias)
    if mixed is not None:
        block.to(mixed)
    x = torch.randn(2, 16, 7, 11)
    weights, biases = zip(*((conv.weight, conv.bias) for conv in block.children()), strict=True)
    assert torch.equal(dense_torch(x, weights, biases, SLOPE, RESIDUAL), block(x))


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(-30, 30), st.integers(1, 60))
def test_rows_are_those_of_the_whole_convolution(top, rows):
    """Beyond the image the input is zero, but the convolution is not: it has the bias and the border's share."""
    x, weight, bias = torch.randn(2, 9, 5, 3), torch.randn(4, 3, 3, 3), torch.randn(4)
    out = poisoned((2, rows, 5, 4))
    conv3x3_torch(x, weight, bias, out, top)
    padded = F.pad(x.permute(0, 3, 1, 2), (0, 0, 40, 90))
    whole = F.conv2d(padded, weight, bias, padding=1).permute(0, 2, 3, 1)
    torch.testing.assert_close(out, whole[:, 40 + top : 40 + top + rows], atol=1e-5, rtol=0.0)


# batch, height, width; inputs; outputs; first row; rows
LARGE = ((1, 17, 33), 64, 32, 0, 17)  # one more than a tile in both directions
TWO_BLOCKS = ((2, 9, 7), 33, 100, -3, 15)  # two blocks of columns
SMALL = ((2, 5, 3), 12, 5, 0, 5)
PIXEL = ((1, 1, 1), 3, 1, 0, 1)
PARTIAL = ((1, 9, 40), 96, 24, 2, 4)


@needs_triton
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((SMALL, dtype) for dtype in FACTORS),
        (PIXEL, torch.float16),
        (PARTIAL, torch.float16),
        (PARTIAL, torch.float32),
        (LARGE, torch.float16),
        pytest.param(LARGE, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(TWO_BLOCKS, torch.bfloat16, marks=pytest.mark.slow),
        (TWO_BLOCKS, torch.float32),
    ],
    ids=str,
)
def test_convolution_is_the_twins(case, dtype):
    """From a prefix of a buffer's channels into others of them, and nowhere else; then with the residual."""
    (batch, height, width), inputs, outputs, top, rows = case
    weight = (torch.randn(outputs, inputs, 3, 3) * (9 * inputs) ** -0.5).to(dtype)
    bias, residual = torch.randn(outputs).to(dtype), torch.randn(batch, rows, width, outputs)
    buffer = poisoned((batch, max(height, rows), width, inputs + outputs + 3), dtype)
    x = buffer[:, :height, :, :inputs].copy_(torch.randn(batch, height, width, inputs))
    out = buffer[:, :rows, :, inputs + 2 : inputs + 2 + outputs]
    conv3x3(x, weight, bias, out, top, slope=0.2, use_triton=True)
    assert torch.isnan(buffer[..., inputs : inputs + 2]).all()
    assert torch.isnan(buffer[..., -1]).all()
    for slope, extra in ((0.2, {}), (1.0, {"residual": residual, "scale": 0.3})):
        to = torch.float32 if extra else dtype
        twin, exact = poisoned(residual.shape, to), poisoned(residual.shape, torch.float64)
        conv3x3_torch(x, weight, bias, twin, top, slope, **extra)
        conv3x3_torch(x.double(), weight.double(), bias.double(), exact, top, slope, **extra)
        if extra:
            out = poisoned(residual.shape, to)
            conv3x3(x, weight, bias, out, top, slope, **extra, use_triton=True)
        result = poisoned(residual.shape, to).copy_(out)
        assert_close_to_twin(result, twin, exact=exact, factor=FACTORS[dtype], atol=2e-7)


@needs_triton
@BLOCKS
@pytest.mark.parametrize(
    ("shape", "growth", "dtype"),
    [
        *(((1, 12, 17, 20), 5, dtype) for dtype in FACTORS),
        pytest.param((2, 64, 5, 9), 32, torch.float16, marks=pytest.mark.slow),
        pytest.param((2, 64, 5, 9), 32, torch.bfloat16, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_blocks_are_the_twins(shape, growth, dtype, function):
    weights, biases = weights_of(shape[1], growth, dtype)
    x = torch.randn(shape)
    exact = dense_torch(x.double(), double(weights), double(biases))
    twin = dense_torch(x, weights, biases)
    result = function(x, weights, biases, use_triton=True)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert_close_to_twin(result.contiguous(), twin, exact=exact, factor=FACTORS[dtype])


@needs_triton
@BLOCKS
def test_layouts(function):
    """Layouts of the image and of the weights; an image in half precision stays in it."""
    weights, biases = weights_of(16, 8, torch.float16)
    x = torch.randn(1, 16, 6, 7).half()
    whole = function(x, weights, biases, 0.1, 0.4, use_triton=True)
    assert whole.dtype == torch.float16
    torch.testing.assert_close(whole.contiguous(), dense_torch(x, weights, biases, 0.1, 0.4), atol=1e-2, rtol=0.0)
    channels_last = [weight.contiguous(memory_format=torch.channels_last) for weight in weights]
    for _, same in layouts(x):
        assert torch.equal(function(same, channels_last, biases, 0.1, 0.4, use_triton=True), whole)


@needs_triton
def test_partial_sums_in_half_precision():
    weights, biases = weights_of(16, 8, torch.float16)
    x = torch.randn(1, 16, 9, 9)
    exact = dense_torch(x.double(), double(weights), double(biases))
    options = {"packed": pack_by_input(weights), "sums_dtype": torch.float16}
    error = dense_by_input(x, weights, biases, **options, use_triton=True) - exact
    twins = dense_torch(x, weights, biases) - exact
    assert 0 < float(error.abs().max()) < 3 * float(twins.abs().max())


@needs_triton
def test_streaming_in_bands():
    """Bands of 4 rows through two convolutions that share a buffer equal the whole, as a band executor needs."""
    (weight, last), biases = ([torch.randn(8, k, 3, 3) * 0.1 for k in (6, 14)], [torch.randn(8) for _ in range(2)])
    x = torch.randn(1, 12, 5, 6)
    buffer, out = poisoned((1, 12, 5, 14)), poisoned((1, 12, 5, 8))
    buffer[..., :6] = x
    for end in (4, 8, 12, 14):
        # The second convolution lags a row behind the first; rows that do not exist yet are not in its view.
        first, second = (range(max(0, end - 4 - lag), min(12, end - lag)) for lag in (0, 1))
        for rows, k, factors, bias, target in (
            (first, 6, weight, biases[0], buffer[..., 6:]),
            (second, 14, last, biases[1], out),
        ):
            if len(rows):
                view = buffer[:, rows.start - 1 if rows.start else 0 : rows.stop + 1, :, :k]
                top = 1 if rows.start else 0
                conv3x3(view, factors, bias, target[:, rows.start : rows.stop], top, slope=0.2, use_triton=True)
    whole = torch.cat([x, poisoned((1, 12, 5, 8))], 3)
    conv3x3_torch(x, weight, biases[0], whole[..., 6:], slope=0.2)
    expected = poisoned((1, 12, 5, 8))
    conv3x3_torch(whole, last, biases[1], expected, slope=0.2)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0.0)


def test_column_blocks_hold_every_channel():
    for inputs in range(1, 260):
        for outputs in range(1, 260):
            sizes = block_sizes(inputs, outputs)
            assert sizes["block_n"] + sizes["block_rest"] >= outputs
            assert all(size == 0 or size.bit_length() > 4 and size & (size - 1) == 0 for size in sizes.values())
    assert block_sizes(64, 192) == {"block_k": 32, "block_n": 128, "block_rest": 64}  # nothing is computed in vain
    assert block_sizes(64, 160) == {"block_k": 32, "block_n": 128, "block_rest": 32}


@needs_triton
def test_trials_of_tiles_are_undone(monkeypatch):
    """Partial sums that accumulate in place, and a residual that is its own result, are as if nothing had been tried."""
    trials = []

    def seconds(call, device):
        call()
        trials.append(device)
        return 1.0

    monkeypatch.setattr(op, "_TILES", ((16, 32, 8, 4, 3), (8, 32, 8, 4, 3)))
    monkeypatch.setattr(op, "is_interpreting", lambda: False)  # only the choice of the tile believes it
    monkeypatch.setattr(tuning, "_stack", lambda *_: 0)
    monkeypatch.setattr(tuning, "_seconds", seconds)
    monkeypatch.setattr(tuning, "_chosen", {})
    weights, biases = weights_of(16, 8)
    x = torch.randn(1, 16, 9, 17)
    result = dense_by_input(x, weights, biases, use_triton=True)
    torch.testing.assert_close(result.contiguous(), dense_torch(x, weights, biases), atol=2e-6, rtol=0.0)
    stream, expected = torch.randn(1, 9, 17, 8), poisoned((1, 9, 17, 8))
    conv3x3_torch(x.permute(0, 2, 3, 1), weights[0], biases[0], expected, residual=stream)
    conv3x3(x.permute(0, 2, 3, 1).contiguous(), weights[0], biases[0], stream, residual=stream, use_triton=True)
    torch.testing.assert_close(stream, expected, atol=2e-6, rtol=0.0)
    assert len(trials) == 2 * (5 + 1)


@needs_triton
@pytest.mark.slow
def test_a_tile_that_spills_is_never_launched(monkeypatch):
    """The widest convolution of ``dense_by_input``, compiled for an RTX 40, where 256 pixels have a stack of kilobytes."""
    safe, spilling = (8, 8, 8, 8, 3), (16, 16, 8, 8, 3)
    stacks, timed, launched = {}, [], []

    def stack(kernel, grid, arguments, options, device):
        (result,) = compile_all([(kernel, signature(kernel, arguments, options))], architectures=(89,))
        return stacks.setdefault(options["block_y"], result[89].stack)

    monkeypatch.setattr(op, "_TILES", (safe, spilling))
    monkeypatch.setattr(tuning, "_stack", stack)
    monkeypatch.setattr(tuning, "_seconds", lambda call, device: timed.append(call) or 1.0)
    monkeypatch.setattr(tuning, "_chosen", {})
    choose = tuning.fastest
    with on_a_gpu(monkeypatch, lambda kernel, grid, *_, **options: launched.append(options["block_y"])):
        monkeypatch.setattr(op, "fastest", choose)
        x, sums = torch.empty(1, 32, 32, 32).half(), torch.empty(1, 32, 32, 160)
        weight, bias = torch.empty(160, 32, 3, 3).half(), torch.empty(32).half()
        op._launch_conv(x, weight, bias, torch.empty(1, 32, 32, 32).half(), sums=sums, accumulate=True)
    assert stacks[8] == 0
    assert stacks[16] > 1000
    assert launched == [8]
    assert not timed  # a single candidate needs no trial


@needs_triton
@pytest.mark.slow
def test_narrow_copies_of_pixels_go_through_the_first_level_cache(monkeypatch):
    """16-byte copies (.cg) bypass it, 8-byte ones (.ca) do not; the weights, which every program reads, stay with 16."""

    def call(inputs, vector):
        monkeypatch.setattr(op, "_TILES", ((8, 16, vector, 4, 3),))
        x, weight = torch.empty(1, 32, 32, 192).half()[..., :inputs], torch.empty(32, inputs, 3, 3).half()
        conv3x3(x, weight, torch.empty(32).half(), torch.empty(1, 32, 32, 32).half())

    sizes = [(inputs, vector) for inputs in (64, 96, 160) for vector in (8, 4)]
    cases = [case for size in sizes for case in launches(monkeypatch, partial(call, *size))]
    for (_, vector), compiled in zip(sizes, compile_all(cases, (89,)), strict=True):
        copies = Counter(re.findall(r"cp\.async\.(c[ag])\.shared\.global[^,]*,[^,]*, (\w+)", compiled[89].ptx))
        assert set(copies) == {("cg", "0x10")} | ({("ca", "0x8")} if vector == 4 else set())
        assert vector == 8 or copies["ca", "0x8"] >= 2 * copies["cg", "0x10"]


@needs_triton
def test_strided_channels_are_refused():
    x, out = torch.zeros(1, 3, 8, 8).permute(0, 2, 3, 1), torch.zeros(1, 8, 8, 4)
    with pytest.raises(ValueError, match="x: channels with a stride of 64"):
        conv3x3(x, torch.zeros(4, 3, 3, 3), torch.zeros(4), out, use_triton=True)


@BLOCKS
def test_without_a_gpu_it_is_the_twin(function):
    weights, biases = weights_of(8, 4)
    x = torch.randn(1, 8, 6, 7)
    assert torch.equal(function(x, weights, biases), dense_torch(x, weights, biases))
