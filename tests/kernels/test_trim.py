"""Trim: the crop, its rounding, and counts of NaN and infinity; the kernel equals its twin."""

import itertools

import numpy as np
import pytest
import torch
from support.kernels import BOTH, assert_close_to_twin, layouts, needs_triton, poisoned

from engine.geometry import Box
from engine.io.halving import halve
from engine.kernels.trim import MAX_VALUE, Trimmed, trim, trim_torch

NAN, INF = float("nan"), float("inf")
MEMORY_FORMATS = (torch.contiguous_format, torch.channels_last)


def cut(output, crop, dtype):
    """The pixels, and the number of values that were not finite."""
    trimmed = trim_torch(output, crop, dtype)
    return trimmed.pixels, trimmed.nonfinite_count


def make_output(memory_format=torch.contiguous_format):
    return (torch.rand(1, 3, 12, 10) * 1.4 - 0.2).contiguous(memory_format=memory_format)


def test_cuts_the_crop():
    for memory_format in MEMORY_FORMATS:
        output = make_output(memory_format)
        for crop in (Box(0, 0, 12, 10), Box(3, 2, 9, 10), Box(5, 5, 6, 6)):
            pixels, bad = cut(output, crop, torch.float32)
            assert torch.equal(pixels, output[0, :, crop.y0 : crop.y1, crop.x0 : crop.x1].clamp(0, 1))
            assert bad == 0
            assert pixels.dtype == torch.float32


def test_crop_owns_its_memory():
    """A view would keep the whole tile, halo included, in the cache."""
    for memory_format in MEMORY_FORMATS:
        for dtype in MAX_VALUE:
            pixels, _ = cut(make_output(memory_format), Box(1, 1, 5, 5), dtype)
            assert pixels.is_contiguous()
            assert pixels.untyped_storage().nbytes() == pixels.numel() * pixels.itemsize


def half_levels():
    """Values that are exactly k + 1/2 levels in float32 once multiplied: selected, not assumed."""
    levels = torch.arange(255, dtype=torch.float32) + 0.5
    values = levels / 255.0
    values = values[values * 255.0 == levels]
    assert len(values) > 50
    return values


def test_rounds_half_to_even_as_numpy_does():
    halves = half_levels()
    values = torch.cat([halves, torch.linspace(0, 1, 1000)])
    pixels, _ = cut(values.view(1, 1, 1, -1), Box(0, 0, 1, len(values)), torch.uint8)
    expected = np.rint(values.numpy() * np.float32(255)).astype(np.uint8)
    np.testing.assert_array_equal(pixels.flatten().numpy(), expected)
    assert (pixels.flatten()[: len(halves)] % 2 == 0).all()


@needs_triton
def test_kernel_rounds_half_to_even():
    values = half_levels()
    pixels = trim(values.view(1, 1, 1, -1), Box(0, 0, 1, len(values)), torch.uint8, use_triton=True).pixels
    assert (pixels % 2 == 0).all()


def test_every_level_survives_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    pixels, _ = cut((levels.float() / 255).view(1, 1, 1, 256), Box(0, 0, 1, 256), torch.uint8)
    assert torch.equal(pixels.flatten(), levels)


def test_clamps_to_the_range():
    for value, level in [(-0.0001, 0), (-9.0, 0), (1.0001, 255), (1e30, 255), (1.0, 255)]:
        output = torch.full((1, 3, 2, 2), value)
        assert cut(output, Box(0, 0, 2, 2), torch.uint8)[0].unique().tolist() == [level]
        assert cut(output, Box(0, 0, 2, 2), torch.float32)[0].unique().tolist() == [min(max(value, 0.0), 1.0)]


