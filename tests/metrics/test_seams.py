"""The seam of pictures and stores that repeat, and of others."""

import numpy as np
import pytest
from PIL import Image
from support.small import picture

from engine.errors import InputError
from engine.metrics.images import open_image
from engine.metrics.seams import measure_seams


def sample(path, pixels):
    Image.fromarray(pixels).save(path)
    return open_image(path)


def periodic(height, width):
    """uint8 [height, width, 3] of waves that repeat along both axes."""
    y, x = np.mgrid[:height, :width]
    waves = np.sin(2 * np.pi * (3 * x / width + 2 * y / height)) + np.cos(2 * np.pi * (5 * y / height - 2 * x / width))
    return (127 + 50 * waves).round().astype(np.uint8)[..., None].repeat(3, 2)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_seams_along_each_axis(tmp_path, suffix):
    """Bands of any height give the differences of the whole image."""
    pixels = periodic(150, 96)  # three bands
    for name, image, seams in (
        ("both", pixels, [False, False]),
        ("x", pixels[:100], [False, True]),
        ("y", pixels[:, :70], [True, False]),
    ):
        found = measure_seams(sample(tmp_path / f"{name}.{suffix}", image))
        assert [seam.is_visible for seam in found] == seams
        for seam, axis in zip(found, (1, 0), strict=True):
            levels = image.astype(float)
            jumps = np.abs(np.diff(levels, axis=axis)).mean((1 - axis, 2))
            assert seam.jump == pytest.approx(np.abs(levels.take(0, axis) - levels.take(-1, axis)).mean(), abs=1e-4)
            assert (seam.typical, seam.largest) == pytest.approx((np.median(jumps), np.quantile(jumps, 0.99)), abs=1e-4)


def test_photographs_and_flat_pictures(tmp_path):
    photograph = picture(130, 90).mul(255).byte().permute(1, 2, 0).numpy()
    assert [seam.is_visible for seam in measure_seams(sample(tmp_path / "photo.png", photograph))] == [True, True]
    flat = measure_seams(sample(tmp_path / "flat.png", np.full((20, 30, 3), 90, np.uint8)))
    assert [(seam.ratio, seam.is_visible) for seam in flat] == [(1.0, False)] * 2
    with pytest.raises(InputError, match="too small to show a seam"):
        measure_seams(sample(tmp_path / "line.png", np.zeros((2, 9, 3), np.uint8)))
