"""Reading a store: the right pixels, each chunk decoded once, bounded cache, and refusals in one line."""

from pathlib import Path

import numpy as np
import pytest
import zarr

from engine.errors import InputError
from engine.exporters import pyramid as module
from engine.exporters.pyramid import Pyramid
from engine.geometry import Box


@pytest.fixture
def decoded(monkeypatch):
    """Cells in the order in which they were decoded."""
    cells = []
    decode = Pyramid._decode

    def counting(self, level, cell):
        cells.append((level, cell))
        return decode(self, level, cell)

    monkeypatch.setattr(Pyramid, "_decode", counting)
    return cells


def test_every_level_is_read_bit_equal(tmp_path, picture, halvings, write_store, small_cells):
    for dtype, shard in (("uint8", 256), ("uint8", None), ("uint16", 256), ("uint16", None)):
        levels = halvings(picture(300, 401, dtype))
        pyramid = Pyramid(write_store(tmp_path / f"{dtype}-{shard}.zarr", levels, shard=shard))
        assert [level.bounds.shape for level in pyramid.levels] == [pixels.shape[:2] for pixels in levels]
        for index, pixels in enumerate(levels):
            assert np.array_equal(pyramid.band(index, 0, pixels.shape[0]), pixels), (dtype, shard, index)
        assert np.array_equal(pyramid.read(0, Box(100, 120, 290, 401)), levels[0][100:290, 120:401])


def test_overlapping_bands_decode_each_cell_once(store, levels, small_cells, decoded):
    pyramid = Pyramid(store)
    for y in range(0, 511, 40):
        bottom = min(y + 60, 531)
        assert np.array_equal(pyramid.band(0, y, bottom), levels[0][y:bottom])
    assert len(decoded) == len(set(decoded)) == 5 * 9


def test_tiles_on_the_chunk_grid_need_one_cell(store, small_cells, decoded):
    pyramid = Pyramid(store, cache_bytes=0)
    for cell in pyramid.levels[0].cells(pyramid.levels[0].bounds):
        pyramid.read(0, cell)
    assert len(decoded) == 5 * 9
    assert pyramid._cache.currsize <= 128 * 128 * 3


def test_the_cache_keeps_the_latest_cells_within_its_limit(store, small_cells, decoded):
    cells = list(Pyramid(store).levels[0].cells(Box(0, 0, 128, 1024)))
    pyramid = Pyramid(store, cache_bytes=2 * 128 * 128 * 3 + 100)
    for cell in cells[:5]:
        pyramid.read(0, cell)
    assert pyramid._cache.currsize == 2 * 128 * 128 * 3
    decoded.clear()
    for cell in cells[4:2:-1]:
        pyramid.read(0, cell)
    assert decoded == []
    pyramid.read(0, cells[2])
    assert decoded == [(0, cells[2])]


def test_an_incomplete_store_is_refused_with_its_count(tmp_path, levels, write_store):
    store = write_store(tmp_path / "a.zarr", levels, ourgan={"complete": False})
    (store / "0" / "c" / "0" / "1" / "2").unlink()
    with pytest.raises(InputError, match=r"14 of 15 shards of level 0 written; finish it with") as caught:
        Pyramid(store)
    assert str(caught.value).endswith("finish it with resume=True, or give allow_incomplete=True")
    assert caught.value.for_command_line().endswith("finish it with --resume, or give --allow-incomplete")
    assert Pyramid(store, allow_incomplete=True).levels[0].width == 1037


def test_a_lost_shard_of_a_finished_store_is_not_exported_as_black(store):
    (store / "1" / "c" / "0" / "0" / "1").unlink()
    with pytest.raises(InputError, match="damaged, 1 shard of 6 of level 1 missing; repeat the store's engine render"):
        Pyramid(store)
    with pytest.raises(InputError, match=r"1/c/0/0/1: missing shard; run engine check .* --repair"):
        Pyramid(store, allow_incomplete=True).band(1, 0, 256)


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, lambda path: path.symlink_to(path.with_name("0"))])
def test_what_is_no_shard_is_missing(store, make):
    shard = store / "1" / "c" / "0" / "0" / "1"
    shard.unlink()
    make(shard)
    with pytest.raises(InputError, match="1 shard of 6 of level 1 missing"):
        Pyramid(store)


