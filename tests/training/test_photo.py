"""Training's views of a photograph: the pyramid, the picture to crop from, and rows of pictures."""

import numpy as np
import pytest
import torch
from PIL import Image

from engine.device.heap import fix_malloc_thresholds
from engine.device.memory import PeakMemory
from engine.errors import InputError
from engine.io.photo import open_photo
from engine.training.photo import open_picture, pyramid, to_unit, write_row


def save(path, mode="RGB", size=(300, 200), colour=None, **options):
    Image.new(mode, size, colour).save(path, **options)
    return path


def levels(tensor):
    """The middle pixel as 8-bit levels."""
    height, width = tensor.shape[2:]
    return ((tensor[0, :, height // 2, width // 2] + 1) * 127.5).round().int().tolist()


def test_pyramid_sizes_and_range(tmp_path):
    photo = open_photo(save(tmp_path / "a.png", colour=(255, 0, 51)))
    assert (photo.width, photo.height) == (300, 200)
    small, large = pyramid(photo, [(22, 33), (170, 256)])
    assert small.shape == (1, 3, 22, 33)
    assert large.shape == (1, 3, 170, 256)
    assert small.dtype == torch.float32
    assert levels(large) == [255, 0, 51]
    assert small[0, :, 0, 0].tolist() == pytest.approx([1, -1, -0.6], abs=1e-6)


def test_other_kinds_become_rgb(tmp_path):
    kinds = [
        ("grey.png", "L", 90, [90, 90, 90]),
        ("grey_alpha.png", "LA", (90, 128), [172, 172, 172]),
        ("alpha.png", "RGBA", (200, 100, 50, 128), [227, 177, 152]),
        ("palette.png", "P", 0, [0, 0, 0]),
        ("grey.jpg", "L", 90, [90, 90, 90]),
        ("deep.png", "I;16", 0x8080, [128, 128, 128]),
    ]
    for name, mode, colour, expected in kinds:
        (image,) = pyramid(open_photo(save(tmp_path / name, mode, colour=colour)), [(100, 256)])
        assert image.shape == (1, 3, 100, 256)
        assert levels(image) == pytest.approx(expected, abs=1), name


def test_cmyk_becomes_rgb(tmp_path):
    (image,) = pyramid(open_photo(save(tmp_path / "cmyk.jpg", "CMYK", colour=(0, 255, 255, 0))), [(100, 256)])
    red, green, blue = levels(image)
    assert red > 180
    assert max(green, blue) < 90


def test_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = open_photo(save(tmp_path / "turned.jpg", size=(400, 300), colour=(1, 2, 3), exif=exif))
    assert (photo.width, photo.height) == (300, 400)
    assert pyramid(photo, [(341, 256)])[0].shape == (1, 3, 341, 256)


def test_a_mapped_picture_equals_one_in_memory(large_photo, tmp_path):
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


def test_a_crop_matches_the_pyramid(large_photo, tmp_path):
    photo = open_photo(large_photo, 1)
    picture = open_picture(photo, (96, 128), tmp_path / "scratch")
    (whole,) = pyramid(photo, [(96, 128)])
    crop = to_unit(picture.crop(10, 20, 32, 48))
    assert crop.shape == (3, 32, 48)
    torch.testing.assert_close(crop, (whole[0, :, 10:42, 20:68] + 1) / 2)


def test_truncated_photographs_are_refused(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (300, 400, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "whole.jpg")
    cut = tmp_path / "cut.jpg"
    cut.write_bytes((tmp_path / "whole.jpg").read_bytes()[:20_000])
    for in_memory in (1 << 20, 1000):
        with pytest.raises(InputError, match="cut.jpg: cannot be read as a picture"):
            open_picture(open_photo(cut), (192, 256), tmp_path / "scratch", in_memory)


def test_a_row_of_pictures(tmp_path):
    path = tmp_path / "folder" / "row.png"
    write_row([torch.zeros(3, 4, 5), torch.ones(3, 4, 5)], path)
    with Image.open(path) as image:
        assert image.size == (10, 4)
        assert image.getpixel((2, 2)) == (0, 0, 0)
        assert image.getpixel((7, 2)) == (255, 255, 255)
