"""Pixels of a store while it grows."""

import numpy as np
import pytest
from support.damage import flip
from support.growing import SIZE, new_store, store_of, write

from engine.errors import InputError
from engine.growing import TILE, GrowingImage, Kind


def tiles(image, level):
    facts = image.levels[level]
    return [(x, y) for y in range(-(-facts.height // TILE)) for x in range(-(-facts.width // TILE))]


def whole(image, level):
    facts = image.levels[level]
    pixels = np.zeros((facts.height, facts.width, 3), np.uint8)
    for x, y in tiles(image, level):
        pixels[image.box(level, x, y).slices] = image.tile(level, x, y).pixels
    return pixels


def test_finished_tiles_are_the_stores_pixels(tmp_path):
    pixels = store_of(tmp_path / "a.zarr").transpose(1, 2, 0)
    image = GrowingImage(tmp_path / "a.zarr")
    assert np.array_equal(whole(image, 0), pixels)
    assert {image.tile(0, x, y).kind for x, y in tiles(image, 0)} == {Kind.FINISHED}


def test_every_step_of_the_growth_shows_the_best_that_is_known(tmp_path):
    """At all levels: finished shards exactly, also where the pyramid has no shard yet; elsewhere the first look, enlarged."""
    reference = tmp_path / "whole.zarr"
    pixels = store_of(reference)
    levels = [whole(GrowingImage(reference), level).astype(int) for level in range(4)]
    sink, _ = new_store(tmp_path / "a.zarr", pixels=pixels)
    image = GrowingImage(tmp_path / "a.zarr")
    assert not image.refresh()
    assert {image.tile(k, x, y).kind for k in range(4) for x, y in tiles(image, k)} == {Kind.COARSE}
    for level, exact in enumerate(levels):
        assert np.abs(whole(image, level) - exact).mean() < 12  # grain, and a blur
    version = image.version(0, 0, 0)
    write(sink, pixels, count=10)
    assert image.version(0, 0, 0) == version
    assert image.refresh()
    assert image.version(0, 0, 0) != version
    for level, exact in enumerate(levels):
        shown, done = whole(image, level), np.repeat(np.repeat(image.finished, 256, 0), 256, 1)[: SIZE[0], : SIZE[1]]
        done = done[:: 2**level, :: 2**level]
        assert done.any()
        assert not done.all()
        assert np.array_equal(shown[done], exact[done])
        assert np.abs(shown - exact).mean() < 12
    assert image.tile(0, 0, 0).kind is Kind.FINISHED
    write(sink, pixels)
    assert image.refresh()
    assert image.complete
    assert np.array_equal(whole(image, 3), levels[3])
    assert not image.refresh()


def test_damaged_and_missing_shards_are_never_shown_as_finished(tmp_path):
    pixels = store_of(tmp_path / "a.zarr").transpose(1, 2, 0)
    flip(tmp_path / "a.zarr/0/c/0/0/0", 100)
    (tmp_path / "a.zarr/0/c/0/2/4").unlink()
    image = GrowingImage(tmp_path / "a.zarr")
    damaged, missing = image.tile(0, 0, 0), image.tile(0, 2, 1)
    assert damaged.kind is Kind.DAMAGED
    assert np.array_equal(damaged.pixels[256:], pixels[256:512, :512])  # the other shards of the tile
    assert not np.array_equal(damaged.pixels[:256, :256], pixels[:256, :256])
    assert missing.kind is Kind.COARSE
    assert 0 < np.abs(missing.pixels.astype(int) - pixels[512:, 1024:]).mean() < 12  # from the level above
    assert any("wrong checksum" in line for line in image.damaged)


def test_a_store_that_is_replaced_is_told_from_one_that_grows(tmp_path):
    sink, pixels = new_store(tmp_path / "a.zarr")
    image = GrowingImage(tmp_path / "a.zarr")
    write(sink, pixels)
    assert image.refresh()
    assert image.epoch == 0
    (tmp_path / "a.zarr").rename(tmp_path / "old.zarr")
    with pytest.raises(InputError, match="is gone"):
        image.refresh()
    new_store(tmp_path / "a.zarr", seed=8)
    assert image.refresh()
    assert image.epoch == 1
    assert not image.complete
    (tmp_path / "a.zarr").rename(tmp_path / "older.zarr")
    store_of(tmp_path / "a.zarr", (300, 400))
    with pytest.raises(InputError, match="another image"):
        image.refresh()
