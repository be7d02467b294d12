"""OpenEXR, read back by OpenImageIO and by OpenEXR's own package."""

import importlib.util

import numpy as np
import pytest

from engine.errors import UsageError
from engine.exporters import export
from engine.exporters.exr import linear
from engine.io.halving import halve_interleaved

oiio = pytest.importorskip("OpenImageIO")


def read_levels(path, kind="half"):
    file, levels = oiio.ImageInput.open(str(path)), []
    while file.seek_subimage(0, len(levels)):
        levels.append(file.read_image(0, len(levels), 0, file.spec().nchannels, kind))
    file.close()
    return levels


def test_levels_are_linear_light(store, levels, tmp_path):
    """The mean of two greys is that of the store's level; each is converted alone."""
    out = export(store, tmp_path / "a.exr")
    found = read_levels(out.path)
    assert out.levels == len(found) == 12
    expected = list(levels)
    while max(expected[-1].shape[:2]) > 1:
        expected.append(halve_interleaved(expected[-1]))
    for pixels, level in zip(found, expected, strict=True):
        assert np.array_equal(pixels, linear(level / 255).astype(np.float16))
    file = oiio.ImageInput.open(str(out.path))
    spec = file.spec()
    assert (spec.tile_width, spec.tile_height, spec.get_string_attribute("compression")) == (64, 64, "zip")
    assert "sha256:0123" in spec.get_string_attribute("ImageDescription")
    file.close()


def test_data_depths_and_compressions(tmp_path, picture, write_store):
    pixels = picture(131, 200, "uint16")
    store = write_store(tmp_path / "a.zarr", [pixels])
    for compression in ("zip", "zips", "piz", "none"):
        out = export(store, tmp_path / f"{compression}.exr", data=True, depth=32, compression=compression, tile=128)
        assert np.array_equal(read_levels(out.path, "float")[0], (pixels / 65535).astype(np.float32))
    half = export(store, tmp_path / "half.exr", data=True)
    assert np.array_equal(read_levels(half.path)[0], (pixels / 65535).astype(np.float16))


def test_openexr_reads_it(store, tmp_path):
    library = pytest.importorskip("OpenEXR")
    with library.File(str(export(store, tmp_path / "a.exr").path)) as file:
        header = file.header()
        assert header["tiles"].mode == library.LevelMode.MIPMAP_LEVELS
        assert header["type"] == library.Storage.tiledimage
        pixels = file.channels()["RGB"].pixels
    assert np.array_equal(pixels, read_levels(tmp_path / "a.exr")[0])


def test_options_are_checked(store, tmp_path, monkeypatch):
    for option, message in (
        ({"depth": 8}, "depth: 8 is unknown; give 16 for half floats or 32 for single"),
        ({"tile": 100}, "tile: 100 is no power of two"),
        ({"compression": "lzw"}, "compression: 'lzw' is unknown; choose one of zip, piz"),
        ({"dpi": 300}, "dpi: does not apply to .exr"),
    ):
        with pytest.raises(UsageError, match=message):
            export(store, tmp_path / "a.exr", **option)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"OpenEXR needs OpenImageIO; pip install 'ourgan-engine\[exr\]'"):
        export(store, tmp_path / "a.exr")
