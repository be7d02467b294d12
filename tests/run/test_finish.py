"""From float32 to the pixels of a store: 16 bits, grey and alpha, by any box."""

import numpy as np
import pytest
import torch

from engine.geometry import Box
from engine.io.photo import TensorSource
from engine.pixels import PixelFormat
from engine.plan.reduction import Axis
from engine.run.finish import Finish
from engine.run.resample import resampled

VALUES = torch.from_numpy(np.random.default_rng(0).random((3, 32, 40), np.float32))


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_values_are_rounded(channels, depth):
    pixels = PixelFormat(channels, depth)
    alpha = TensorSource(torch.rand(1, 32, 40))
    result = Finish(pixels, alpha=alpha)(VALUES, (0, 0)).numpy()
    assert (result.shape, result.dtype) == ((channels, 32, 40), pixels.dtype)
    colours = VALUES.numpy() if pixels.colours == 3 else VALUES.numpy().mean(0, keepdims=True)
    expected = np.concatenate([colours, alpha.read(Box(0, 0, 32, 40)).numpy()])[:channels]
    assert np.abs(result - expected * float(pixels.white)).max() <= 0.51


@pytest.mark.parametrize("depth", [8, 16])
def test_dither_keeps_the_mean_between_two_levels(depth):
    finish = Finish(PixelFormat(3, depth), dither=True)
    white = finish.pixels.white
    values = torch.full((3, 64, 64), (100 + 0.3) / white)
    result = finish(values, (8, 16)).numpy().astype(float)
    assert set(np.unique(result)) == {100, 101}
    assert abs(result.mean() - 100.3) < 0.02
    part = finish(values[:, :5, :7], (8 + 3, 16 + 2)).numpy()
    np.testing.assert_array_equal(part, result[:, 3:8, 2:9])


def test_alpha_has_no_ringing():
    """A cubic filter overshoots on both sides of an edge, where a clamp removes it; flat parts stay exact."""
    edge = torch.zeros(1, 12, 1)
    edge[:, 6:] = 1
    enlarged = resampled(edge, Axis(12, 48, lobes=2), (0, 48), 0).clamp(0, 1)[0, :, 0]
    assert bool((enlarged.diff() >= -1e-6).all())
    assert float(enlarged[:20].max()) == 0
    assert float(enlarged[28:].min()) > 1 - 1e-6
    np.testing.assert_allclose(enlarged.flip(0), 1 - enlarged, atol=1e-6)
