"""The command line on a pretend accelerator: the pixels of the CPU, within the device's memory."""

import numpy as np
import pytest
from support.accelerator import pretend_accelerator
from support.stores import pixels

SMALL = "--size 256x192 --seed 3 --overlap 4 --precision fp32 --tile 16"


def assert_close(image, expected):
    """A tail in chunks sums in another order: one level in single pixels, as on a real device."""
    difference = np.abs(image.astype(int) - expected)
    assert difference.max() <= 1
    assert difference.mean() < 1e-3


@pytest.fixture
def accelerator():
    with pretend_accelerator() as board:
        yield board


def test_render_has_the_pixels_of_the_cpu(tmp_path, call, model_file, accelerator):
    for device in ("cpu", "pretend"):
        code, _, errors = call(f"render {model_file} {SMALL} --device {device} --out {tmp_path / device}.zarr")
        assert code == 0, errors
    assert accelerator.counts["replays"] > 1
    assert_close(pixels(tmp_path / "pretend.zarr"), pixels(tmp_path / "cpu.zarr"))
