"""TIFF, read back by tifffile, OpenSlide and libvips."""

import importlib.util
import json
import struct
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import openslide
import pytest
import pyvips
import tifffile

from engine.errors import UsageError
from engine.exporters import about, export, tiff
from engine.exporters.pyramid import Pyramid
from engine.exporters.view import View


def read_levels(path):
    with tifffile.TiffFile(path) as file:
        return [level.asarray() for level in file.series[0].levels]


def assert_levels(path, levels):
    for page, expected in zip(read_levels(path), levels, strict=True):
        assert np.array_equal(page, expected)


def test_lossless_levels_are_bit_equal(store, levels, tmp_path):
    for compression, tile in (("deflate", 128), ("deflate", 192), ("none", 128), ("none", 192)):
        result = export(store, tmp_path / f"{compression}-{tile}.tif", compression=compression, tile=tile)
        assert_levels(result.path, levels[: result.levels])
        assert max(levels[result.levels - 1].shape) <= tile < max(levels[result.levels - 2].shape)


def test_sixteen_bits(tmp_path, picture, halvings, write_store):
    levels = halvings(picture(200, 301, "uint16"))
    store = write_store(tmp_path / "a.zarr", levels)
    assert_levels(export(store, tmp_path / "a.tif", tile=64).path, levels)
    with pytest.raises(UsageError, match="holds 8 bits and no alpha, the image is 16-bit RGB"):
        export(store, tmp_path / "b.tif", compression="jpeg")


def test_openslide_reads_every_level(store, levels, tmp_path):
    export(store, tmp_path / "a.tif", tile=128)
    with openslide.OpenSlide(tmp_path / "a.tif") as slide:
        assert slide.level_dimensions == tuple((pixels.shape[1], pixels.shape[0]) for pixels in levels)
        for index, pixels in enumerate(levels):
            region = np.asarray(slide.read_region((0, 0), index, slide.level_dimensions[index]))
            assert np.array_equal(region[..., :3], pixels)
            assert region[..., 3].min() == 255
        assert slide.properties["tiff.XResolution"] == "300"


def test_libvips_reads_every_page(store, levels, tmp_path):
    export(store, tmp_path / "a.tif", tile=128)
    for page, pixels in enumerate(levels):
        image = pyvips.Image.new_from_file(str(tmp_path / "a.tif"), page=page)
        assert np.array_equal(image.numpy(), pixels)


def test_tags(store, levels, tmp_path):
    export(store, tmp_path / "a.tif", tile=128, dpi=600)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        first, second = file.pages[0], file.pages[1]
        about = json.loads(first.description)
        assert first.software.startswith("ourgan-engine")
        assert about.pop("software") == first.software
        assert about == {"seed": 7, "model_digest": "sha256:0123", "licences": ["CC0-1.0"]}
        assert [page.subfiletype for page in file.pages] == [0] + [1] * (len(levels) - 1)
        assert first.predictor == tifffile.PREDICTOR.HORIZONTAL
        assert all(page.tags["InterColorProfile"].value[36:40] == b"acsp" for page in file.pages)
        assert first.get_resolution("inch") == (600, 600)
        # The same paper size on every page.
        assert second.get_resolution("inch") == pytest.approx((600 * 519 / 1037, 600 * 266 / 531))


def test_jpeg_is_close_and_its_border_clean(store, levels, tmp_path):
    export(store, tmp_path / "a.tif", compression="jpeg", tile=128, quality=95)
    for page, pixels in zip(read_levels(tmp_path / "a.tif"), levels, strict=True):
        error = np.abs(page.astype(int) - pixels)
        assert error.mean() < 3
        # Tiles padded with black would ring here: the last row lies 3 rows inside an 8-pixel block.
        assert error[-1].mean() < 3
    small = export(store, tmp_path / "b.tif", compression="jpeg", quality=50)
    with tifffile.TiffFile(tmp_path / "a.tif") as fine, tifffile.TiffFile(small.path) as coarse:
        assert fine.pages[0].tags["YCbCrSubSampling"].value == (1, 1)
        assert coarse.pages[0].tags["YCbCrSubSampling"].value == (2, 2)
    with openslide.OpenSlide(tmp_path / "a.tif") as slide:
        region = np.asarray(slide.read_region((0, 0), 1, (519, 266)))[..., :3].astype(int)
        assert np.abs(region - levels[1]).mean() < 2


