"""Flat pictures, read back by Pillow and imagecodecs."""

import io

import imagecodecs
import numpy as np
import pytest
import pyvips
import tifffile
from PIL import Image

from engine.errors import EngineError, UsageError
from engine.exporters import export, flat, preview
from engine.exporters.pyramid import Level, Pyramid
from engine.exporters.reduced import reduced, target_size
from engine.exporters.stream import LevelStream
from engine.exporters.view import View


def load(path):
    with Image.open(path) as image:
        image.load()
        return np.asarray(image), image.info


def test_png_is_bit_equal_and_tagged(store, levels, tmp_path):
    export(store, tmp_path / "a.png", dpi=150)
    pixels, info = load(tmp_path / "a.png")
    assert np.array_equal(pixels, levels[0])
    assert info["icc_profile"][36:40] == b"acsp"
    assert info["dpi"] == pytest.approx((150, 150), abs=0.1)


def test_lossy_formats_are_close_and_tagged(store, levels, tmp_path):
    for suffix in (".jpg", ".JPEG", ".webp"):
        result = export(store, tmp_path / f"a{suffix}", quality=95)
        pixels, info = load(result.path)
        assert (result.width, result.height, result.levels) == (1037, 531, 1)
        assert np.abs(pixels.astype(int) - levels[0]).mean() < 3, suffix
        assert info["icc_profile"][36:40] == b"acsp"


@pytest.mark.parametrize("quality", [80, 95])
@pytest.mark.parametrize("channels", [1, 3])
def test_strips_are_joined_as_if_they_were_one_picture(
    tmp_path, picture, write_store, small_cells, monkeypatch, quality, channels
):
    """Every decoder gives the pixels of libjpeg's file of the whole picture, with chroma halved or not."""
    monkeypatch.setattr(flat, "STRIP_BYTES", 10_000)
    pixels = picture(301, 217)[..., :channels]
    ourgan = {"complete": True, "plan": {"channels": channels, "depth": 8}}
    out = export(write_store(tmp_path / "a.zarr", [pixels], ourgan=ourgan), tmp_path / "a.jpg", quality=quality).path
    whole = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(whole, "JPEG", quality=quality, subsampling=0 if quality > 90 else 2)
    expected = load(whole)[0]
    assert out.read_bytes().count(b"\xff\xd3") >= 1  # restart markers
    assert np.array_equal(load(out)[0], expected)
    assert np.array_equal(pyvips.Image.new_from_file(str(out)).numpy().squeeze(), expected)
    assert np.array_equal(imagecodecs.jpeg8_decode(out.read_bytes()), expected)


def test_quality_sets_the_size(store, tmp_path):
    sizes = [export(store, tmp_path / f"{quality}.jpg", quality=quality).bytes for quality in (30, 60, 95)]
    assert sizes == sorted(sizes)


def test_sixteen_bits(tmp_path, picture, write_store, monkeypatch):
    monkeypatch.setattr(flat, "STRIP_BYTES", 10_000)
    pixels = picture(90, 131, "uint16")
    store = write_store(tmp_path / "a.zarr", [pixels])
    export(store, tmp_path / "a.png")
    assert np.array_equal(imagecodecs.png_decode((tmp_path / "a.png").read_bytes()), pixels)
    export(store, tmp_path / "small.png", max_size=50)
    assert imagecodecs.png_decode((tmp_path / "small.png").read_bytes()).dtype == np.uint16
    export(store, tmp_path / "a.jpg", quality=100)
    assert np.abs(load(tmp_path / "a.jpg")[0].astype(int) - (pixels >> 8)).mean() < 2


