"""Photographs of every kind become the same pyramid; what cannot is refused in one line."""

import numpy as np
import pytest
import torch
from PIL import Image

from engine.errors import InputError
from engine.training.data import open_photo, pyramid, write_row


def save(path, mode="RGB", size=(300, 200), colour=None, **options):
    Image.new(mode, size, colour).save(path, **options)
    return path


def levels(tensor):
    """The middle pixel as 8-bit levels."""
    height, width = tensor.shape[2:]
    return ((tensor[0, :, height // 2, width // 2] + 1) * 127.5).round().int().tolist()


def test_pyramid_has_the_asked_sizes_and_range(tmp_path):
    photo = open_photo(save(tmp_path / "a.png", colour=(255, 0, 51)))
    assert (photo.width, photo.height) == (300, 200)
    small, large = pyramid(photo, [(22, 33), (170, 256)])
    assert small.shape == (1, 3, 22, 33)
    assert large.shape == (1, 3, 170, 256)
    assert small.dtype == torch.float32
    assert levels(large) == [255, 0, 51]
    assert small[0, :, 0, 0].tolist() == pytest.approx([1, -1, -0.6], abs=1e-6)


def test_resizing_averages(tmp_path):
    board = (np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).convert("RGB").save(tmp_path / "board.png")
    (small,) = pyramid(open_photo(tmp_path / "board.png"), [(33, 33)])
    assert small.abs().max() < 0.05


@pytest.mark.parametrize(
    ("name", "mode", "colour", "expected"),
    [
        ("grey.png", "L", 90, [90, 90, 90]),
        ("grey_alpha.png", "LA", (90, 128), [90, 90, 90]),
        ("alpha.png", "RGBA", (200, 100, 50, 128), [200, 100, 50]),
        ("palette.png", "P", 0, [0, 0, 0]),
        ("grey.jpg", "L", 90, [90, 90, 90]),
    ],
)
def test_other_kinds_become_rgb(tmp_path, name, mode, colour, expected):
    (picture,) = pyramid(open_photo(save(tmp_path / name, mode, colour=colour)), [(100, 256)])
    assert picture.shape == (1, 3, 100, 256)
    assert levels(picture) == pytest.approx(expected, abs=1)


def test_cmyk_becomes_rgb(tmp_path):
    (picture,) = pyramid(open_photo(save(tmp_path / "cmyk.jpg", "CMYK", colour=(0, 255, 255, 0))), [(100, 256)])
    red, green, blue = levels(picture)
    assert red > 180
    assert max(green, blue) < 90


@pytest.mark.parametrize("shape", [(200, 300), (200, 300, 3)])
def test_sixteen_bits_become_eight(tmp_path, shape):
    import tifffile

    tifffile.imwrite(
        tmp_path / "deep.tif",
        np.full(shape, 0x8080, np.uint16),
        photometric="rgb" if len(shape) == 3 else "minisblack",
    )
    (picture,) = pyramid(open_photo(tmp_path / "deep.tif"), [(100, 256)])
    assert picture.shape == (1, 3, 100, 256)
    assert levels(picture) == pytest.approx([128] * 3, abs=1)


def test_rotation_in_exif_is_obeyed(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = open_photo(save(tmp_path / "turned.jpg", size=(400, 300), colour=(1, 2, 3), exif=exif))
    assert (photo.width, photo.height) == (300, 400)
    assert pyramid(photo, [(341, 256)])[0].shape == (1, 3, 341, 256)


def test_refusals_are_one_line(tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    save(tmp_path / "small.png", size=(255, 400))
    for name, message in [
        ("none.jpg", "no such"),
        (".", "no such"),
        ("text.jpg", "not a picture"),
        ("small.png", "255 px wide"),
    ]:
        with pytest.raises(InputError, match=message) as error:
            open_photo(tmp_path / name)
        assert "\n" not in str(error.value)


def test_truncated_photograph(tmp_path):
    rng = np.random.default_rng(0)
    whole = tmp_path / "whole.jpg"
    Image.fromarray(rng.integers(0, 255, (300, 400, 3)).astype(np.uint8)).save(whole)
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(whole.read_bytes()[:20_000])
    with pytest.raises(InputError, match="cannot be decoded"):
        pyramid(open_photo(cut), [(192, 256)])


def test_row_of_pictures(tmp_path):
    path = tmp_path / "folder" / "row.png"
    write_row([torch.zeros(3, 4, 5), torch.ones(3, 4, 5)], path)
    with Image.open(path) as image:
        assert image.size == (10, 4)
        assert image.getpixel((2, 2)) == (0, 0, 0)
        assert image.getpixel((7, 2)) == (255, 255, 255)
