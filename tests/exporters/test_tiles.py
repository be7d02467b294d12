"""Deep Zoom and IIIF, beside those that libvips writes of the same picture."""

import io
import json
import math
import re
import time
import zipfile
from xml.etree import ElementTree

import numpy as np
import pytest
import pyvips
from PIL import Image

from engine.errors import UsageError
from engine.exporters import export
from engine.exporters.view import View
from engine.io.about_picture import about_picture
from engine.io.icc import load_profile


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def decode(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def beside_libvips(levels, folder, **options):
    """Names of the tiles that libvips writes of the same picture, and their sizes."""
    folder.mkdir()
    pyvips.Image.new_from_array(levels[0]).dzsave(str(folder / "a"), suffix=".png", overlap=0, **options)
    return {name: decode(data).shape for name, data in files(folder).items() if name.endswith(".png")}


@pytest.mark.parametrize("tile", [128, 200])
def test_deep_zoom(store, levels, tmp_path, tile):
    out = tmp_path / "out"
    result = export(store, out / "a.dzi", tiles="png", tile=tile)
    found = files(out)
    root = ElementTree.fromstring(found.pop("a.dzi"))
    assert root.attrib == {"Format": "png", "Overlap": "0", "TileSize": str(tile)}
    assert root[0].attrib == {"Width": "1037", "Height": "531"}
    assert {n: decode(d).shape for n, d in found.items()} == beside_libvips(levels, tmp_path / "vips", tile_size=tile)
    assert result.levels == 12
    for name, data in found.items():
        level, column, row = map(int, re.findall(r"\d+", name))
        if level > 7:  # down to the last level of the store
            y, x = row * tile, column * tile
            assert np.array_equal(decode(data), levels[11 - level][y : y + tile, x : x + tile]), name


def test_deep_zoom_in_an_archive(store, tmp_path):
    folder = tmp_path / "out"
    export(store, folder / "a.dzi")
    for name in ("a.dzi.zip", "b.zip"):
        archive = export(store, tmp_path / name, format="dzi.zip").path
        with zipfile.ZipFile(archive) as file:
            assert file.testzip() is None
            assert {info.compress_type for info in file.infolist()} == {zipfile.ZIP_STORED}
            stem = name[0]
            assert {n: file.read(n) for n in file.namelist()} == {
                n.replace("a_files", f"{stem}_files").replace("a.dzi", f"{stem}.dzi"): d
                for n, d in files(folder).items()
            }
    again = export(store, tmp_path / "again" / "a.dzi.zip").path
    assert again.read_bytes() == (tmp_path / "a.dzi.zip").read_bytes()


def test_one_thread_more_than_there_are_workers_reads(store, tmp_path, monkeypatch):
    """The peak of memory then depends little on chance."""
    read, reading, most = View.read, [], []

    def slowly(view, level, box):
        reading.append(box)
        most.append(len(reading))
        time.sleep(0.02)
        reading.pop()
        return read(view, level, box)

    monkeypatch.setattr(View, "read", slowly)
    export(store, tmp_path / "a.dzi", tile=64, workers=2)
    assert max(most) == 3


def test_iiif(store, levels, tmp_path):
    result = export(store, tmp_path / "a.iiif", tiles="png", tile=128, url="https://example.org/pictures/")
    found = files(tmp_path / "a.iiif")
    info = json.loads(found.pop("info.json"))
    assert info["id"] == "https://example.org/pictures/a.iiif"
    assert (info["width"], info["height"], info["profile"], info["type"]) == (1037, 531, "level0", "ImageService3")
    assert info["tiles"] == [{"width": 128, "scaleFactors": [1, 2, 4, 8, 16]}]
    assert info["sizes"] == [{"width": 65, "height": 34}]
    assert result.notes == ()
    expected = beside_libvips(levels, tmp_path / "vips", layout="iiif3", tile_size=128)
    assert {f"a/{n}": decode(d).shape for n, d in found.items()} == expected
    for name, data in found.items():
        region = name.split("/")[0]
        x, y, w, h = (0, 0, 1037, 531) if region == "full" else map(int, region.split(","))
        shape = decode(data).shape
        index = round(math.log2(max(h / shape[0], w / shape[1])))
        scale, level = 2**index, levels[index]
        assert np.array_equal(decode(data), level[y // scale :, x // scale :][: -(-h // scale), : -(-w // scale)]), name
    assert "localhost:8000" in export(store, tmp_path / "b.iiif").notes[0]


def test_lossy_tiles(store, levels, tmp_path):
    sizes = []
    for tiles, quality in (("jpg", 95), ("jpg", 50), ("webp", 80)):
        result = export(store, tmp_path / f"{tiles}-{quality}.dzi", tiles=tiles, quality=quality)
        pixels = decode((tmp_path / f"{tiles}-{quality}_files/11/0_0.{tiles}").read_bytes()).astype(int)
        assert np.abs(pixels - levels[0][:512, :512]).mean() < 4
        sizes.append(result.bytes)
    assert sizes[0] > sizes[1]


def test_sixteen_bits_and_regions(tmp_path, picture, halvings, write_store):
    levels = halvings(picture(300, 401, "uint16"))
    store = write_store(tmp_path / "a.zarr", levels)
    export(store, tmp_path / "a.dzi", tiles="png", roi=(3, 5, 200, 100), overwrite=False)
    assert np.array_equal(decode((tmp_path / "a_files/8/0_0.png").read_bytes()), np.rint(levels[0][5:105, 3:203] / 257))


def test_options_are_checked(store, tmp_path):
    for name, option, message in (
        ("a.dzi", {"tiles": "gif"}, "tiles: 'gif' is unknown; choose one of jpg, png, webp"),
        ("a.dzi", {"tiles": "png", "quality": 80}, "quality: png is lossless"),
        ("a.dzi", {"url": "https://example.org"}, "url: does not apply to .dzi"),
        ("a.dzi", {"dpi": 300}, "dpi: does not apply to .dzi"),
        ("a.iiif", {"url": "pictures"}, "url: 'pictures' is no address"),
        ("a.iiif", {"tiles": "webp"}, "tiles: webp is no format of every IIIF viewer"),
        ("a.iiif", {"tile": 8}, "tile: 8 is out of range; give 64 to 4096"),
    ):
        with pytest.raises(UsageError, match=message):
            export(store, tmp_path / name, **option)
    assert [path.name for path in tmp_path.iterdir()] == ["out.zarr"]


def test_deep_grey_with_alpha_and_a_profile(write_store, picture, tmp_path):
    """Tiles of 8 bits keep transparency, and carry the profile of the store; OpenEXR keeps such values as data alone."""
    pixels = picture(200, 300, "uint16")[..., :2]
    adobe = load_profile("adobe-rgb")
    ourgan = {"complete": True, "plan": {"channels": 2, "depth": 16}} | about_picture(adobe, None)
    store = write_store(tmp_path / "out.zarr", [pixels], ourgan=ourgan)
    export(store, tmp_path / "a.dzi")
    tile = Image.open(tmp_path / "a_files" / "9" / "0_0.png")
    assert (tile.mode, tile.info["icc_profile"]) == ("LA", adobe)
    assert np.abs(np.asarray(tile) - pixels / 257.0).max() <= 0.51
    with pytest.raises(UsageError, match="^tiles: webp holds no grey, whose profile"):
        export(store, tmp_path / "b.dzi", tiles="webp")
    pytest.importorskip("OpenImageIO")
    with pytest.raises(UsageError, match="^.exr: colours of another profile than sRGB"):
        export(store, tmp_path / "a.exr")
    export(store, tmp_path / "a.exr", data=True)
