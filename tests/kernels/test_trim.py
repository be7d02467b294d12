"""Trim: which pixels are kept, how they are rounded, and that no bad number passes unseen."""

import numpy as np
import pytest
import torch
from support.kernels import assert_close_to_twin, layouts, needs_triton, poisoned

from engine.geometry import Box
from engine.io.zarr_store import halve
from engine.kernels.trim import MAX_VALUE, Trimmed, trim, trim_torch

NAN, INF = float("nan"), float("inf")


def cut(output, core, quantise):
    """The kept pixels, as uint8 or float32, and the number of values that were not finite."""
    trimmed = trim_torch(output, core, torch.uint8 if quantise else torch.float32)
    return trimmed.pixels, trimmed.bad


@pytest.fixture(params=[torch.contiguous_format, torch.channels_last], ids=["planes", "channels last"])
def output(request):
    return (torch.rand(1, 3, 12, 10) * 1.4 - 0.2).contiguous(memory_format=request.param)


@pytest.mark.parametrize("core", [Box(0, 0, 12, 10), Box(3, 2, 9, 10), Box(5, 5, 6, 6)])
def test_keeps_the_core(output, core):
    kept, bad = cut(output, core, quantise=False)
    assert torch.equal(kept, output[0, :, core.y0 : core.y1, core.x0 : core.x1].clamp(0, 1))
    assert bad == 0
    assert kept.dtype == torch.float32


@pytest.mark.parametrize("quantise", [True, False])
def test_the_core_owns_its_memory(output, quantise):
    """A kept view would keep the whole tile, halo included, in the cache."""
    kept, _ = cut(output, Box(1, 1, 5, 5), quantise)
    assert kept.is_contiguous()
    assert kept.untyped_storage().nbytes() == kept.numel() * kept.itemsize


def test_rounds_half_to_even_as_numpy_does():
    # k + 1/2 levels that are exact in float32 once multiplied: found, not assumed.
    levels = torch.arange(255, dtype=torch.float32) + 0.5
    values = levels / 255.0
    exact = values[values * 255.0 == levels]
    assert len(exact) > 50
    values = torch.cat([exact, torch.linspace(0, 1, 1000)])
    kept, _ = cut(values.view(1, 1, 1, -1), Box(0, 0, 1, len(values)), quantise=True)
    expected = np.rint(values.numpy() * np.float32(255)).astype(np.uint8)
    np.testing.assert_array_equal(kept.flatten().numpy(), expected)
    assert (kept.flatten()[: len(exact)] % 2 == 0).all()


def test_every_level_survives_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    kept, _ = cut((levels.float() / 255).view(1, 1, 1, 256), Box(0, 0, 1, 256), quantise=True)
    assert torch.equal(kept.flatten(), levels)


@pytest.mark.parametrize(("value", "level"), [(-0.0001, 0), (-9.0, 0), (1.0001, 255), (1e30, 255), (1.0, 255)])
def test_clamps_to_the_range(value, level):
    output = torch.full((1, 3, 2, 2), value)
    assert cut(output, Box(0, 0, 2, 2), quantise=True)[0].unique().tolist() == [level]
    assert cut(output, Box(0, 0, 2, 2), quantise=False)[0].unique().tolist() == [min(max(value, 0.0), 1.0)]


@pytest.mark.parametrize("quantise", [True, False])
@pytest.mark.parametrize(("values", "count"), [([NAN], 1), ([INF], 1), ([-INF], 1), ([NAN, INF, -INF, NAN], 4)])
def test_counts_numbers_that_are_not_finite(values, count, quantise):
    output = torch.rand(1, 3, 8, 8)
    output[0, 1, 3, 2 : 2 + len(values)] = torch.tensor(values)
    assert cut(output, Box(2, 2, 8, 8), quantise)[1] == count


def test_a_bad_number_in_the_halo_is_not_counted():
    output = torch.rand(1, 3, 8, 8)
    output[0, 0, 0, 0] = NAN
    assert cut(output, Box(1, 0, 8, 8), quantise=True)[1] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_output_is_quantised_in_float32(dtype):
    output = torch.rand(1, 3, 9, 9).to(dtype)
    expected, _ = cut(output.float(), Box(0, 0, 9, 9), quantise=True)
    kept, _ = cut(output, Box(0, 0, 9, 9), quantise=True)
    assert torch.equal(kept, expected)


BOTH = pytest.mark.parametrize("use_triton", [False, pytest.param(True, marks=needs_triton)], ids=["twin", "kernel"])


@BOTH
@pytest.mark.parametrize(("height", "width"), [(8, 10), (9, 10), (8, 11), (7, 7), (1, 1), (1, 4), (70, 301)])
def test_the_halved_level_is_that_of_the_sink(height, width, use_triton):
    output = torch.rand(1, 3, height, width) * 1.2 - 0.1
    trimmed = trim(output, Box(0, 0, height, width), torch.uint8, halve=True, use_triton=use_triton)
    np.testing.assert_array_equal(trimmed.half.numpy(), halve(trimmed.pixels.numpy()))


@BOTH
def test_the_halves_of_tiles_are_the_half_of_the_image(use_triton):
    output = torch.rand(1, 3, 21, 30)
    whole = trim_torch(output, Box(0, 0, 21, 30), torch.uint8, dither=True, halve=True)
    for core in (Box(0, 0, 8, 16), Box(8, 16, 21, 30)):
        options = {"origin": (core.y0, core.x0), "dither": True, "halve": True}
        part = trim(output, core, torch.uint8, **options, use_triton=use_triton)
        assert torch.equal(part.pixels, whole.pixels[(slice(None), *core.slices)])
        assert torch.equal(part.half, whole.half[(slice(None), *core.cover(2).slices)])


