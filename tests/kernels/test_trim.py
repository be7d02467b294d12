"""Trim: which pixels are kept, how they are rounded, and that no bad number passes unseen."""

import numpy as np
import pytest
import torch

from engine.geometry import Box
from engine.kernels.trim import trim_torch

NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=[torch.contiguous_format, torch.channels_last], ids=["planes", "channels last"])
def output(request):
    return (torch.rand(1, 3, 12, 10) * 1.4 - 0.2).contiguous(memory_format=request.param)


@pytest.mark.parametrize("core", [Box(0, 0, 12, 10), Box(3, 2, 9, 10), Box(5, 5, 6, 6)])
def test_keeps_the_core(output, core):
    kept, bad = trim_torch(output, core, quantise=False)
    assert torch.equal(kept, output[0, :, core.y0 : core.y1, core.x0 : core.x1].clamp(0, 1))
    assert bad == 0
    assert kept.dtype == torch.float32


@pytest.mark.parametrize("quantise", [True, False])
def test_the_core_owns_its_memory(output, quantise):
    """A kept view would keep the whole tile, halo included, in the cache."""
    kept, _ = trim_torch(output, Box(1, 1, 5, 5), quantise)
    assert kept.is_contiguous()
    assert kept.untyped_storage().nbytes() == kept.numel() * kept.itemsize


def test_rounds_half_to_even_as_numpy_does():
    # k + 1/2 levels that are exact in float32 once multiplied: found, not assumed.
    levels = torch.arange(255, dtype=torch.float32) + 0.5
    values = levels / 255.0
    exact = values[values * 255.0 == levels]
    assert len(exact) > 50
    values = torch.cat([exact, torch.linspace(0, 1, 1000)])
    kept, _ = trim_torch(values.view(1, 1, 1, -1), Box(0, 0, 1, len(values)), quantise=True)
    expected = np.rint(values.numpy() * np.float32(255)).astype(np.uint8)
    np.testing.assert_array_equal(kept.flatten().numpy(), expected)
    assert (kept.flatten()[: len(exact)] % 2 == 0).all()


def test_every_level_survives_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    kept, _ = trim_torch((levels.float() / 255).view(1, 1, 1, 256), Box(0, 0, 1, 256), quantise=True)
    assert torch.equal(kept.flatten(), levels)


@pytest.mark.parametrize(("value", "level"), [(-0.0001, 0), (-9.0, 0), (1.0001, 255), (1e30, 255), (1.0, 255)])
def test_clamps_to_the_range(value, level):
    output = torch.full((1, 3, 2, 2), value)
    assert trim_torch(output, Box(0, 0, 2, 2), quantise=True)[0].unique().tolist() == [level]
    assert trim_torch(output, Box(0, 0, 2, 2), quantise=False)[0].unique().tolist() == [min(max(value, 0.0), 1.0)]


@pytest.mark.parametrize("quantise", [True, False])
@pytest.mark.parametrize(("values", "count"), [([NAN], 1), ([INF], 1), ([-INF], 1), ([NAN, INF, -INF, NAN], 4)])
def test_counts_numbers_that_are_not_finite(values, count, quantise):
    output = torch.rand(1, 3, 8, 8)
    output[0, 1, 3, 2 : 2 + len(values)] = torch.tensor(values)
    assert trim_torch(output, Box(2, 2, 8, 8), quantise)[1] == count


def test_a_bad_number_in_the_halo_is_not_counted():
    output = torch.rand(1, 3, 8, 8)
    output[0, 0, 0, 0] = NAN
    assert trim_torch(output, Box(1, 0, 8, 8), quantise=True)[1] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_output_is_quantised_in_float32(dtype):
    output = torch.rand(1, 3, 9, 9).to(dtype)
    expected, _ = trim_torch(output.float(), Box(0, 0, 9, 9), quantise=True)
    kept, _ = trim_torch(output, Box(0, 0, 9, 9), quantise=True)
    assert torch.equal(kept, expected)
