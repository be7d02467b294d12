"""The tile cache: never above its limit, no tile lost, and whole tiles on disk."""

import numpy as np
import pytest
import torch

from engine.errors import InputError
from engine.geometry import Box, Grid
from engine.run.tile_cache import Scratch, TileCache

GRID = Grid(50, 100, (20, 30))
TILE_BYTES = 3 * 20 * 30 * 4


def tile_of(index, dtype=np.float32):
    box = GRID.box(*index)
    y, x = np.mgrid[box.y0 : box.y1, box.x0 : box.x1]
    return np.stack([y, x, y * x % 251]).astype(dtype)


@pytest.fixture
def new_scratch(tmp_path):
    """Function ``new_scratch(name)`` -> a scratch array in a folder of that name."""
    return lambda name: Scratch(tmp_path / str(name), GRID, np.float32)


def filled(limit, scratch):
    cache = TileCache(limit, scratch)
    for index in GRID.indices():
        assert index not in cache
        cache.put(index, tile_of(index))
    return cache


def test_processes_find_each_others_tiles(new_scratch):
    """Each has a cache of its own over one folder, also where both make the array."""
    first, second = (TileCache(1 << 30, new_scratch("shared"), shared=True) for _ in range(2))
    alone = TileCache(1 << 30, new_scratch("shared"))
    for index in GRID.indices():
        assert index not in second
        first.put(index, tile_of(index))
        assert index in second
        assert index in alone
    second.put((0, 0), tile_of((0, 0)))
    for cache in (second, alone):
        np.testing.assert_array_equal(cache.read((2, 3), GRID.box(2, 3), GRID.box(2, 3)), tile_of((2, 3)))
    late = [TileCache(1 << 30, new_scratch("late"), shared=True) for _ in range(2)]
    for cache in late:
        cache.put((0, 0), tile_of((0, 0)))  # the second one finds an array that it did not see
    np.testing.assert_array_equal(late[1].read((0, 0), GRID.box(0, 0), GRID.box(0, 0)), tile_of((0, 0)))


def test_every_tile_and_part_can_be_read(new_scratch):
    """From memory and from disk, where parts need not be chunks."""
    chance = np.random.default_rng(0)
    for limit in (0, 1, TILE_BYTES, 3 * TILE_BYTES, 1 << 30):
        cache = filled(limit, new_scratch(limit))
        for index in GRID.indices():
            assert index in cache
            origin = GRID.box(*index)
            np.testing.assert_array_equal(cache.read(index, origin, origin), tile_of(index))
            for _ in range(5):
                y, x = (sorted(int(v) for v in chance.choice(n + 1, 2, replace=False)) for n in origin.shape)
                part = Box(y[0], x[0], y[1], x[1]).shift(origin.y0, origin.x0)
                rows, columns = part.relative_to(origin).slices
                np.testing.assert_array_equal(cache.read(index, part, origin), tile_of(index)[:, rows, columns])


def test_memory_holds_what_the_limit_allows(new_scratch):
    indices = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]  # whole tiles, all of one size
    for count in (0, 1, 2, 5):
        scratch = new_scratch(count)
        cache = TileCache(count * TILE_BYTES, scratch)
        for index in indices:
            cache.put(index, tile_of(index))
        assert [index for index in indices if index in scratch] == indices[: len(indices) - count], count


def test_least_recently_used_tile_is_spilled(new_scratch):
    scratch = new_scratch("lru")
    cache = TileCache(2 * TILE_BYTES, scratch)
    for index in ((0, 0), (0, 1)):
        cache.put(index, tile_of(index))
    cache.read((0, 0), GRID.box(0, 0), GRID.box(0, 0))
    cache.put((0, 2), tile_of((0, 2)))
    assert (0, 1) in scratch
    assert (0, 0) not in scratch


def test_no_file_before_it_is_needed(new_scratch, tmp_path):
    filled(1 << 30, new_scratch("unused"))
    assert list(tmp_path.iterdir()) == []


def test_another_process_finds_spilled_tiles(new_scratch):
    filled(0, new_scratch("a"))
    again = TileCache(0, new_scratch("a"))
    for index in GRID.indices():
        assert index in again
        np.testing.assert_array_equal(again.read(index, GRID.box(*index), GRID.box(*index)), tile_of(index))


def test_black_tile_is_found(new_scratch):
    scratch = new_scratch("black")
    scratch.write((1, 1), np.zeros((3, 20, 30), np.float32))
    assert (1, 1) in scratch
    assert not scratch.read(GRID.box(1, 1)).any()


def test_half_written_tile_is_not_found(tmp_path, new_scratch):
    """zarr writes to a temporary name first, which a kill leaves behind."""
    new_scratch("a").write((0, 0), tile_of((0, 0)))
    (tmp_path / "a" / "c" / "0" / "0" / "1.0123.partial").write_bytes(b"half a tile")
    again = new_scratch("a")
    assert (0, 0) in again
    assert (0, 1) not in again


def test_a_damaged_tile_is_computed_again_or_refused(tmp_path, new_scratch):
    """A loss of power leaves a file of zeros, or one that is cut; a flipped bit shows when it is read."""
    for index in ((0, 0), (0, 1), (1, 0)):
        new_scratch("a").write(index, tile_of(index))
    folder = tmp_path / "a" / "c" / "0"
    (folder / "0" / "0").write_bytes(bytes((folder / "0" / "0").stat().st_size))
    (folder / "0" / "1").write_bytes((folder / "0" / "1").read_bytes()[:-7])
    flipped = bytearray((folder / "1" / "0").read_bytes())
    flipped[100] ^= 1
    (folder / "1" / "0").write_bytes(flipped)
    again = new_scratch("a")
    assert [index for index in GRID.indices() if index in again] == [(1, 0)]
    with pytest.raises(InputError, match="a spilled tile is damaged; remove this folder, and give resume=True"):
        again.read(GRID.box(1, 0))


@pytest.mark.timeout(60)
def test_any_tile_size_can_be_spilled(tmp_path):
    """Primes too, within moments: a prime tile as a million chunks of one pixel takes a minute."""
    for cell in (4, 7, 256, 257, 263, 300, 512, 1000, 2084):
        grid = Grid(cell + 3, cell, (cell, cell))
        scratch = Scratch(tmp_path / str(cell), grid, np.uint8)
        tile = np.random.default_rng(0).integers(0, 256, (3, cell, cell)).astype(np.uint8)
        scratch.write((0, 0), tile)
        scratch.write((1, 0), tile[:, :3])
        np.testing.assert_array_equal(scratch.read(grid.box(0, 0)), tile)
        np.testing.assert_array_equal(scratch.read(Box(cell - 1, 0, cell + 2, cell)), tile[:, [cell - 1, 0, 1]])
        assert scratch.read(grid.box(0, 0)).dtype == np.uint8


def test_read_is_writable(new_scratch):
    """torch warns about a read-only array, and a warning is an error here."""
    cache = TileCache(0, new_scratch("a"))
    cache.put((0, 0), tile_of((0, 0)))
    torch.from_numpy(cache.read((0, 0), Box(3, 3, 9, 9), GRID.box(0, 0)))