def test_sizes_come_from_the_smallest_sufficient_level(store, levels, tmp_path):
    result = export(store, tmp_path / "a.png", max_size=519)
    assert (result.width, result.height) == (519, 266)
    assert np.array_equal(load(result.path)[0], levels[1])
    view = reduced(View(Pyramid(store), folder=tmp_path), None, 300)
    assert (view._source, view.width, view.height) == (1, 300, 154)
    pixels = load(export(store, tmp_path / "b.png", max_size=300).path)[0]
    expected = np.asarray(Image.fromarray(levels[1]).resize((300, 154), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(pixels - expected).mean() < 2


def test_target_size():
    full = Level("0", 3000, 100_000, (512, 512))
    for max_size, expected in ((None, (100_000, 3000)), (200_000, (100_000, 3000)), (1000, (1000, 30)), (10, (10, 1))):
        assert target_size(full, max_size) == expected


def test_pictures_beyond_their_format_are_refused(tmp_path, write_store):
    for name, limit in (("a.jpg", 65535), ("a.webp", 16383)):
        wide = np.zeros((2, limit + 1, 3), np.uint8)
        store = write_store(tmp_path / f"{limit}.zarr", [wide, wide[::2, ::2]], shard=None, chunk=512)
        with pytest.raises(UsageError, match=f"{limit + 1} x 2 pixels exceed .* give max_size={limit}") as caught:
            export(store, tmp_path / name)
        assert f"give --max-size {limit}, or" in caught.value.for_command_line()
        assert export(store, tmp_path / name, max_size=1000).width == 1000
        assert export(store, tmp_path / f"{limit}.png").width == limit + 1


def test_a_format_that_this_libvips_lacks(store, tmp_path, monkeypatch):
    monkeypatch.setattr(pyvips, "type_find", lambda base, name: 0)
    with pytest.raises(UsageError, match="writes no WebP"):
        export(store, tmp_path / "a.webp")


def test_options_are_checked(store, tmp_path):
    for option in ({"max_size": 0}, {"quality": 101}, {"tile": 512}, {"compression": "none"}):
        with pytest.raises(UsageError, match=f"^{next(iter(option))}: "):
            export(store, tmp_path / "a.jpg", **option)
    with pytest.raises(UsageError, match=r"^quality: does not apply to \.png; its options are dpi"):
        export(store, tmp_path / "a.png", quality=90)


def test_a_failure_of_libvips_is_one_line(store, tmp_path):
    job = preview.prepare(View(Pyramid(store), folder=tmp_path), ".webp", {})
    with pytest.raises(EngineError, match="libvips could not write it") as caught:
        job.write(tmp_path / "missing" / "a.webp", lambda done, total: None)
    assert "\n" not in str(caught.value)


def test_the_stream_is_a_tiff(tmp_path, picture, write_store):
    for dtype in ("uint8", "uint16"):
        pixels = picture(133, 57, dtype)
        pyramid = Pyramid(write_store(tmp_path / f"{dtype}.zarr", [pixels]))
        rows = LevelStream(View(pyramid, folder=tmp_path), 0, lambda rows: None)
        content = b"".join(iter(lambda rows=rows: rows.read(1000) or b"", b""))
        assert rows.seek(0, 2) == len(content)
        assert np.array_equal(tifffile.imread(io.BytesIO(content)), pixels)
        rows.close()


@pytest.mark.parametrize("roi", [None, (3, 5, 900, 500)])
def test_strips_cross_the_borders_of_bands(store, levels, tmp_path, small_cells, monkeypatch, roi):
    monkeypatch.setattr(flat, "STRIP_BYTES", 100_000)
    export(store, tmp_path / "a.png", roi=roi)
    expected = levels[0] if roi is None else levels[0][5:505, 3:903]
    assert np.array_equal(load(tmp_path / "a.png")[0], expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "out.zarr"]


def test_the_stream_ends_at_an_error_and_keeps_it(store, tmp_path, broken_reads):
    stream = LevelStream(View(Pyramid(store), folder=tmp_path), 0, lambda rows: None)
    assert stream.read(10)
    stream.seek(-1, 2)
    assert stream.read(1) is not None  # the first read of the pyramid
    stream.seek(5000, 0)
    assert stream.read(1) is None
    assert stream.read(1) is None
    with pytest.raises(EngineError, match="injected"):
        stream.check()
    stream.close()