def test_missing_shards_of_an_unfinished_store_are_black(tmp_path, levels, write_store):
    store = write_store(tmp_path / "a.zarr", levels, ourgan={"complete": False})
    (store / "1" / "c" / "0" / "0" / "1").unlink()
    assert not Pyramid(store, allow_incomplete=True).band(1, 0, 256)[:, 256:512].any()


def test_complete_must_be_true_itself(store):
    group = zarr.open_group(store, mode="r+")
    for complete in (None, "true", 1):
        group.attrs["ourgan"] = {"complete": complete}
        with pytest.raises(InputError, match="not finished"):
            Pyramid(store)


def test_an_image_of_other_software(tmp_path, picture, write_store):
    levels = [picture(300, 401), picture(100, 133)]
    pyramid = Pyramid(write_store(tmp_path / "a.zarr", levels, ourgan=None, names="scale{}/image"))
    assert [level.path for level in pyramid.levels] == ["scale0/image", "scale1/image"]
    assert np.array_equal(pyramid.band(1, 0, 100), levels[1])
    assert pyramid.provenance == {}


def test_level_sizes_are_checked(tmp_path, picture, write_store):
    levels = [picture(301, 401), picture(150, 200)]
    with pytest.raises(InputError, match="200 x 150 pixels, 201 x 151 expected"):
        Pyramid(write_store(tmp_path / "ours.zarr", levels))
    with pytest.raises(InputError, match="levels must shrink"):
        Pyramid(write_store(tmp_path / "theirs.zarr", levels[::-1], ourgan=None))


def test_arrays_that_are_no_rgb_image_are_refused(tmp_path, picture, write_store):
    pixels = picture(40, 50)
    for array, message in (
        (pixels[..., :2], r"shape \(2, 40, 50\); only 3 channels"),
        (pixels.astype(np.float32), "dtype float32; all levels must share one of uint8, uint16"),
        (pixels[:0], "at least 1 x 1"),
    ):
        with pytest.raises(InputError, match=message):
            Pyramid(write_store(tmp_path / "a.zarr", [array]))


def test_metadata_that_are_no_rgb_image_are_refused(tmp_path, picture, write_store):
    levels = [picture(40, 50)]
    with pytest.raises(InputError, match="axes t,y,x"):
        Pyramid(write_store(tmp_path / "axes.zarr", levels, axes="tyx"))
    with pytest.raises(InputError, match="0 levels"):
        Pyramid(write_store(tmp_path / "none.zarr", []))
    store = write_store(tmp_path / "lost.zarr", levels)
    (store / "0" / "zarr.json").unlink()
    with pytest.raises(InputError, match="level '0'"):
        Pyramid(store)
    (store / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    with pytest.raises(InputError, match="no OME-Zarr image"):
        Pyramid(store)


def test_other_folders_are_refused(tmp_path):
    refusals = {
        "": "is a folder without an OME-Zarr image; name the folder that engine render wrote",
        "{": "its zarr.json is damaged; copy the store again, whole",
        '{"zarr_format": 3, "node_type": "array"}': "is one level of a store; name the folder above it",
    }
    for content, words in refusals.items():
        if content:
            (tmp_path / "zarr.json").write_text(content)
        with pytest.raises(InputError) as caught:
            Pyramid(tmp_path)
        assert str(caught.value) == f"{tmp_path}: {words}"


def test_chunks_beyond_the_limit_are_refused(store, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_LIMIT", 1000)
    with pytest.raises(InputError, match="one chunk is 49152 bytes, limit 1000; rechunk"):
        Pyramid(store)


def test_a_damaged_chunk_names_its_level(store):
    shard = store / "1" / "c" / "0" / "0" / "0"
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(
        InputError,
        match=r"out.zarr/1/c/0/0/0: damaged shard \(.*, region 0,0,256,256\); run engine check .*out.zarr --repair, then",
    ):
        Pyramid(store).band(1, 0, 10)