def test_counts_nonfinite_values_of_the_crop():
    for dtype in MAX_VALUE:
        for values, count in [([NAN], 1), ([INF], 1), ([-INF], 1), ([NAN, INF, -INF, NAN], 4)]:
            output = torch.rand(1, 3, 8, 8)
            output[0, 0, 0, 0] = NAN  # in the halo
            output[0, 1, 3, 2 : 2 + len(values)] = torch.tensor(values)
            assert cut(output, Box(2, 2, 8, 8), dtype)[1] == count


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_counts_by_kind(dtype, use_triton):
    output = torch.rand(1, 3, 40, 300).to(dtype)
    output[0, 0, 0, :5] = NAN  # in the halo
    output[0, 1, 3, 2:5] = NAN
    output[0, 2, 30, 290:292] = torch.tensor([INF, -INF])
    output[0, 0, 20, 20:24] = torch.tensor([65504.0, -65504.0, 65472.0, 65504.0])
    trimmed = trim(output, Box(2, 1, 40, 300), torch.uint8, use_triton=use_triton)
    assert trimmed.nonfinite.tolist() == [3, 2, 3 if dtype == torch.float16 else 0]
    assert trimmed.nonfinite_count == 5
    assert trimmed.half is None
    assert (trimmed.pixels[1, 1, 1:4] == 0).all()


def test_half_precision_output_is_quantised_in_float32():
    for dtype in (torch.float16, torch.bfloat16):
        output = torch.rand(1, 3, 9, 9).to(dtype)
        expected, _ = cut(output.float(), Box(0, 0, 9, 9), torch.uint8)
        assert torch.equal(cut(output, Box(0, 0, 9, 9), torch.uint8)[0], expected)


@BOTH
def test_halved_image_is_the_stores(use_triton):
    for height, width in [(8, 10), (9, 10), (8, 11), (7, 7), (1, 1), (1, 4), (70, 301)]:
        output = torch.rand(1, 3, height, width) * 1.2 - 0.1
        trimmed = trim(output, Box(0, 0, height, width), torch.uint8, halve=True, use_triton=use_triton)
        np.testing.assert_array_equal(trimmed.half.numpy(), halve(trimmed.pixels.numpy()))


@BOTH
def test_halves_of_tiles_are_the_half_of_the_image(use_triton):
    output = torch.rand(1, 3, 21, 30)
    whole = trim_torch(output, Box(0, 0, 21, 30), torch.uint8, dither=True, halve=True)
    for crop in (Box(0, 0, 8, 16), Box(8, 16, 21, 30)):
        options = {"origin": (crop.y0, crop.x0), "dither": True, "halve": True}
        part = trim(output, crop, torch.uint8, **options, use_triton=use_triton)
        assert torch.equal(part.pixels, whole.pixels[(slice(None), *crop.slices)])
        assert torch.equal(part.half, whole.half[(slice(None), *crop.cover(2).slices)])


