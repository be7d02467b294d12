"""Decoding of photographs: every common kind becomes upright, opaque sRGB, and damaged files are refused in one line."""

import hashlib
import io

import numpy as np
import pytest
import pyvips
import tifffile
import torch
from PIL import Image, ImageCms

from engine.errors import InputError
from engine.geometry import Box
from engine.io.photo import PictureSource, TensorSource, open_photo, resampled_photo, write_resampled_photo

HEIGHT, WIDTH = 37, 53
ORIENTATION = 0x0112


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


def written(path, pixels, interpretation="srgb", profile=None, orientation=None):
    """A file written by libvips: any number of channels, 8 or 16 bits."""
    image = pyvips.Image.new_from_array(pixels, interpretation=interpretation).copy()
    if profile is not None:
        image.set_type(pyvips.GValue.blob_type, "icc-profile-data", profile)
    if orientation is not None:
        image.set_type(pyvips.GValue.gint_type, "orientation", orientation)
    image.write_to_file(str(path))
    return path


def built_in(profile):
    """A profile that libvips carries: "p3", "cmyk", "srgb"."""
    return bytes(pyvips.Operation.call("profile_load", profile))


def with_alpha(pixels):
    """[H, W, 4]: transparent on the left, half transparent in the middle, opaque on the right."""
    alpha = np.zeros((*pixels.shape[:2], 1), np.uint8)
    alpha[:, WIDTH // 3 :] = 128
    alpha[:, 2 * WIDTH // 3 :] = 255
    return np.concatenate([pixels, alpha], -1)


# Formats


def test_eight_bits_are_exact(tmp_path, pixels):
    expected = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    for name, options in {"a.png": {}, "a.tif": {}, "a.webp": {"lossless": True}}.items():
        source = PictureSource(saved(tmp_path, pixels, name, **options))
        assert source.size == (HEIGHT, WIDTH)
        image = whole(source)
        assert image.dtype == torch.float32
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-7, msg=name)
        assert 0 <= float(image.min()) <= float(image.max()) <= 1


def test_jpeg_matches_pillow(tmp_path, pixels):
    path = saved(tmp_path, pixels, "a.jpg", quality=95)
    np.testing.assert_allclose(levels(PictureSource(path)), np.asarray(Image.open(path)), atol=2)


def test_sixteen_bits_keep_their_depth(tmp_path):
    deep = np.random.default_rng(0).integers(0, 65536, (HEIGHT, WIDTH, 3)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", deep, photometric="rgb")
    expected = deep.astype(np.float32) / np.float32(65535)
    np.testing.assert_allclose(whole(PictureSource(tmp_path / "a.tif")).permute(1, 2, 0), expected, atol=1e-7)


def test_grey_becomes_three_equal_channels(tmp_path):
    for white, dtype in ((255, np.uint8), (65535, np.uint16)):
        grey = np.linspace(0, white, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(dtype)
        image = whole(PictureSource(saved(tmp_path, grey, f"{white}.png")))
        assert image.shape == (3, HEIGHT, WIDTH)
        np.testing.assert_allclose(image.numpy(), np.stack([grey / white] * 3), atol=1.5 / white)


def test_one_bit_and_palettes_are_expanded(tmp_path, pixels):
    checks = (pixels[..., 0] // 30 % 2).astype(bool)
    np.testing.assert_array_equal(levels(PictureSource(saved(tmp_path, checks)))[..., 1], checks * 255)
    path = tmp_path / "p.png"
    palette = Image.fromarray(pixels).quantize(16)
    palette.save(path)
    np.testing.assert_allclose(levels(PictureSource(path)), np.asarray(palette.convert("RGB")), atol=1e-4)


# Colours


def test_alpha_is_flattened_on_white(tmp_path, pixels):
    rgba = with_alpha(pixels)
    share = rgba[..., 3:] / 255
    expected = pixels * share + 255 * (1 - share)
    for factor, dtype, interpretation in ((1, np.uint8, "srgb"), (257, np.uint16, "rgb16")):
        path = written(tmp_path / f"{factor}.png", (rgba.astype(int) * factor).astype(dtype), interpretation)
        np.testing.assert_allclose(levels(PictureSource(path)), expected, atol=1 / factor)


def test_an_exchanged_profile_exchanges_colours(tmp_path, pixels):
    """A profile whose primaries are exchanged: its red is sRGB's blue."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    entries = {bytes(profile[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i for i in range(profile[131])}
    red, blue = entries[b"rXYZ"], entries[b"bXYZ"]
    profile[red : red + 4], profile[blue : blue + 4] = b"bXYZ", b"rXYZ"
    path = written(tmp_path / "a.png", pixels[..., ::-1].copy(), profile=bytes(profile))
    np.testing.assert_allclose(levels(PictureSource(path)), pixels, atol=4)


def test_display_p3_matches_littlecms(tmp_path, pixels):
    path = saved(tmp_path, pixels, icc_profile=built_in("p3"))
    with Image.open(path) as image:
        source = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
        expected = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), intent)
    assert np.abs(np.asarray(expected).astype(int) - pixels).max() > 20  # the profile matters
    np.testing.assert_allclose(levels(PictureSource(path)), np.asarray(expected), atol=2)


def test_cmyk_becomes_rgb(tmp_path, pixels):
    path = tmp_path / "a.jpg"
    Image.fromarray(pixels).convert("CMYK").save(path, quality=98)
    source = PictureSource(path)
    assert whole(source).shape == (3, HEIGHT, WIDTH)
    # Without a profile the colours are a guess; light stays light and dark stays dark.
    assert np.corrcoef(levels(source).mean(-1).ravel(), pixels.mean(-1).ravel())[0, 1] > 0.9


def test_orientation_is_applied(tmp_path, pixels):
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # the camera was turned: rows run from right to left
    source = PictureSource(saved(tmp_path, pixels, exif=exif))
    assert source.size == (WIDTH, HEIGHT)
    np.testing.assert_allclose(levels(source), np.rot90(pixels, -1), atol=0.01)


def p3_jpeg(path, pixels):
    return saved(path, pixels, "a.jpg", quality=98, subsampling=0, icc_profile=built_in("p3"))


def p3_png_with_alpha_and_orientation(path, pixels):
    return written(path / "a.png", with_alpha(pixels), profile=built_in("p3"), orientation=6)


def deep_p3_tiff_with_alpha(path, pixels):
    return written(path / "a.tif", with_alpha(pixels).astype(np.uint16) * 257, "rgb16", built_in("p3"))


def grey_png_with_alpha_and_orientation(path, pixels):
    return written(path / "a.png", with_alpha(pixels)[..., 1:4:2].copy(), "b-w", orientation=8)


def deep_grey_tiff(path, pixels):
    return written(path / "a.tif", pixels[..., 0].astype(np.uint16) * 257, "grey16")


def cmyk_jpeg(path, pixels):
    inks = 255 - np.concatenate([pixels, np.full_like(pixels[..., :1], 200)], -1)
    return written(path / "a.jpg", inks, "cmyk", built_in("cmyk"), orientation=3)


def plain_jpeg(path, pixels):
    return saved(path, pixels, "a.jpg", quality=95)


@pytest.mark.parametrize(
    "write",
    [
        p3_jpeg,
        p3_png_with_alpha_and_orientation,
        deep_p3_tiff_with_alpha,
        grey_png_with_alpha_and_orientation,
        deep_grey_tiff,
        cmyk_jpeg,
        plain_jpeg,
    ],
)
def test_training_and_rendering_see_the_same_colours(tmp_path, pixels, write):
    """Rendering reads a ``PictureSource``; training compares with ``resampled_photo``, which has 8 bits."""
    path = write(tmp_path, pixels)
    source, photo = PictureSource(path), open_photo(path, 1)
    assert (photo.height, photo.width) == source.size
    assert photo.digest == source.digest
    np.testing.assert_allclose(resampled_photo(photo, source.size), levels(source), atol=1.6)
    if write is p3_jpeg:
        assert np.abs(levels(source) - pixels).max() > 20  # a decoder that ignores the profile would fail above
    small = (source.size[0] // 2, source.size[1] // 2)
    assert np.abs(resampled_photo(photo, small) - levels(source.resampled(small))).mean() < 2


# Regions and sizes


def test_boxes_are_crops(tmp_path, pixels):
    rng = np.random.default_rng(0)
    for name in ("a.png", "a.jpg", "a.tif"):
        for size in (None, (20, 31)):
            source = PictureSource(saved(tmp_path, pixels, name), size)
            image = whole(source)
            for _ in range(10):
                y, x = (sorted(int(v) for v in rng.choice(n + 1, 2, replace=False)) for n in source.size)
                part = source.read(Box(y[0], x[0], y[1], x[1]))
                assert torch.equal(part, image[:, y[0] : y[1], x[0] : x[1]]), (name, size, y, x)


def test_resampling_keeps_corners_on_corners(tmp_path, pixels):
    """Against Pillow, which does not round to levels between the two passes."""
    path = saved(tmp_path, pixels)
    planes = [Image.fromarray(pixels[..., c].astype(np.float32)) for c in range(3)]
    for size in ((6, 7), (13, 17), (36, 53), (38, 53), (37, 60), (100, 20), (74, 106), (311, 409)):
        source = PictureSource(path, size)
        assert source.size == size
        expected = np.stack([p.resize(size[::-1], Image.Resampling.LANCZOS) for p in planes], -1)
        output = levels(source)
        assert output.shape == (*size, 3)
        assert np.abs((output - expected).mean((0, 1))).max() < 1, size
        assert np.abs(output - expected).max() < 4, size


def test_enlarging_one_side_keeps_the_other_sharp(tmp_path):
    """A canvas rounds its base up, often by a single row."""
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    path = saved(tmp_path, noise)
    for size in ((38, 53), (37, 54)):
        output = levels(PictureSource(path, size))
        np.testing.assert_allclose(output[0, 0], noise[0, 0], atol=8)
        line, original = (output[0], noise[0]) if size[1] == WIDTH else (output[:, 0], noise[:, 0])
        assert np.corrcoef(line.ravel(), original.ravel())[0, 1] > 0.99


def test_resampling_to_its_own_size_changes_nothing(tmp_path, pixels):
    path = saved(tmp_path, pixels)
    assert torch.equal(whole(PictureSource(path, (HEIGHT, WIDTH))), whole(PictureSource(path)))


def test_shrinking_averages(tmp_path):
    board = (np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8)
    small = resampled_photo(open_photo(saved(tmp_path, board)), (33, 33))
    assert np.abs(small.astype(int) - 128).max() <= 6


def test_a_plain_jpeg_is_shrunk_as_libvips_does(tmp_path):
    """Bit for bit: photographs without a profile and without alpha train on the pixels of earlier versions."""
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3)).astype(np.uint8)
    path = saved(tmp_path, noise, "a.jpg")
    for height, width in ((300, 400), (99, 130), (37, 50), (330, 420)):
        expected = pyvips.Image.thumbnail(str(path), width, height=height, size="force").numpy()
        np.testing.assert_array_equal(resampled_photo(open_photo(path), (height, width)), expected)


def test_a_raw_file_holds_the_same_pixels(tmp_path, pixels):
    photo = open_photo(saved(tmp_path, pixels), 1)
    write_resampled_photo(photo, (20, 31), tmp_path / "raw")
    assert (tmp_path / "raw").read_bytes() == resampled_photo(photo, (20, 31)).tobytes()


def test_digest_is_that_of_the_file(tmp_path, pixels):
    path = saved(tmp_path, pixels)
    assert PictureSource(path).digest == open_photo(path, 1).digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_changed_file_is_read_again(tmp_path, pixels):
    PictureSource(saved(tmp_path, pixels))
    changed = PictureSource(saved(tmp_path, 255 - pixels[:20]))
    assert changed.size == (20, WIDTH)
    np.testing.assert_array_equal(levels(changed).round(), 255 - pixels[:20])
    assert open_photo(saved(tmp_path, pixels), least_width=1).height == HEIGHT


def test_a_tensor_is_read_box_by_box():
    image = torch.rand(3, 10, 12)
    source = TensorSource(image)
    assert source.size == (10, 12)
    assert torch.equal(source.read(Box(2, 3, 7, 12)), image[:, 2:7, 3:12])


# Refusals


def read_all(path):
    whole(PictureSource(path))


def decode_small(path):
    resampled_photo(open_photo(path, 1), (20, 20))


def refusal(path, decode=read_all):
    with pytest.raises(InputError) as caught:
        decode(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


def test_missing_files_and_folders_are_refused(tmp_path):
    assert "no such picture" in refusal(tmp_path / "a.png")
    assert "no such photograph" in refusal(tmp_path / "a.png", open_photo)
    assert "is a folder; name one picture" in refusal(tmp_path)
    assert "is a folder; name one photograph" in refusal(tmp_path, open_photo)


def test_a_narrow_photograph_is_refused(tmp_path, pixels):
    path = saved(tmp_path, pixels)
    assert f"{WIDTH} px wide, at least {WIDTH + 1} are needed" in refusal(
        path, lambda path: open_photo(path, WIDTH + 1)
    )


def test_garbage_is_refused(tmp_path):
    for number, content in enumerate((b"", b"garbage", bytes(range(256)) * 20, b"\x89PNG\r\n\x1a\n" + bytes(50))):
        for suffix in ("png", "jpg", "tif", "txt"):
            path = tmp_path / f"{number}.{suffix}"
            path.write_bytes(content)
            assert "cannot be read as a picture" in refusal(path)
            assert "cannot be read as a picture" in refusal(path, decode_small)


def test_truncated_pictures_are_refused(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3)).astype(np.uint8)
    for name in ("a.png", "a.jpg", "a.webp", "a.tif"):
        content = saved(tmp_path, noise, name).read_bytes()
        for share in (0.3, 0.9):
            path = tmp_path / f"{share}-{name}"
            path.write_bytes(content[: int(share * len(content))])
            assert "cannot be read as a picture" in refusal(path)
            assert "cannot be read as a picture" in refusal(path, decode_small)


def test_damage_is_refused_where_its_region_is_read(tmp_path):
    """A tiled TIFF is decoded tile by tile: the first pixel says nothing about the last."""
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3)).astype(np.uint8)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, noise, tile=(64, 64), compression="zlib", photometric="rgb")
    with tifffile.TiffFile(path) as file:
        offset = file.pages[0].dataoffsets[-1]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(200))
    assert "cannot be read as a picture" in refusal(path)
