"""The photograph at a size: the same pixels in memory and from a file."""

import numpy as np
import pytest
import torch

from engine.device.heap import fix_malloc_thresholds
from engine.device.memory import PeakMemory
from engine.errors import InputError
from engine.training.data import open_photo, pyramid
from engine.training.picture import open_picture, to_unit


def test_a_mapped_picture_is_the_one_in_memory(large_photo, tmp_path):
    photo = open_photo(large_photo, 1)
    inside = open_picture(photo, (90, 120), tmp_path / "scratch")
    assert not (tmp_path / "scratch").exists()
    mapped = open_picture(photo, (90, 120), tmp_path / "scratch", in_memory=1000)
    assert isinstance(mapped.pixels(), np.memmap)
    assert (tmp_path / "scratch").stat().st_size == 90 * 120 * 3
    assert inside.size == mapped.size == (90, 120)
    assert torch.equal(inside.crop(5, 7, 30, 40), mapped.crop(5, 7, 30, 40))


def test_a_large_picture_takes_little_memory(large_photo, tmp_path):
    fix_malloc_thresholds()
    photo = open_photo(large_photo, 1)
    with PeakMemory(torch.device("cpu")) as memory:
        picture = open_picture(photo, (6144, 8192), tmp_path / "scratch", in_memory=1000)
        for y in range(0, 6000, 100):
            picture.crop(y, y, 144, 144)
    assert (tmp_path / "scratch").stat().st_size == 8192 * 6144 * 3
    assert memory.host - memory.start < 0.5 * 8192 * 6144 * 3


def test_a_crop_is_its_place(large_photo, tmp_path):
    photo = open_photo(large_photo, 1)
    picture = open_picture(photo, (96, 128), tmp_path / "scratch")
    (whole,) = pyramid(photo, [(96, 128)])
    crop = to_unit(picture.crop(10, 20, 32, 48))
    assert crop.shape == (3, 32, 48)
    torch.testing.assert_close(crop, (whole[0, :, 10:42, 20:68] + 1) / 2)


def test_a_photograph_that_breaks_off(tmp_path, large_photo):
    from PIL import Image

    whole = tmp_path / "whole.jpg"
    with Image.open(large_photo) as image:
        image.save(whole, quality=95)
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(whole.read_bytes()[:4000])
    with pytest.raises(InputError, match="cannot be brought to 64x48"):
        open_picture(open_photo(cut, 1), (48, 64), tmp_path / "scratch")