@BOTH
def test_dither_keeps_the_mean_and_the_levels(use_triton):
    """A flat grey of k + 0.3 levels becomes k and k + 1 in the right shares; a whole level stays as it is."""
    for level, mean in ((100.0, 100.0), (100.296875, 100.296875), (0.0, 0.0), (255.0, 255.0)):
        output = torch.full((1, 1, 64, 64), level / 255)
        core = Box(0, 0, 64, 64)
        kept = trim(output, core, torch.uint8, origin=(24, 7), dither=True, use_triton=use_triton).pixels
        assert abs(float(kept.float().mean()) - mean) < 1 / 64
        assert int(kept.max()) - int(kept.min()) == (level != round(level))


@BOTH
def test_the_thresholds_are_bayers(use_triton):
    """Of grey from 0 to 1 level in 64ths, a pixel shows as many as its rank in the published 8 x 8 matrix, and one."""
    grey = (torch.arange(65) / 64 / 255)[None, :, None, None].expand(1, 65, 8, 8)
    kept = trim(grey, Box(0, 0, 8, 8), torch.uint8, dither=True, use_triton=use_triton).pixels
    rank = kept.long().sum(0) - 1
    assert rank[:2].tolist() == [[0, 32, 8, 40, 2, 34, 10, 42], [48, 16, 56, 24, 50, 18, 58, 26]]
    assert sorted(rank.flatten().tolist()) == list(range(64))


@needs_triton
@pytest.mark.parametrize("dither", [False, True], ids=["plain", "dither"])
@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("target", MAX_VALUE)
def test_the_kernel_takes_every_dtype_and_layout(target, source, dither):
    output = (torch.rand(1, 3, 40, 53) * 1.4 - 0.2).to(source)
    core, options = Box(3, 5, 38, 50), {"origin": (10, 16), "dither": dither, "halve": True}
    twin = trim_torch(output, core, target, **options)
    for _, same in layouts(output):
        result = trim(same, core, target, **options, use_triton=True)
        for mine, theirs in zip(result, twin, strict=True):
            assert_close_to_twin(mine, theirs)


@needs_triton
def test_the_kernels_blocks_fit_together(small_blocks):
    output, core = torch.rand(1, 3, 40, 53), Box(3, 5, 38, 52)
    output[0, :, 20, ::9] = NAN
    options = {"origin": (6, 2), "dither": True, "halve": True}
    twin = trim_torch(output, core, torch.uint8, **options)
    for mine, theirs in zip(trim(output, core, torch.uint8, **options, use_triton=True), twin, strict=True):
        assert_close_to_twin(mine, theirs)


@needs_triton
def test_the_kernel_rounds_half_to_even():
    levels = torch.arange(255, dtype=torch.float32) + 0.5
    values = levels / 255.0
    values = values[values * 255.0 == levels]
    kept = trim(values.view(1, 1, 1, -1), Box(0, 0, 1, len(values)), torch.uint8, use_triton=True).pixels
    assert len(values) > 50
    assert (kept % 2 == 0).all()


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_faults_are_counted_by_kind(dtype, use_triton):
    output = torch.rand(1, 3, 40, 300).to(dtype)
    output[0, 0, 0, :5] = NAN  # in the halo
    output[0, 1, 3, 2:5] = NAN
    output[0, 2, 30, 290:292] = torch.tensor([INF, -INF])
    output[0, 0, 20, 20:24] = torch.tensor([65504.0, -65504.0, 65472.0, 65504.0])
    trimmed = trim(output, Box(2, 1, 40, 300), torch.uint8, use_triton=use_triton)
    assert trimmed.nonfinite.tolist() == [3, 2, 3 if dtype == torch.float16 else 0]
    assert trimmed.bad == 5
    assert trimmed.half is None
    assert (trimmed.pixels[1, 1, 1:4] == 0).all()


@BOTH
def test_what_cannot_be_written_is_refused(use_triton):
    output, core = torch.rand(1, 3, 8, 8), Box(0, 0, 8, 8)
    with pytest.raises(ValueError, match="cannot write torch.int32"):
        trim(output, core, torch.int32, use_triton=use_triton)
    with pytest.raises(ValueError, match="must be even"):
        trim(output, core, torch.uint8, origin=(3, 0), halve=True, use_triton=use_triton)


@BOTH
@pytest.mark.parametrize(("dtype", "halve"), [(torch.uint8, True), (torch.uint8, False), (torch.float32, False)])
def test_the_result_goes_into_tensors_that_are_given(dtype, halve, use_triton):
    output, core = torch.rand(1, 3, 20, 30) * 1.4 - 0.2, Box(2, 3, 19, 24)
    expected = trim(output, core, dtype, halve=halve, use_triton=use_triton)
    out = Trimmed(*(None if t is None else poisoned(t.shape, t.dtype) for t in expected))
    result = trim(output, core, dtype, halve=halve, out=out, use_triton=use_triton)
    for mine, given, wanted in zip(result, out, expected, strict=True):
        assert mine is given is wanted is None or (mine.data_ptr() == given.data_ptr() and torch.equal(mine, wanted))


@BOTH
def test_tensors_that_do_not_fit_are_refused(use_triton):
    output, core = torch.rand(1, 3, 8, 8), Box(0, 0, 8, 8)
    fitting = trim(output, core, torch.uint8)
    for wrong in (
        fitting._replace(pixels=fitting.pixels[:, :7]),
        fitting._replace(pixels=fitting.pixels.transpose(1, 2)),
        fitting._replace(nonfinite=fitting.nonfinite.int()),
        trim(output, core, torch.uint8, halve=True),
    ):
        with pytest.raises(ValueError, match="were expected"):
            trim(output, core, torch.uint8, out=wrong, use_triton=use_triton)
