"""Any store's pixels on a screen."""

import numpy as np
import pytest
import pyvips

from engine.io.display import Display
from engine.io.icc import load_profile
from engine.pixels import PixelFormat

rng = np.random.default_rng(0)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bits_grey_and_alpha(channels):
    """Rounded to the nearest, and on white by the share of alpha."""
    stored = rng.integers(0, 65536, (5, 7, channels)).astype(np.uint16)
    pixels = PixelFormat(channels, 16)
    shown = Display(pixels, None)(stored)
    expected = stored[..., : pixels.colours].repeat(3 // pixels.colours, 2) / 257.0
    if pixels.has_alpha:
        alpha = stored[..., -1:] / 65535.0
        expected = expected * alpha + 255 * (1 - alpha)
    assert shown.dtype == np.uint8
    assert np.abs(shown - expected).max() <= (1.01 if pixels.has_alpha else 0.5)


def test_other_profiles_become_srgb():
    """As libvips converts them; a damaged profile is ignored."""
    stored = rng.integers(60, 200, (16, 16, 3)).astype(np.uint8)
    adobe = load_profile("adobe-rgb")
    image = pyvips.Image.new_from_array(stored).copy(interpretation="srgb").copy()
    image.set_type(pyvips.GValue.blob_type, "icc-profile-data", adobe)
    expected = image.icc_transform("srgb", embedded=True, intent="relative").numpy()
    shown = Display(PixelFormat(), adobe)(stored)
    assert np.abs(shown.astype(int) - expected).max() <= 2
    assert np.abs(shown.astype(int) - stored).max() > 8
    assert np.array_equal(Display(PixelFormat(), adobe[:200])(stored), stored)