@BOTH
@pytest.mark.parametrize("dtype", MAX_VALUE, ids=str)
def test_halves_of_rows_that_stream_by_are_the_half_of_the_image(use_triton, dtype):
    """A pair that straddles two crops is completed by the second one, from the last row of the first."""
    output, above, halves = torch.rand(1, 3, 41, 37), None, []
    options = {"dither": True, "halve": True}
    whole = trim_torch(output, Box(0, 0, 41, 37), dtype, **options)
    for top, bottom in itertools.pairwise((0, 1, 2, 5, 5 + 8, 26, 41)):
        crop = Box(top, 0, bottom, 37)
        part = trim(output, crop, dtype, origin=(top, 0), above=above, **options, use_triton=use_triton)
        assert torch.equal(part.pixels, whole.pixels[:, top:bottom])
        halves.append(part.half if bottom == 41 else part.half[:, : bottom // 2 - top // 2])
        above = part.pixels[:, -1] if bottom % 2 else None
    assert torch.equal(torch.cat(halves, 1), whole.half)


@BOTH
def test_dither_keeps_the_mean_and_whole_levels(use_triton):
    """A flat grey of k + 0.3 levels becomes k and k + 1 in the right shares; a whole level is not changed."""
    for level in (100.0, 100.296875, 0.0, 255.0):
        output, crop = torch.full((1, 1, 64, 64), level / 255), Box(0, 0, 64, 64)
        pixels = trim(output, crop, torch.uint8, origin=(24, 7), dither=True, use_triton=use_triton).pixels
        assert abs(float(pixels.float().mean()) - level) < 1 / 64
        assert int(pixels.max()) - int(pixels.min()) == (level != round(level))


@BOTH
def test_thresholds_are_bayers(use_triton):
    """65 greys from 0 to 1 level: the number that a pixel rounds up is its rank in the published 8 x 8 matrix, plus one."""
    grey = (torch.arange(65) / 64 / 255)[None, :, None, None].expand(1, 65, 8, 8)
    pixels = trim(grey, Box(0, 0, 8, 8), torch.uint8, dither=True, use_triton=use_triton).pixels
    rank = pixels.long().sum(0) - 1
    assert rank[:2].tolist() == [[0, 32, 8, 40, 2, 34, 10, 42], [48, 16, 56, 24, 50, 18, 58, 26]]
    assert sorted(rank.flatten().tolist()) == list(range(64))


@needs_triton
@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", MAX_VALUE, ids=str)
def test_kernel_takes_every_dtype_and_layout(target, source):
    output = (torch.rand(1, 3, 40, 53) * 1.4 - 0.2).to(source)
    for dither in (False, True):
        crop, options = Box(3, 5, 38, 50), {"origin": (10, 16), "dither": dither, "halve": True}
        twin = trim_torch(output, crop, target, **options)
        for _, same in layouts(output):
            result = trim(same, crop, target, **options, use_triton=True)
            for ours, theirs in zip(result, twin, strict=True):
                assert_close_to_twin(ours, theirs)


@needs_triton
def test_kernels_blocks_fit_together(small_blocks):
    output, crop = torch.rand(1, 3, 40, 53), Box(3, 5, 38, 52)
    output[0, :, 20, ::9] = NAN
    options = {"origin": (6, 2), "dither": True, "halve": True}
    twin = trim_torch(output, crop, torch.uint8, **options)
    for ours, theirs in zip(trim(output, crop, torch.uint8, **options, use_triton=True), twin, strict=True):
        assert_close_to_twin(ours, theirs)


@BOTH
def test_result_goes_into_the_callers_tensors(use_triton):
    output, crop = torch.rand(1, 3, 20, 30) * 1.4 - 0.2, Box(2, 3, 19, 24)
    for dtype, halved in [(torch.uint8, True), (torch.uint8, False), (torch.float32, False)]:
        expected = trim(output, crop, dtype, halve=halved, use_triton=use_triton)
        out = Trimmed(*(None if t is None else poisoned(t.shape, t.dtype) for t in expected))
        result = trim(output, crop, dtype, halve=halved, out=out, use_triton=use_triton)
        for ours, target, values in zip(result, out, expected, strict=True):
            assert (ours is None) == (target is None) == (values is None)
            if ours is not None:
                assert ours.data_ptr() == target.data_ptr()
                assert torch.equal(ours, values)


@BOTH
def test_refusals(use_triton):
    output, crop = torch.rand(1, 3, 8, 8), Box(0, 0, 8, 8)
    with pytest.raises(ValueError, match="torch.int32: cannot be written"):
        trim(output, crop, torch.int32, use_triton=use_triton)
    for row in (torch.zeros(3, 7, dtype=torch.uint8), torch.zeros(3, 8), torch.zeros(8, 3, dtype=torch.uint8).T):
        with pytest.raises(ValueError, match="row above .* does not fit"):
            trim(output, crop, torch.uint8, halve=True, above=row, use_triton=use_triton)
    fitting = trim(output, crop, torch.uint8)
    for wrong in (
        fitting._replace(pixels=fitting.pixels[:, :7]),
        fitting._replace(pixels=fitting.pixels.transpose(1, 2)),
        fitting._replace(nonfinite=fitting.nonfinite.int()),
        trim(output, crop, torch.uint8, halve=True),
    ):
        with pytest.raises(ValueError, match="does not fit"):
            trim(output, crop, torch.uint8, out=wrong, use_triton=use_triton)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_definition_does_not_wait_for_a_device(dtype):
    """A tensor without values, whose first number nobody can know, stands for one that is still being computed."""
    pixels = trim_torch(
        torch.empty(1, 3, 8, 12, dtype=torch.float16, device="meta"), Box(1, 1, 7, 11), dtype, halve=True
    )
    assert pixels.pixels.shape == (3, 6, 10)
