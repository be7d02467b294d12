"""Pictures in their own depth, channels and colours: what networks see, and what is refused."""

import io
import os
import subprocess
import sys
from functools import partial
from statistics import median

import numpy as np
import pytest
import pyvips
import tifffile
from PIL import Image, ImageCms, ImageOps
from support.commands import ROOT

from engine.errors import InputError
from engine.geometry import Box
from engine.io.icc import load_profile
from engine.io.original import OriginalPicture
from engine.io.photo import open_photo, resampled_photo
from engine.io.transparency import REACH, filled
from engine.pixels import PixelFormat

HEIGHT, WIDTH = 37, 53
rng = np.random.default_rng(0)
DEEP = rng.integers(0, 65536, (HEIGHT, WIDTH, 3)).astype(np.uint16)
SMOOTH = np.stack(np.broadcast_arrays(*np.ogrid[30:200:37j, 20:230:53j], 90), -1).astype(np.uint8)
"""Colours that lie in every RGB profile."""
X, Y = pyvips.Image.xyz(48_000, 512).bandsplit()
LONG = (X.bandjoin([Y, X * Y / 7]).cast("uint") & 255).cast("uchar").copy(interpretation="srgb")
"""74 MB of RGB that compress well, computed where they are written."""


def whole(picture):
    return picture.read(Box(0, 0, *picture.size)).permute(1, 2, 0).numpy()


def tiff(path, pixels, **options):
    """An interleaved TIFF; a last channel of two or four is alpha."""
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    extra = ["unassalpha"] if channels in (2, 4) else []
    photometric = "rgb" if channels > 2 else "minisblack"
    options = {
        "photometric": photometric,
        "planarconfig": "contig" if channels > 1 else None,
        "extrasamples": extra,
        **options,
    }
    tifffile.imwrite(path, pixels if channels > 1 else pixels.reshape(pixels.shape[:2]), **options)
    return path


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_floats_are_read_from_0_to_1(tmp_path, bits, channels):
    pixels = np.concatenate([DEEP, DEEP[..., :1] | 1], -1)[..., -channels:] / 65535
    pixels[0, 0] = [-0.5, 1.5, 0.5, 1.0][-channels:]
    picture = OriginalPicture(tiff(tmp_path / "a.tif", pixels.astype(f"float{bits}")))
    assert picture.pixels == PixelFormat(channels, 16)
    assert picture.notes == (
        f"{bits}-bit floats are read from 0 (black) to 1 (white), in sRGB; the output has 16 bits",
    )
    colours = pixels[..., : picture.pixels.colours].clip(0, 1)
    np.testing.assert_allclose(
        whole(picture), np.broadcast_to(colours, (*colours.shape[:2], 3)), atol=1e-3 if bits == 16 else 1e-5
    )


def test_floats_of_another_white_are_refused(tmp_path):
    levels = SMOOTH.copy()
    levels[0, 0] = 0  # nothing is seen in the first pixel
    for name, pixels, problem in (
        ("levels.tif", levels, "most floats are beyond white (up to 230, white is 1); scale the picture"),
        ("nan.tif", np.full((9, 9), np.nan), "NaN among its samples; repair the picture"),
    ):
        with pytest.raises(InputError) as caught:
            OriginalPicture(tiff(tmp_path / name, pixels.astype(np.float32)))
        assert problem in str(caught.value)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a.png", "a.webp", "a.tif"):
        Image.fromarray(SMOOTH).save(tmp_path / name, exif=exif, **({"lossless": True} if name == "a.webp" else {}))
        with Image.open(tmp_path / name) as image:
            upright = np.asarray(ImageOps.exif_transpose(image))
        np.testing.assert_array_equal((whole(OriginalPicture(tmp_path / name)) * 255).round(), upright, name)


def profiles():
    return {name: load_profile(name) for name in ("srgb", "adobe-rgb", "p3")}


