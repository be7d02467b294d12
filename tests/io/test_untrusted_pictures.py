"""Hostile pictures: opening one takes little memory, no temporary file, and no word of its name for an option."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import pyvips
from support.sandbox import run

from engine.errors import InputError
from engine.geometry import Box
from engine.io.photo import PictureSource, open_photo, resampled_photo
from engine.io.picture_file import open_header
from engine.measure import _free_disk

SIDE = 6_000
"""Side of a picture that libvips decodes through a temporary file: 108 MB."""


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(path, width, height, interlaced=0):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, interlaced)
    rows = zlib.compress(bytes(1 << 16))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    path = tmp_path_factory.mktemp("large") / "large.png"
    pyvips.Image.black(SIDE, SIDE, bands=3).linear(1, 60, uchar=True).copy(interpretation="srgb").pngsave(str(path))
    return path


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def held(folder):
    """Bytes of the files in a folder that this process holds; libvips unlinks its files at once."""
    links = list(Path("/proc/self/fd").iterdir())
    return sum(p.stat().st_size for p in links if p.exists() and str(p.readlink()).startswith(str(folder)))


def test_a_large_picture_is_decoded_when_it_is_read(large, temporary):
    source = PictureSource(large)
    assert source.size == (SIDE, SIDE)
    assert source.temporary == 3 * SIDE**2
    assert source.sample(512).shape == (3, 512, 512)
    assert held(temporary) == 0
    assert float(source.read(Box(SIDE - 1, 0, SIDE, 1))[0]) == np.float32(60 / 255)
    assert held(temporary) >= source.temporary


def test_a_temporary_file_counts_as_disk(large, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    source = PictureSource(large)
    lower, free = _free_disk(tmp_path / "o.zarr", source), _free_disk(tmp_path / "o.zarr", None)
    assert free - lower == pytest.approx(source.temporary, abs=64 << 20)  # others write to the disk too


@pytest.mark.parametrize(
    ("name", "options", "memory", "temporary"),
    [
        ("a.png", {}, 1, 0),
        ("a.png", {"interlace": True}, 3, 0),
        ("a.jpg", {}, 1, 0),
        ("a.jpg", {"interlace": True}, 4, 0),
        ("a.webp", {}, 4, 0),
        ("a.tif", {}, 1, 0),
        ("a.tif", {"tile": True}, 0, 0),
    ],
)
def test_memory_of_decoding(tmp_path, name, options, memory, temporary):
    """In multiples of the decoded picture."""
    image = pyvips.Image.black(300, 200, bands=3).copy(interpretation="srgb")
    image.write_to_file(str(tmp_path / name), **options)
    header = open_header(tmp_path / name)
    assert (header.memory, header.temporary) == (memory * 300 * 200 * 3, temporary)


def test_pictures_that_claim_too_much(tmp_path, model_file):
    """Headers without pixels behind them: they are refused, and nothing takes their size."""
    png(tmp_path / "wide.png", 10**7, 10**7)
    png(tmp_path / "bomb.png", 10**5, 10**5)
    png(tmp_path / "interlaced.png", 10**5, 10**5, interlaced=1)
    (tmp_path / "hole.ppm").write_bytes(b"P6 100000 100000 255\n")
    names = ["wide.png", "bomb.png", "interlaced.png", "hole.ppm"]
    results = run(
        [["plan", model_file, "--init", tmp_path / name, "--size", "64x64", "--memory", "1GiB"] for name in names],
        tmp_path,
    )
    for result in results:
        assert result.code in (2, 3, 4), result
        assert result.problem == "", result
        assert result.seconds < 10, result
        assert result.peak < 1 << 30, result


def test_brackets_in_a_name_are_no_options(tmp_path):
    image = pyvips.Image.black(40, 30, bands=3).copy(interpretation="srgb")
    image.pngsave(str(tmp_path / "a.png"))
    odd = tmp_path / "a.png[shrink=2]"
    (tmp_path / "a.png").rename(odd)
    assert PictureSource(odd).size == (30, 40)
    assert resampled_photo(open_photo(odd, 1), (15, 20)).shape == (15, 20, 3)
    image.jpegsave(str(tmp_path / "a.jpg"))
    with pytest.raises(InputError, match="no such picture"):
        PictureSource(tmp_path / "a.jpg[shrink=2]")
