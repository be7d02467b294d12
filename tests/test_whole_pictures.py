"""Pictures from file to file through ``engine upscale``: depth, channels, colours and resolution, read by other libraries.

The network is a nearest-neighbour enlargement, so every pixel of the result is known.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import pyvips
import tifffile
import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file
from support.commands import ROOT
from support.stores import image_files, render

from engine.archs.compact import Compact
from engine.errors import ResumeError
from engine.exporters import export
from engine.io.icc import load_profile
from engine.plan.request import Request
from engine.store import open_store

rng = np.random.default_rng(0)
DEEP = rng.integers(0, 65536, (24, 40, 4)).astype(np.uint16)
DEEP[..., 3] = 65535
DEEP[:, 30:, 3] = 0


def nearest(path, scale=2):
    """Write a network that repeats every pixel."""
    network = Compact(channels=4, convs=0, scale=scale)
    torch.nn.init.zeros_(network.body[-1].weight)
    torch.nn.init.zeros_(network.body[-1].bias)
    save_file(network.state_dict(), path)


@pytest.fixture
def engine(tmp_path, monkeypatch, call):
    """Command line in a folder with ``nearest.safetensors``; returns standard error."""
    monkeypatch.chdir(tmp_path)
    nearest(tmp_path / "nearest.safetensors")

    def run(line):
        code, _, err = call(f"{line} --model nearest.safetensors --precision fp32")
        assert code == 0, err
        return err

    return run


def write(path, pixels, profile=None):
    channels = pixels.shape[2]
    options = {"extrasamples": ["unassalpha"]} if channels in (2, 4) else {}
    squeezed = pixels if channels > 1 else pixels[..., 0]
    photometric = "rgb" if channels > 2 else "minisblack"
    tifffile.imwrite(path, squeezed, photometric=photometric, planarconfig="contig" if channels > 1 else None,
                     iccprofile=profile, resolution=(240, 240), resolutionunit="inch", **options)  # fmt: skip


def read(path):
    """[H, W, C] by a library that did not write it: imagecodecs for PNG, libvips for TIFF; stores by this package."""
    if path.endswith("png"):
        pixels = imagecodecs.png_decode(Path(path).read_bytes())
    elif path.endswith("zarr"):
        pixels = open_store(path).read()
    else:
        pixels = pyvips.Image.new_from_file(path).numpy()
    return pixels.reshape(*pixels.shape[:2], -1)


def profile_of(path):
    """Embedded profile, by a library that did not write it: libvips for TIFF, else Pillow."""
    if path.endswith("tif"):
        image = pyvips.Image.new_from_file(path)
        return image.get("icc-profile-data") if image.get_typeof("icc-profile-data") else None
    with Image.open(path) as image:
        return image.info.get("icc_profile")


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_picture_comes_out_whole(engine, channels, depth):
    pixels = DEEP[..., [[0], [0, 3], [0, 1, 2], [0, 1, 2, 3]][channels - 1]]
    pixels = pixels if depth == 16 else (pixels >> 8).astype(np.uint8)
    write("a.tif", pixels)
    expected = pixels.repeat(2, 0).repeat(2, 1)
    assert engine("upscale a.tif --out large.zarr").count("a.tif: ") == 0  # nothing is converted
    for suffix in ("zarr", "png", "tif", "ome.tif"):
        if suffix != "zarr":
            export("large.zarr", f"large.{suffix}")
        result = read(f"large.{suffix}")
        assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
        colours = np.s_[:, :60] if channels in (2, 4) else np.s_[:, :]  # beyond, nothing is visible
        kept = channels - (channels in (2, 4))
        np.testing.assert_array_equal(result[colours][..., :kept], expected[colours][..., :kept])
        away = np.s_[:, np.r_[:54, 66:80]]  # the filter softens the edge of alpha
        np.testing.assert_array_equal(result[away][..., kept:], expected[away][..., kept:])
        if suffix != "zarr":
            assert round(pyvips.Image.new_from_file(f"large.{suffix}").xres * 25.4) == 240
            assert (profile_of(f"large.{suffix}") is None) == (channels < 3)


@pytest.mark.parametrize("executor", ["bands", "tiles", "batched --device cpu"])
def test_executors_agree(engine, executor):
    """Also where a picture is reduced behind the network, and in a region of it."""
    write("a.tif", np.tile(DEEP, (4, 4, 1)))
    engine("upscale a.tif --scale 1.7 --out a.zarr --executor bands")
    engine(f"upscale a.tif --scale 1.7 --out b.zarr --executor {executor} --tile 32")
    np.testing.assert_array_equal(read("b.zarr"), read("a.zarr"))


@pytest.mark.parametrize("suffix", ["jpg", "webp", "png", "tif"])
def test_profiles_are_embedded(engine, suffix):
    adobe, p3 = load_profile("adobe-rgb"), load_profile("p3")
    write("a.tif", (DEEP[..., :3] >> 8).astype(np.uint8), adobe)
    engine(f"upscale a.tif --out own.{suffix}")
    assert profile_of(f"own.{suffix}") == adobe
    error = engine(f"upscale a.tif --profile p3 --depth 16 --out p3.{suffix}")
    assert 'a.tif: colours are converted from "Compatible with Adobe RGB (1998)" to "' in error
    assert profile_of(f"p3.{suffix}") == p3
    assert ("8 bits: the 16 of the image are rounded" in error) == (suffix in ("jpg", "webp"))


def test_formats_without_alpha_or_grey_say_so(engine):
    write("a.tif", DEEP[..., [0, 3]])
    error = engine("upscale a.tif --out a.jpg --quality 100")
    assert "a.jpg: JPEG has no transparency: it is flattened on white" in error
    with Image.open("a.jpg") as image:
        assert image.mode == "L"
        assert np.asarray(image)[:, 68:].min() > 250
    engine("upscale a.tif --out a.webp")
    with Image.open("a.webp") as image:
        assert image.mode == "RGBA"
        assert set(np.asarray(image)[:, 68:, 3].ravel()) == {0}


def test_transparent_edges_have_no_fringe(tmp_path, engine, model_file):
    """A real network, and a disc on black or on white that nobody sees: the same picture, to a trace."""
    y, x = np.mgrid[:48, :48]
    alpha = (np.clip(16.5 - np.hypot(y - 24, x - 24), 0, 1) * 255).astype(np.uint8)
    results = []
    for background in (0, 255):
        colours = np.where(alpha[..., None] > 0, np.uint8([200, 60, 40]), np.uint8(background))
        Image.fromarray(np.dstack([colours, alpha])).save("disc.png")
        engine(f"upscale disc.png --model {model_file.parent}/sr.safetensors --out {background}.png --overwrite")
        results.append(read(f"{background}.png").astype(int))
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("orientation", [3, 8])
def test_orientation_is_applied_once(engine, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray((DEEP[..., :3] >> 8).astype(np.uint8)).save("a.png", exif=exif)
    engine("upscale a.png --out large.png")
    with Image.open("a.png") as before, Image.open("large.png") as after:
        upright = np.asarray(ImageOps.exif_transpose(before))
        np.testing.assert_array_equal(np.asarray(ImageOps.exif_transpose(after)), upright.repeat(2, 0).repeat(2, 1))


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (3, 2)])
def test_tiny_pictures(engine, size):
    pixels = DEEP[: size[0], : size[1]]
    write("a.tif", pixels)
    engine("upscale a.tif --out large.png")
    np.testing.assert_array_equal(read("large.png"), pixels.repeat(2, 0).repeat(2, 1))


def test_a_stopped_picture_resumes_with_its_format(engine, call):
    write("a.tif", np.tile(DEEP, (26, 2, 1)))
    request = Request(init=Path("a.tif"), precision="fp32", executor="bands")
    render(Path("nearest.safetensors"), request, Path("a.zarr"), writes=1)
    with pytest.raises(ResumeError, match="depth: 16 there, 8 here"):
        render(Path("nearest.safetensors"), replace(request, depth=8), Path("a.zarr"), resume=True)
    render(Path("nearest.safetensors"), request, Path("a.zarr"), resume=True)
    engine("upscale a.tif --out b.zarr --executor bands")
    assert image_files(Path("a.zarr")) == image_files(Path("b.zarr"))
    assert call("check a.zarr")[0] == 0


PEAK = """
import json, sys
import engine
result = engine.render("nearest.safetensors", "large.zarr", init=sys.argv[1], precision="fp32", overlap="exact", memory=sys.argv[2])
plan = result.projection
print(json.dumps([result.measurements.host_peak, plan.host, plan.working]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", [(384, 100_000), (100_000, 384)])
def test_a_huge_picture_is_streamed(tmp_path, size):
    """115 MB of pixels, 460 MB as the network sees them: within the plan, and within --memory."""
    height, width = size
    x, y = pyvips.Image.xyz(width, height).bandsplit()
    picture = (x + y).bandjoin([x * 7 / 256, y * 3]).cast("uint") & 255
    picture.cast("uchar").copy(interpretation="srgb").tiffsave(str(tmp_path / "a.tif"), compression="deflate")
    nearest(tmp_path / "nearest.safetensors", scale=1)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "VIPS_CONCURRENCY": "2"}
    command = [sys.executable, "-c", PEAK, "a.tif", "800MiB"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stderr
    peak, planned, working = json.loads(done.stdout)
    assert peak <= planned
    assert working < 340 << 20
    store = open_store(tmp_path / "large.zarr")
    x = np.arange(width)
    for y in (0, height // 2, height - 1):
        expected = np.stack(np.broadcast_arrays(x + y, x * 7 // 256, y * 3), -1) & 255
        np.testing.assert_array_equal(store[y : y + 1, :][0], expected)