def converted(pixels, source, target):
    """By Little CMS, on 8 bits."""
    opened = [ImageCms.ImageCmsProfile(io.BytesIO(profile)) for profile in (source, target)]
    intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
    return np.asarray(ImageCms.profileToProfile(Image.fromarray(pixels), *opened, intent)).astype(float)


@pytest.mark.parametrize("own", ["srgb", "adobe-rgb", "p3"])
def test_colours_are_kept_or_converted(tmp_path, own):
    path = tmp_path / "a.png"
    Image.fromarray(SMOOTH).save(path, icc_profile=profiles()[own])
    kept = OriginalPicture(path)
    assert (kept.profile, kept.notes) == (profiles()[own], ())
    np.testing.assert_array_equal((whole(kept) * 255).round(), SMOOTH)
    for name, target in profiles().items():
        picture = OriginalPicture(path, profile=name)
        assert picture.profile == target
        assert picture.pixels == PixelFormat(3, 8)
        assert bool(picture.notes) == (name != own)
        np.testing.assert_allclose(whole(picture) * 255, converted(SMOOTH, profiles()[own], target), atol=2.5)


def test_training_sees_the_same_colours(tmp_path):
    """Training has sRGB of 8 bits, a render the values of the picture's profile."""
    path = tmp_path / "a.png"
    for name, profile in profiles().items():
        Image.fromarray(SMOOTH).save(path, icc_profile=profile)
        rendered = (whole(OriginalPicture(path)) * 255).round().astype(np.uint8)
        trained = resampled_photo(open_photo(path, 1), (HEIGHT, WIDTH))
        np.testing.assert_allclose(trained, converted(rendered, profile, profiles()["srgb"]), atol=2, err_msg=name)
        assert (np.abs(trained.astype(int) - rendered).max() > 8) == (name != "srgb")


def test_adobe_rgb_has_its_primaries_and_curve():
    profile = ImageCms.ImageCmsProfile(io.BytesIO(load_profile("adobe-rgb"))).profile
    chromaticities = [colour[1][:2] for colour in (profile.red_primary, profile.green_primary, profile.blue_primary)]
    # CIE xy of Adobe RGB (1998), adapted to D50.
    expected = [(0.6484, 0.3309), (0.2302, 0.7016), (0.1559, 0.0661)]
    np.testing.assert_allclose(chromaticities, expected, atol=1e-3)
    middle = converted(np.full((1, 1, 3), 128, np.uint8), load_profile("adobe-rgb"), load_profile("srgb"))
    linear = (128 / 255) ** 2.19921875
    assert abs(middle.mean() - 255 * (1.055 * linear ** (1 / 2.4) - 0.055)) < 1


def test_profiles_that_do_not_fit_are_refused(tmp_path):
    cmyk = bytes(pyvips.Operation.call("profile_load", "cmyk"))
    (tmp_path / "cmyk.icc").write_bytes(cmyk)
    (tmp_path / "text.icc").write_text("a text")
    for name, problem in {
        "cmyk.icc": "not an ICC profile of RGB",
        "text.icc": "not an ICC",
        "none.icc": "no such",
    }.items():
        with pytest.raises(InputError, match=problem):
            load_profile(tmp_path / name)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
def test_resolution_is_known_where_the_file_says_it(tmp_path, name):
    Image.fromarray(SMOOTH).save(tmp_path / name)
    assert OriginalPicture(tmp_path / name).dpi is None
    Image.fromarray(SMOOTH).save(tmp_path / name, dpi=(240, 240))
    np.testing.assert_allclose(OriginalPicture(tmp_path / name).dpi, (240, 240), rtol=1e-3)


# Transparency


def transparent(height, width, seed=0):
    """uint8 [h, w, 4]: discs of one colour each on black that is transparent, with soft edges."""
    y, x = np.mgrid[:height, :width]
    picture = np.zeros((height, width, 4))
    for k, (cy, cx) in enumerate(np.random.default_rng(seed).integers(0, (height, width), (3, 2))):
        alpha = np.clip(9 - np.hypot(y - cy, x - cx), 0, 1)
        picture[alpha > 0, k] = 255
        picture[..., 3] = np.maximum(picture[..., 3], alpha * 255)
    return picture.astype(np.uint8)


