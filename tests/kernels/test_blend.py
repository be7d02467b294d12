"""Blend: weights that add up, corners that are products, and no pixel that depends on the order of tiles."""

import pytest
import torch
from support.kernels import assert_close_to_twin, layouts, needs_triton

from engine.kernels.blend import RAMPS, blend, blend_torch, weights
from engine.kernels.trim import MAX_VALUE

CPU = torch.device("cpu")
BOTH = pytest.mark.parametrize("use_triton", [False, pytest.param(True, marks=needs_triton)], ids=["twin", "kernel"])


def strips(height, width, dtype=torch.float32):
    return torch.rand(3, height, width).to(dtype), torch.rand(3, height, width).to(dtype)


def test_the_linear_ramp():
    assert weights(4, "linear", CPU).tolist() == [0.875, 0.625, 0.375, 0.125]


@pytest.mark.parametrize("ramp", RAMPS)
@pytest.mark.parametrize("width", [1, 2, 5, 32])
def test_a_ramp_falls_and_is_symmetric(ramp, width):
    values = weights(width, ramp, CPU)
    assert (values.diff() < 0).all()
    assert 0 < float(values.min()) <= float(values.max()) < 1
    torch.testing.assert_close(values + values.flip(0), torch.ones(width), atol=1.2e-7, rtol=0)


def test_the_cosine_is_flatter_at_the_ends():
    linear, cosine = weights(16, "linear", CPU), weights(16, "cosine", CPU)
    assert (cosine[:7] > linear[:7]).all()
    assert float(cosine[0] - cosine[1]) < float(linear[0] - linear[1])


@BOTH
@pytest.mark.parametrize("ramp", RAMPS)
@pytest.mark.parametrize("axis", ["x", "y"])
def test_equal_tiles_stay_as_they_are(axis, ramp, use_triton):
    (same, _) = strips(9, 13)
    torch.testing.assert_close(blend(same, same, axis, ramp, use_triton=use_triton), same, atol=1.2e-7, rtol=0)


@BOTH
def test_the_weights_are_those_of_the_axis(use_triton):
    ones, zeros = torch.ones(3, 4, 5), torch.zeros(3, 4, 5)
    across = blend(ones, zeros, "x", use_triton=use_triton)
    assert torch.equal(across, weights(5, "linear", CPU).expand(3, 4, 5))
    down = blend(ones, zeros, "y", use_triton=use_triton)
    assert torch.equal(down, weights(4, "linear", CPU)[:, None].expand(3, 4, 5))


@BOTH
@pytest.mark.parametrize("ramp", RAMPS)
def test_a_corner_is_the_product_of_two_ramps(ramp, use_triton):
    tiles = torch.rand(4, 3, 6, 8)  # upper left, upper right, lower left, lower right
    upper = blend(tiles[0], tiles[1], "x", ramp, use_triton=use_triton)
    lower = blend(tiles[2], tiles[3], "x", ramp, use_triton=use_triton)
    corner = blend(upper, lower, "y", ramp, use_triton=use_triton)
    x, y = weights(8, ramp, CPU).double(), weights(6, ramp, CPU).double()[:, None]
    share = [y * x, y * (1 - x), (1 - y) * x, (1 - y) * (1 - x)]
    expected = sum(tile * part for tile, part in zip(tiles.double(), share, strict=True))
    torch.testing.assert_close(corner.double(), expected, atol=3e-7, rtol=0)


@BOTH
@pytest.mark.parametrize("axis", ["x", "y"])
def test_mirrored_tiles_make_the_mirrored_strip(axis, use_triton):
    """Which tile is first is a matter of place only."""
    first, second = strips(10, 7)
    turn = 2 if axis == "x" else 1
    strip = blend(first, second, axis, use_triton=use_triton)
    mirrored = blend(second.flip(turn), first.flip(turn), axis, use_triton=use_triton)
    torch.testing.assert_close(mirrored.flip(turn), strip, atol=1.2e-7, rtol=0)


@needs_triton
@pytest.mark.parametrize("target", MAX_VALUE)
@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("axis", ["x", "y"])
def test_the_kernel_has_the_bits_of_its_twin(axis, source, target):
    first, second = strips(37, 29, source)
    for ramp in RAMPS:
        twin = blend_torch(first, second, axis, ramp, target)
        for (_, a), (_, b) in zip(layouts(first), reversed(list(layouts(second))), strict=True):
            assert_close_to_twin(blend(a, b, axis, ramp, target, use_triton=True), twin)


@needs_triton
@pytest.mark.parametrize("axis", ["x", "y"])
def test_the_kernels_blocks_fit_together(axis, small_blocks):
    first, second = strips(13, 37)
    assert_close_to_twin(blend(first, second, axis, use_triton=True), blend_torch(first, second, axis))


@needs_triton
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 300), (2, 300, 1), (1, 257, 258)])
def test_the_kernel_takes_odd_shapes(shape):
    first, second = torch.rand(shape), torch.rand(shape)
    assert_close_to_twin(blend(first, second, "x", use_triton=True), blend_torch(first, second, "x"))


def test_quantised_strips_are_rounded_and_clamped():
    ends = torch.tensor([-0.5, 1.5, 0.5]).expand(1, 1, 3)
    assert blend_torch(ends, ends, "y", dtype=torch.uint8).tolist() == [[[0, 255, 128]]]


@BOTH
def test_what_is_not_a_strip_is_refused(use_triton):
    first, second = strips(4, 5)
    for arguments, what in [
        ((first, second[:, :3], "x"), "not one strip"),
        ((first, second.half(), "x"), "not one strip"),
        ((first, second, "z"), "use x or y"),
        ((first, second, "x", "cubic"), "use one of linear, cosine"),
        ((first, second, "x", "linear", torch.int8), "cannot write"),
    ]:
        with pytest.raises(ValueError, match=what):
            blend(*arguments, use_triton=use_triton)
