"""The tile cache: never above its limit, nothing lost, and what is on disk is whole."""

import numpy as np
import pytest

from engine.geometry import Box, Grid
from engine.run.tile_cache import Scratch, TileCache

GRID = Grid(50, 70, 20)
TILE_BYTES = 3 * 20 * 20 * 4


def tile_of(index, dtype=np.float32):
    box = GRID.box(*index)
    y, x = np.mgrid[box.y0 : box.y1, box.x0 : box.x1]
    return np.stack([y, x, y * x % 251]).astype(dtype)


@pytest.fixture
def scratch(tmp_path):
    return Scratch(tmp_path / "scratch" / "1", GRID, np.float32)


def fill(cache):
    for index in GRID.indices():
        assert index not in cache
        cache.put(index, tile_of(index))


@pytest.mark.parametrize("limit", [0, 1, TILE_BYTES, 3 * TILE_BYTES, 1 << 30])
def test_every_tile_can_be_read_whatever_the_limit(scratch, limit):
    cache = TileCache(limit, scratch)
    fill(cache)
    for index in GRID.indices():
        assert index in cache
        box = GRID.box(*index)
        np.testing.assert_array_equal(cache.read(index, box, box), tile_of(index))


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_parts_of_tiles(scratch, limit):
    """Boxes in pixels of the level, from memory and from disk, where they need not be chunks."""
    cache = TileCache(limit, scratch)
    fill(cache)
    rng = np.random.default_rng(0)
    for index in GRID.indices():
        origin = GRID.box(*index)
        for _ in range(5):
            y, x = (sorted(int(v) for v in rng.choice(n + 1, 2, replace=False)) for n in origin.shape)
            part = Box(y[0], x[0], y[1], x[1]).shift(origin.y0, origin.x0)
            rows, columns = part.relative_to(origin).slices
            np.testing.assert_array_equal(cache.read(index, part, origin), tile_of(index)[:, rows, columns])


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_memory_holds_as_many_tiles_as_the_limit_allows_and_disk_the_rest(scratch, count):
    cache = TileCache(count * TILE_BYTES, scratch)
    indices = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]  # whole tiles, all of one size
    for index in indices:
        cache.put(index, tile_of(index))
    spilled = [index for index in indices if index in scratch]
    assert spilled == indices[: len(indices) - count]


def test_the_least_recently_used_tile_is_spilled(scratch):
    cache = TileCache(2 * TILE_BYTES, scratch)
    for index in ((0, 0), (0, 1)):
        cache.put(index, tile_of(index))
    cache.read((0, 0), GRID.box(0, 0), GRID.box(0, 0))
    cache.put((0, 2), tile_of((0, 2)))
    assert (0, 1) in scratch
    assert (0, 0) not in scratch


def test_nothing_is_made_on_disk_before_it_is_needed(scratch, tmp_path):
    cache = TileCache(1 << 30, scratch)
    fill(cache)
    assert list(tmp_path.iterdir()) == []


def test_another_process_finds_the_spilled_tiles(tmp_path, scratch):
    fill(TileCache(0, scratch))
    again = TileCache(0, Scratch(tmp_path / "scratch" / "1", GRID, np.float32))
    for index in GRID.indices():
        assert index in again
        np.testing.assert_array_equal(again.read(index, GRID.box(*index), GRID.box(*index)), tile_of(index))


def test_a_black_tile_is_there_once_it_was_written(scratch):
    scratch.write((1, 1), np.zeros((3, 20, 20), np.float32))
    assert (1, 1) in scratch
    assert not scratch.read(GRID.box(1, 1)).any()


def test_a_half_written_tile_is_not_there(tmp_path, scratch):
    """Killed while spilling: zarr writes to a temporary name first."""
    scratch.write((0, 0), tile_of((0, 0)))
    folder = tmp_path / "scratch" / "1" / "c" / "0" / "0"
    (folder / "1.0123.partial").write_bytes(b"half a tile")
    again = Scratch(tmp_path / "scratch" / "1", GRID, np.float32)
    assert (0, 0) in again
    assert (0, 1) not in again


@pytest.mark.timeout(20)
@pytest.mark.parametrize("cell", [4, 7, 256, 257, 263, 300, 512, 1000, 2084])
def test_any_tile_size_can_be_spilled(tmp_path, cell):
    """Prime ones, too, within moments: as a million chunks of a pixel each, a tile takes a minute."""
    grid = Grid(cell + 3, cell, cell)
    scratch = Scratch(tmp_path / "scratch", grid, np.uint8)
    tile = np.random.default_rng(0).integers(0, 256, (3, cell, cell)).astype(np.uint8)
    scratch.write((0, 0), tile)
    scratch.write((1, 0), tile[:, :3])
    np.testing.assert_array_equal(scratch.read(grid.box(0, 0)), tile)
    np.testing.assert_array_equal(scratch.read(Box(cell - 1, 0, cell + 2, cell)), tile[:, [cell - 1, 0, 1]])
    assert scratch.read(grid.box(0, 0)).dtype == np.uint8


def test_what_was_read_may_be_handed_to_torch(scratch):
    """A read-only array makes torch warn, and a warning here is an error."""
    import torch

    cache = TileCache(0, scratch)
    cache.put((0, 0), tile_of((0, 0)))
    torch.from_numpy(cache.read((0, 0), Box(3, 3, 9, 9), GRID.box(0, 0)))