def test_transparent_pixels_continue_the_visible_ones():
    """Against the definition, pixel by pixel."""
    picture = transparent(50, 60)
    result = filled(lambda box: picture[box.slices], Box(0, 0, 50, 60), Box(0, 0, 50, 60))
    colours, alpha = picture[..., :3].astype(int), picture[..., 3:].astype(int)
    for y, x in ((0, 0), (49, 59), (25, 30), (10, 50), (40, 3)):
        expected = colours[y, x]
        if not alpha[y, x]:
            expected = np.full(3, 127)
            for radius in (1, 2, 4, 8, 16, REACH):
                square = np.s_[max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1]
                if weight := alpha[square].sum():
                    expected = ((colours[square] * alpha[square]).sum((0, 1)) + weight // 2) // weight
                    break
        np.testing.assert_array_equal(result[y, x], expected, f"{y}, {x}")
    np.testing.assert_array_equal(result[alpha[..., 0] > 0], picture[alpha[..., 0] > 0, :3])


def test_any_box_is_filled_alike(tmp_path):
    picture = OriginalPicture(tiff(tmp_path / "a.tif", transparent(300, 1200)))
    image = whole(picture)
    for box in (Box(0, 0, 300, 40), Box(100, 900, 131, 1200), Box(255, 1020, 258, 1030)):
        np.testing.assert_array_equal(picture.read(box).permute(1, 2, 0), image[box.slices])


def tiles(path):
    LONG.tiffsave(str(path), tile=True, tile_width=256, tile_height=256, compression="deflate", level=1)


def turned(path):
    image = LONG.copy()
    image.set_type(pyvips.GValue.gint_type, "orientation", 6)
    image.tiffsave(str(path), compression="deflate", level=1)


def strip(path):
    noise = np.random.default_rng(0).integers(0, 256, (40_000, 300, 3), np.uint8)
    options = {"compression": "zlib", "compressionargs": {"level": 1}}
    tifffile.imwrite(path, noise, photometric="rgb", rowsperstrip=len(noise), **options)


READING = """
import sys
from functools import partial
from statistics import median
from pathlib import Path
import torch
from engine.device.heap import fix_malloc_thresholds
from engine.device.memory import PeakMemory
from engine.geometry import Box
from engine.io.original import OriginalPicture
from engine.plan.limits import SOURCE_ROWS
from engine.probe.content import photograph_crops

fix_malloc_thresholds()
with PeakMemory(torch.device("cpu")) as crops:
    photograph_crops(Path("a.tif"), 1)
with PeakMemory(torch.device("cpu")) as rows:
    picture = OriginalPicture(Path("a.tif"))
    height, width = picture.size
    for y in range(0, height, SOURCE_ROWS):
        picture.read(Box(y, 0, min(y + SOURCE_ROWS, height), width))
counted = picture.memory + SOURCE_ROWS * width * picture.bytes_read + (8 << 20)
counted += picture.tiles.bytes_of(SOURCE_ROWS, width) if picture.tiles is not None else 0
print(crops.host - crops.start, rows.host - rows.start, counted)
"""


@pytest.mark.slow
@pytest.mark.parametrize("write", [tiles, turned, strip])
def test_long_pictures_take_the_memory_that_is_counted(tmp_path, write):
    """Rows of tiles; pages of the temporary file that a turned picture is read across; a strip, compressed."""
    write(tmp_path / "a.tif")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "VIPS_CONCURRENCY": "2"}
    command = [sys.executable, "-c", READING]
    # The system counts resident pages for each core and adds them up late: one reading may be off by megabytes.
    run = partial(subprocess.run, command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    crops, peak, counted = map(median, zip(*(map(int, run().stdout.split()) for _ in range(3)), strict=True))
    assert counted / 2 <= peak <= counted
    assert crops <= 140 << 20  # 248 MiB where rows of crops were read whole
