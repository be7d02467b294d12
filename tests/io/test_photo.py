"""Pictures to start from: every kind that people have becomes sRGB in [0, 1], and a damaged one is said to be."""

import hashlib

import numpy as np
import pytest
import pyvips
import tifffile
import torch
from PIL import Image, ImageCms

from engine.errors import InputError
from engine.geometry import Box
from engine.io.photo import PictureSource, TensorSource

HEIGHT, WIDTH = 37, 53


@pytest.fixture
def pixels():
    """[H, W, 3] uint8."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    return np.stack([y * 6, x * 4, (y + x) * 2 + 40], -1).astype(np.uint8)


def whole(source):
    return source.read(Box(0, 0, *source.size))


def levels(source):
    """[H, W, 3] in 8-bit levels."""
    return whole(source).permute(1, 2, 0).numpy() * 255


def saved(tmp_path, pixels, name="a.png", **options):
    path = tmp_path / name
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp"])
def test_eight_bits_are_read_exactly(tmp_path, pixels, name):
    options = {"lossless": True} if name == "a.webp" else {}
    source = PictureSource(saved(tmp_path, pixels, name, **options))
    assert source.size == (HEIGHT, WIDTH)
    image = whole(source)
    assert image.dtype == torch.float32
    expected = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-7)
    assert 0 <= float(image.min()) <= float(image.max()) <= 1


def test_jpeg_is_read_as_others_read_it(tmp_path, pixels):
    path = saved(tmp_path, pixels, "a.jpg", quality=95)
    np.testing.assert_allclose(levels(PictureSource(path)), np.asarray(Image.open(path)), atol=2)


def test_sixteen_bits_keep_their_depth(tmp_path):
    deep = np.random.default_rng(0).integers(0, 65536, (HEIGHT, WIDTH, 3)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", deep, photometric="rgb")
    expected = deep.astype(np.float32) / np.float32(65535)
    np.testing.assert_allclose(whole(PictureSource(tmp_path / "a.tif")).permute(1, 2, 0), expected, atol=1e-7)


@pytest.mark.parametrize("white", [255, 65535])
def test_grey_becomes_three_equal_channels(tmp_path, white):
    dtype = np.uint8 if white == 255 else np.uint16
    grey = np.linspace(0, white, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(dtype)
    image = whole(PictureSource(saved(tmp_path, grey)))
    assert image.shape == (3, HEIGHT, WIDTH)
    np.testing.assert_allclose(image.numpy(), np.stack([grey / white] * 3), atol=1.5 / white)


def test_one_bit_and_palettes_are_expanded(tmp_path, pixels):
    checks = (pixels[..., 0] // 30 % 2).astype(bool)
    np.testing.assert_array_equal(levels(PictureSource(saved(tmp_path, checks)))[..., 1], checks * 255)
    path = tmp_path / "p.png"
    palette = Image.fromarray(pixels).quantize(16)
    palette.save(path)
    np.testing.assert_allclose(levels(PictureSource(path)), np.asarray(palette.convert("RGB")), atol=1e-4)


@pytest.mark.parametrize("deep", [False, True], ids=["8 bits", "16 bits"])
def test_transparency_is_laid_on_white(tmp_path, pixels, deep):
    factor, dtype = (257, np.uint16) if deep else (1, np.uint8)
    alpha = np.zeros((HEIGHT, WIDTH, 1), np.uint8)
    alpha[:, WIDTH // 2 :] = 255
    rgba = (np.concatenate([pixels, alpha], -1).astype(int) * factor).astype(dtype)
    pyvips.Image.new_from_array(rgba, interpretation="rgb16" if deep else "srgb").write_to_file(str(tmp_path / "a.png"))
    result = levels(PictureSource(tmp_path / "a.png"))
    np.testing.assert_allclose(result[:, : WIDTH // 2], 255, atol=0.01)
    np.testing.assert_allclose(result[:, WIDTH // 2 :], pixels[:, WIDTH // 2 :], atol=0.01)


def test_a_profile_is_converted_to_srgb(tmp_path, pixels):
    """A profile whose primaries are exchanged: what it calls red is sRGB's blue."""
    path = tmp_path / "a.png"
    swapped = pyvips.Image.new_from_array(pixels[..., ::-1].copy())
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    entries = {bytes(profile[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i for i in range(profile[131])}
    red, blue = entries[b"rXYZ"], entries[b"bXYZ"]
    profile[red : red + 4], profile[blue : blue + 4] = b"bXYZ", b"rXYZ"
    swapped = swapped.copy()
    swapped.set_type(pyvips.GValue.blob_type, "icc-profile-data", bytes(profile))
    swapped.write_to_file(str(path))
    np.testing.assert_allclose(levels(PictureSource(path)), pixels, atol=4)


def test_cmyk_becomes_rgb(tmp_path, pixels):
    path = tmp_path / "a.jpg"
    Image.fromarray(pixels).convert("CMYK").save(path, quality=98)
    source = PictureSource(path)
    assert whole(source).shape == (3, HEIGHT, WIDTH)
    # Without a profile the colours are a guess; light stays light and dark stays dark.
    assert np.corrcoef(levels(source).mean(-1).ravel(), pixels.mean(-1).ravel())[0, 1] > 0.9


def test_the_orientation_is_applied(tmp_path, pixels):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rows run from right to left
    path = saved(tmp_path, pixels, "a.png", exif=exif)
    source = PictureSource(path)
    assert source.size == (WIDTH, HEIGHT)
    np.testing.assert_allclose(levels(source), np.rot90(pixels, -1), atol=0.01)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
@pytest.mark.parametrize("size", [None, (20, 31)])
def test_reading_boxes_is_cropping(tmp_path, pixels, name, size):
    source = PictureSource(saved(tmp_path, pixels, name), size)
    image = whole(source)
    rng = np.random.default_rng(0)
    for _ in range(10):
        y, x = (sorted(int(v) for v in rng.choice(n + 1, 2, replace=False)) for n in source.size)
        part = source.read(Box(y[0], x[0], y[1], x[1]))
        assert torch.equal(part, image[:, y[0] : y[1], x[0] : x[1]])


@pytest.mark.parametrize("size", [(6, 7), (13, 17), (36, 53), (38, 53), (37, 60), (100, 20), (74, 106), (311, 409)])
def test_resampling_keeps_the_corners_on_the_corners(tmp_path, pixels, size):
    """Against another library, which does not round to levels in between."""
    source = PictureSource(saved(tmp_path, pixels), size)
    assert source.size == size
    planes = [Image.fromarray(pixels[..., c].astype(np.float32)) for c in range(3)]
    expected = np.stack([p.resize(size[::-1], Image.Resampling.LANCZOS) for p in planes], -1)
    found = levels(source)
    assert found.shape == (*size, 3)
    assert np.abs((found - expected).mean((0, 1))).max() < 1
    assert np.abs(found - expected).max() < 4


@pytest.mark.parametrize("size", [(38, 53), (37, 54)])
def test_enlarging_one_side_leaves_the_other_sharp(tmp_path, size):
    """A canvas rounds its base up, often by a single row."""
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    found = levels(PictureSource(saved(tmp_path, noise), size))
    np.testing.assert_allclose(found[0, 0], noise[0, 0], atol=8)
    line, original = (found[0], noise[0]) if size[1] == WIDTH else (found[:, 0], noise[:, 0])
    assert np.corrcoef(line.ravel(), original.ravel())[0, 1] > 0.99


def test_resampling_to_its_own_size_changes_nothing(tmp_path, pixels):
    path = saved(tmp_path, pixels)
    assert torch.equal(whole(PictureSource(path, (HEIGHT, WIDTH))), whole(PictureSource(path)))


def test_the_digest_is_that_of_the_file(tmp_path, pixels):
    path = saved(tmp_path, pixels)
    assert PictureSource(path).digest == hashlib.sha256(path.read_bytes()).hexdigest()


# Refusals


def refusal(path):
    with pytest.raises(InputError) as caught:
        whole(PictureSource(path))
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


def test_a_missing_picture(tmp_path):
    assert "no such picture" in refusal(tmp_path / "a.png")


def test_a_folder(tmp_path):
    assert "no such picture" in refusal(tmp_path)


@pytest.mark.parametrize("content", [b"", b"garbage", bytes(range(256)) * 20, b"\x89PNG\r\n\x1a\n" + bytes(50)])
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "txt"])
def test_garbage(tmp_path, suffix, content):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    assert "cannot be read as a picture" in refusal(path)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tif"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_truncated_picture(tmp_path, name, share):
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3)).astype(np.uint8)
    path = saved(tmp_path, noise, name)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert "cannot be read as a picture" in refusal(path)


def test_damage_that_shows_only_when_a_region_is_read(tmp_path):
    """A tiled TIFF is decoded tile by tile: the first pixel says nothing of the last."""
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3)).astype(np.uint8)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, noise, tile=(64, 64), compression="zlib", photometric="rgb")
    with tifffile.TiffFile(path) as file:
        offset = file.pages[0].dataoffsets[-1]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(200))
    assert "cannot be read as a picture" in refusal(path)


# Images in memory


def test_a_tensor_is_read_box_by_box():
    image = torch.rand(3, 10, 12)
    source = TensorSource(image)
    assert source.size == (10, 12)
    assert torch.equal(source.read(Box(2, 3, 7, 12)), image[:, 2:7, 3:12])
