"""Parts of a store: levels, regions and depths, and levels that are computed."""

import numpy as np
import pytest
import pyvips

from engine.errors import UsageError
from engine.exporters import export, view
from engine.exporters.pyramid import Pyramid
from engine.exporters.view import View
from engine.geometry import Box
from engine.io.halving import halve_interleaved as halve


def read_all(part):
    return [part.read(index, level.bounds) for index, level in enumerate(part.levels)]


def test_levels_are_those_of_the_store_as_far_as_a_region_allows(store, levels, tmp_path):
    """Beyond, each halves the one before."""
    for box, own in ((Box(32, 64, 531, 1037), 5), (Box(4, 8, 300, 400), 3), (Box(1, 2, 300, 402), 1)):
        part = View(Pyramid(store), roi=box, folder=tmp_path)
        assert len(part.levels) == own
        part.extend(1, exact=True)
        expected = [levels[i][box.cover(2**i).slices] for i in range(own)]
        while max(expected[-1].shape[:2]) > 1:
            expected.append(halve(expected[-1]))
        for index, pixels in enumerate(expected):
            assert np.array_equal(part.read(index, part.levels[index].bounds), pixels), (box, index)
        part.close()


def test_a_later_level_is_the_full_size(store, levels, tmp_path):
    part = View(Pyramid(store), level=2, folder=tmp_path)
    for pixels, expected in zip(read_all(part), levels[2:], strict=True):
        assert np.array_equal(pixels, expected)
    region = View(Pyramid(store), level=1, roi=Box(100, 200, 301, 401), folder=tmp_path)
    assert np.array_equal(region.read(0, region.levels[0].bounds), levels[1][50:151, 100:201])


def test_levels_that_are_computed_in_a_file(store, levels, tmp_path, monkeypatch):
    monkeypatch.setattr(view, "IN_MEMORY", 0)
    monkeypatch.setattr(view, "SQUARE", 64)
    part = View(Pyramid(store), roi=Box(1, 1, 531, 1037), folder=tmp_path)
    part.extend(64)
    half = halve(levels[0][1:, 1:])
    assert part.scratch >= half.nbytes
    assert np.array_equal(part.read(2, Box(3, 5, 70, 90)), halve(half)[3:70, 5:90])
    assert [path.name for path in tmp_path.iterdir()] == ["out.zarr"]  # files without names
    part.close()


@pytest.mark.parametrize("suffix", ["tif", "ome.tif", "png", "dzi", "iiif"])
def test_every_format_can_be_smaller(store, levels, tmp_path, suffix):
    """A size of no level is reduced by libvips; that of a level is copied."""
    expected = pyvips.Image.new_from_array(levels[0]).resize(700 / 1037, vscale=358 / 531).numpy().astype(int)
    options = {"tiles": "png", "tile": 4096} if suffix in ("dzi", "iiif") else {}
    pixels = {}
    for size in (700, 519):
        out = export(store, tmp_path / f"{size}.{suffix}", max_size=size, **options)
        assert out.width == size
        file = {
            "dzi": tmp_path / f"{size}_files/10/0_0.png",
            "iiif": out.path / "full/max/0/default.png",
        }.get(suffix, out.path)
        pixels[size] = pyvips.Image.new_from_file(str(file)).numpy()
    assert np.abs(pixels[700] - expected).max() <= 1
    assert np.array_equal(pixels[519], levels[1])


def test_levels_regions_and_depths_are_checked(store, tmp_path):
    for option, message in (
        ({"level": 9}, "level: 9 is not in the store, which has 5 levels; give 0 to 4"),
        ({"roi": "1000,500,100,100"}, "roi: 1000,500,100,100 leaves the image"),
        ({"roi": "1,2,3"}, "roi='1,2,3': not a region"),
        ({"size": (2000, 1024)}, "size: 2000x1024 enlarges the picture"),
        ({"size": "500x500"}, "size: 500x500 distorts the picture .* give 500x256"),
        ({"size": "500x256", "max_size": 500}, "size and max_size: exclude each other"),
    ):
        with pytest.raises(UsageError, match=message):
            export(store, tmp_path / "a.png", **option)
    assert (export(store, tmp_path / "a.png", size="500x256").width, 256) == (500, 256)