def test_jpeg_without_imagecodecs_names_the_package(store, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="^compression: jpeg needs imagecodecs; pip install"):
        export(store, tmp_path / "a.tif", compression="jpeg")


def test_deflate_without_imagecodecs(store, levels, tmp_path):
    code = (
        "import sys; from pathlib import Path; sys.modules['imagecodecs'] = None\n"
        "from engine.exporters import export; export(Path(sys.argv[1]), Path(sys.argv[2]), tile=128)"
    )
    subprocess.run([sys.executable, "-c", code, store, tmp_path / "a.tif"], check=True)
    assert_levels(tmp_path / "a.tif", levels)


def test_bigtiff_on_demand(store, levels, tmp_path):
    big = export(store, tmp_path / "big.tif", tile=128, bigtiff=True)
    classic = export(store, tmp_path / "classic.tif", tile=128)
    assert big.path.read_bytes()[:4] == b"II\x2b\0"
    assert "print software" in big.notes[0]
    assert classic.path.read_bytes()[:4] == b"II\x2a\0"
    assert classic.notes == ()
    assert_levels(big.path, levels)


def test_bigtiff_is_chosen_at_the_limit():
    limit = 4_294_967_296 - 33_554_432
    assert not tiff.needs_bigtiff(limit)
    assert tiff.needs_bigtiff(limit + 1)


def test_raw_size_counts_whole_tiles_of_every_level(store, tmp_path):
    job = tiff.prepare(View(Pyramid(store), folder=tmp_path), ".tif", {"tile": 256})
    tiles = 5 * 3 + 3 * 2 + 2 * 1 + 1
    assert len(job.view.levels) == 4
    assert job.raw == tiles * 256 * 256 * 3


def test_a_classic_tiff_too_small_for_the_pixels_is_refused(store, tmp_path, monkeypatch):
    monkeypatch.setattr(tiff, "CLASSIC_LIMIT", 2_000_000)
    with pytest.raises(UsageError, match=r"exceed classic TIFF \(2000000\); leave bigtiff unset"):
        export(store, tmp_path / "a.tif", compression="none", bigtiff=False)


def test_ome_tiff(store, levels, tmp_path):
    """Also: the same store gives the same bytes."""
    paths = [export(store, tmp_path / name, tile=128).path for name in ("a.ome.tif", "b.OME.tiff")]
    with tifffile.TiffFile(paths[0]) as file:
        assert file.is_ome
        assert len(file.pages) == 1
        assert 'SizeX="1037"' in file.ome_metadata
        assert "sha256:0123" in file.ome_metadata
    assert_levels(paths[0], levels)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    for index, pixels in enumerate(levels):  # libtiff, which knows nothing of OME
        image = pyvips.Image.new_from_file(str(paths[0]), subifd=index - 1)
        assert np.array_equal(image.numpy(), pixels)
        assert image.get("icc-profile-data")[36:40] == b"acsp"
        assert image.xres * 25.4 == pytest.approx(300 * pixels.shape[1] / 1037)


def test_one_level_is_enough(tmp_path, picture, write_store):
    pixels = picture(5, 3)
    store = write_store(tmp_path / "a.zarr", [pixels], ourgan=None)
    for name in ("a.tif", "a.ome.tif"):
        assert_levels(export(store, tmp_path / name).path, [pixels])


def test_provenance_is_ascii():
    assert about.description({"seed": 1, "licences": ["Größe"]}).isascii()
    assert "seed" not in about.description({})


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (96, 128), (77, 1024), (1024, 77)])
def test_small_images_open_in_libvips(tmp_path, picture, write_store, shape):
    """It refuses tiles that are several times as large as the image."""
    pixels = picture(*shape)
    store = write_store(tmp_path / "a.zarr", [pixels], ourgan=None)
    for name in ("a.tif", "a.ome.tif"):
        image = pyvips.Image.new_from_file(str(export(store, tmp_path / name).path))
        assert np.array_equal(image.numpy(), pixels)


