"""Blend: weights that sum to one, corners that are products, and pixels independent of the order of tiles."""

import pytest
import torch
from support.kernels import BOTH, assert_close_to_twin, layouts, needs_triton

from engine.kernels.blend import RAMPS, blend, blend_torch, weights
from engine.kernels.trim import MAX_VALUE

CPU = torch.device("cpu")


def strips(height, width, dtype=torch.float32):
    return torch.rand(3, height, width).to(dtype), torch.rand(3, height, width).to(dtype)


def test_linear_ramp():
    assert weights(4, "linear", CPU).tolist() == [0.875, 0.625, 0.375, 0.125]


def test_ramps_fall_and_are_symmetric():
    for ramp in RAMPS:
        for width in (1, 2, 5, 32):
            values = weights(width, ramp, CPU)
            assert (values.diff() < 0).all()
            assert 0 < float(values.min()) <= float(values.max()) < 1
            torch.testing.assert_close(values + values.flip(0), torch.ones(width), atol=1.2e-7, rtol=0)


def test_cosine_is_flatter_at_the_ends():
    linear, cosine = weights(16, "linear", CPU), weights(16, "cosine", CPU)
    assert (cosine[:7] > linear[:7]).all()
    assert float(cosine[0] - cosine[1]) < float(linear[0] - linear[1])


@BOTH
def test_equal_tiles_are_not_changed(use_triton):
    strip, _ = strips(9, 13)
    for axis in ("x", "y"):
        for ramp in RAMPS:
            result = blend(strip, strip, axis, ramp, use_triton=use_triton)
            torch.testing.assert_close(result, strip, atol=1.2e-7, rtol=0)


@BOTH
def test_weights_follow_the_axis(use_triton):
    ones, zeros = torch.ones(3, 4, 5), torch.zeros(3, 4, 5)
    across = blend(ones, zeros, "x", use_triton=use_triton)
    assert torch.equal(across, weights(5, "linear", CPU).expand(3, 4, 5))
    down = blend(ones, zeros, "y", use_triton=use_triton)
    assert torch.equal(down, weights(4, "linear", CPU)[:, None].expand(3, 4, 5))


@BOTH
def test_corner_is_the_product_of_two_ramps(use_triton):
    tiles = torch.rand(4, 3, 6, 8)  # upper left, upper right, lower left, lower right
    for ramp in RAMPS:
        upper = blend(tiles[0], tiles[1], "x", ramp, use_triton=use_triton)
        lower = blend(tiles[2], tiles[3], "x", ramp, use_triton=use_triton)
        corner = blend(upper, lower, "y", ramp, use_triton=use_triton)
        x, y = weights(8, ramp, CPU).double(), weights(6, ramp, CPU).double()[:, None]
        share = [y * x, y * (1 - x), (1 - y) * x, (1 - y) * (1 - x)]
        expected = sum(tile * part for tile, part in zip(tiles.double(), share, strict=True))
        torch.testing.assert_close(corner.double(), expected, atol=3e-7, rtol=0)


@BOTH
def test_mirrored_tiles_give_the_mirrored_strip(use_triton):
    """Which tile is first is a matter of position only."""
    first, second = strips(10, 7)
    for axis, dimension in (("x", 2), ("y", 1)):
        strip = blend(first, second, axis, use_triton=use_triton)
        mirrored = blend(second.flip(dimension), first.flip(dimension), axis, use_triton=use_triton)
        torch.testing.assert_close(mirrored.flip(dimension), strip, atol=1.2e-7, rtol=0)


@needs_triton
@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_kernel_has_the_bits_of_its_twin(source):
    first, second = strips(37, 29, source)
    for target in MAX_VALUE:
        for axis, ramp in [("x", "linear"), ("x", "cosine"), ("y", "linear"), ("y", "cosine")]:
            twin = blend_torch(first, second, axis, ramp, target)
            for (_, a), (_, b) in zip(layouts(first), reversed(list(layouts(second))), strict=True):
                assert_close_to_twin(blend(a, b, axis, ramp, target, use_triton=True), twin)


@needs_triton
def test_kernels_blocks_fit_together(small_blocks):
    first, second = strips(13, 37)
    for axis in ("x", "y"):
        assert_close_to_twin(blend(first, second, axis, use_triton=True), blend_torch(first, second, axis))


@needs_triton
def test_kernel_takes_odd_shapes():
    for shape in [(1, 1, 1), (3, 1, 300), (2, 300, 1), (1, 257, 258)]:
        first, second = torch.rand(shape), torch.rand(shape)
        assert_close_to_twin(blend(first, second, "x", use_triton=True), blend_torch(first, second, "x"))


def test_quantised_strips_are_rounded_and_clamped():
    ends = torch.tensor([-0.5, 1.5, 0.5]).expand(1, 1, 3)
    assert blend_torch(ends, ends, "y", dtype=torch.uint8).tolist() == [[[0, 255, 128]]]


@BOTH
def test_refusals(use_triton):
    first, second = strips(4, 5)
    for arguments, message in [
        ((first, second[:, :3], "x"), "not one strip"),
        ((first, second.half(), "x"), "not one strip"),
        ((first, second, "z"), "use x or y"),
        ((first, second, "x", "cubic"), "use one of linear, cosine"),
        ((first, second, "x", "linear", torch.int8), "cannot be written"),
    ]:
        with pytest.raises(ValueError, match=message):
            blend(*arguments, use_triton=use_triton)