def test_options_are_checked(store, tmp_path):
    for option, message in (
        ({"compression": "zip"}, "compression: 'zip' is unknown; choose one of deflate, lzw, jpeg, none"),
        ({"quality": 0}, "quality: 0 is out of range; give 1 to 100"),
        ({"tile": 100}, "tile: 100 is no multiple of 16"),
        ({"tile": 8192}, "tile: 8192 is out of range; give 64 to 4096"),
        ({"dpi": -1}, "dpi: -1 is out of range"),
        ({"workers": 0}, "workers: 0 is out of range"),
        ({"quality": 90}, "quality: deflate is lossless; give compression='jpeg'"),
        ({"url": "https://example.org"}, "url: does not apply to .tif; its options are preset, compression, quality"),
    ):
        with pytest.raises(UsageError, match=f"^{message}") as caught:
            export(store, tmp_path / "a.tif", **option)
        assert caught.value.for_command_line().startswith(f"--{next(iter(option)).replace('_', '-')}: ")
        assert [path.name for path in tmp_path.iterdir()] == ["out.zarr"]


def test_levels_end_at_the_first_that_fits_a_tile():
    sizes = [(90, 2000), (45, 1000), (23, 500), (12, 250)]
    pyramid = SimpleNamespace(levels=[SimpleNamespace(height=height, width=width) for height, width in sizes])
    assert tiff.count_levels(pyramid, 512) == 3
    assert tiff.count_levels(pyramid, 500) == 3
    assert tiff.count_levels(pyramid, 4096) == 1
    assert tiff.count_levels(pyramid, 64) == 4


def test_a_classic_file_that_outgrows_its_offsets_is_refused(store, tmp_path, monkeypatch):
    def outgrow(*args, **kwargs):
        raise struct.error("'I' format requires 0 <= number <= 4294967295")

    monkeypatch.setattr(tifffile.TiffWriter, "write", outgrow)
    with pytest.raises(UsageError, match="passes 4294967296 bytes, the limit of classic TIFF; give bigtiff=True"):
        export(store, tmp_path / "a.tif", bigtiff=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out.zarr"]


def test_presets(store, levels, tmp_path):
    web = export(store, tmp_path / "web.tif", preset="web", tile=128)
    lossless = export(store, tmp_path / "print.tif", preset="print", compression="lzw", width_mm=200, tile=128)
    assert_levels(lossless.path, levels)
    with tifffile.TiffFile(web.path) as coarse, tifffile.TiffFile(lossless.path) as fine:
        assert coarse.pages[0].compression == tifffile.COMPRESSION.JPEG
        assert fine.pages[0].compression == tifffile.COMPRESSION.LZW
        assert fine.pages[0].get_resolution("inch")[0] == pytest.approx(1037 * 25.4 / 200)
    assert web.bytes < lossless.bytes / 3
    assert np.array_equal(pyvips.Image.new_from_file(str(lossless.path)).numpy(), levels[0])
    for option, message in (
        ({"preset": "poster"}, "preset: 'poster' is unknown; choose one of print, web"),
        ({"dpi": 300, "width_mm": 100}, "dpi and width_mm: exclude each other"),
        ({"depth": 12}, "depth: 12 is unknown; give 8 or 16"),
    ):
        with pytest.raises(UsageError, match=message):
            export(store, tmp_path / "a.tif", **option)


def test_depths(tmp_path, picture, halvings, write_store):
    levels = halvings(picture(200, 301, "uint16"))
    fine = write_store(tmp_path / "16.zarr", levels)
    coarse = write_store(tmp_path / "8.zarr", [pixels.astype(np.uint8) for pixels in levels])
    assert_levels(export(fine, tmp_path / "8.tif", tile=64, depth=8).path, [np.rint(p / 257) for p in levels])
    assert_levels(
        export(coarse, tmp_path / "16.tif", tile=64, depth=16).path, [p.astype(np.uint8) * 257.0 for p in levels]
    )
    assert export(fine, tmp_path / "jpeg.tif", compression="jpeg", depth=8).bytes > 0
