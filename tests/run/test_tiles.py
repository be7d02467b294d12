"""Stages in tiles: the whole image, whatever the cut, the order of reads and the memory of the cache."""

import numpy as np
import pytest
import torch
from support.stages import EXACT, Chain, StageTests, exact_halo, whole_image

from engine.errors import RenderError
from engine.geometry import Box
from engine.io.photo import TensorSource


class TestRRDBNet(StageTests):
    @pytest.fixture
    def network(self, small_rrdb):
        return small_rrdb


class TestRRDBNetWithNoiseChannels(StageTests):
    @pytest.fixture
    def network(self, small_noisy_rrdb):
        return small_noisy_rrdb


class TestSwinIR(StageTests):
    @pytest.fixture
    def network(self, small_swinir):
        return small_swinir

    def test_tile_off_the_window_grid_is_wrong_everywhere(self, network, picture):
        """The reason why tiles are aligned: no halo repairs the phase of the windows."""
        image = picture(96, 96)
        whole = whole_image(network, image)
        for shift in (2, 4, 6):
            with torch.inference_mode():
                tile = network(image[None, :, shift : shift + 88, shift : shift + 88])[0].clamp(0, 1)
            inner = slice(30 * 4, 58 * 4)
            same = slice((30 + shift) * 4, (58 + shift) * 4)
            assert float((tile[:, inner, inner] - whole[:, same, same]).abs().max()) > 100 * EXACT, shift


@pytest.fixture(params=["rrdb", "swinir"])
def network(request, small_rrdb, small_swinir):
    return {"rrdb": small_rrdb, "swinir": small_swinir}[request.param]


def two_stages(network, image, **options):
    first = whole_image(network, image, **options)
    return whole_image(network, first, **options, position=1)


def test_two_chained_stages_equal_two_whole_runs(tmp_path, network, picture):
    image = picture(15, 21)
    halo = exact_halo(network)
    for sigma in (0.0, 0.05):
        chain = Chain(tmp_path, network, image, [16, 32], [halo, halo], sigma=sigma, seed=4, last=False)
        expected = two_stages(network, image, sigma=sigma, seed=4)
        # The second network amplifies the float32 differences of the first.
        assert float((chain.render() - expected).abs().max()) <= 3 * EXACT, sigma


def test_stages_of_one_seed_have_their_own_noise(tmp_path, small_rrdb, picture):
    image = picture(20, 20)
    halo = exact_halo(small_rrdb)
    result = Chain(tmp_path, small_rrdb, image, [16, 32], [halo, halo], sigma=0.1, seed=4, last=False).render()
    first = whole_image(small_rrdb, image, sigma=0.1, seed=4)
    repeated = whole_image(small_rrdb, first, sigma=0.1, seed=4, position=0)
    assert float((result - repeated).abs().max()) > 0.02


def test_region_is_the_crop_bit_for_bit(tmp_path, network, picture):
    image = picture(15, 21)
    for sigma in (0.0, 0.1):
        options = {"tiles": [8, 16], "halos": [8, 8], "sigma": sigma, "seed": 3}
        whole = Chain(tmp_path, network, image, **options).render()
        assert whole.dtype == torch.uint8
        for roi in (Box(0, 0, 17, 23), Box(55, 101, 177, 230), Box(200, 300, 240, 336), Box(63, 64, 64, 65)):
            rows, columns = roi.slices
            assert whole[:, rows, columns].unique().numel() > 1
            part = Chain(tmp_path, network, image, **options).image.read(roi)
            assert torch.equal(part, whole[:, rows, columns]), (sigma, roi)


def test_region_in_shards_is_the_crop(tmp_path, small_rrdb, picture):
    """As a region is rendered: shard by shard, off the tile grid, with next to no memory for finished tiles."""
    image = picture(15, 21)
    options = {"tiles": [8, 16], "halos": [8, 8]}
    whole = Chain(tmp_path / "whole", small_rrdb, image, **options).render()
    chain = Chain(tmp_path / "part", small_rrdb, image, **options, limit=1)
    roi = Box(30, 70, 190, 250)
    for y in range(roi.y0, roi.y1, 64):
        for x in range(roi.x0, roi.x1, 64):
            box = Box(y, x, y + 64, x + 64).clip(roi)
            assert torch.equal(chain.image.read(box), whole[:, box.y0 : box.y1, box.x0 : box.x1])
    assert len(chain.runs[1]) == len(list(chain.stages[1].plan.tiles(roi)))


CUTS = [
    ((8, 8), (4, 6)),
    ((8, 24), (4, 6)),
    # The input of a corner tile of the second stage is exactly one tile of the first: 16 + 2 * 8 = 4 * 8.
    ((8, 16), (4, 8)),
    ((8, 16, 24), (4, 4, 4)),
]


def test_every_tile_runs_once(tmp_path, small_rrdb, picture):
    for tiles, halos in CUTS:
        image = picture(5, 6) if len(tiles) == 3 else picture(11, 19)
        for limit in (0, 50_000, 1 << 30):
            folder = tmp_path / f"{tiles}-{limit}"
            chain = Chain(folder, small_rrdb, image, tiles, halos, limit=limit)
            chain.render()
            assert chain.counts() == [len(s.plan.grid) for s in chain.stages], (tiles, limit)


def test_next_run_finds_spilled_tiles(tmp_path, small_rrdb, picture):
    """A killed render left its inner tiles in the scratch array: they are not computed again."""
    image = picture(17, 25)
    first = Chain(tmp_path, small_rrdb, image, [8, 24], [4, 6], limit=0)
    expected = first.render()
    second = Chain(tmp_path, small_rrdb, image, [8, 24], [4, 6], limit=0)
    assert torch.equal(second.render(), expected)
    assert second.counts() == [0, len(second.stages[1].plan.grid)]


def test_cache_changes_no_pixel(tmp_path, network, picture):
    image = picture(17, 25)
    results = [
        Chain(tmp_path / str(limit), network, image, [8, 24], [8, 8], limit=limit).render() for limit in (0, 1 << 30)
    ]
    assert torch.equal(*results)


def test_reported_pixels_are_those_of_the_tiles(tmp_path, small_rrdb, picture):
    chain = Chain(tmp_path, small_rrdb, picture(17, 25), [8, 24], [4, 6])
    chain.render()
    for runs, stage in zip(chain.runs, chain.stages, strict=True):
        assert set(runs) == {np.prod(stage.plan.tile_shape)}


def test_source_reads_are_those_of_the_plan(tmp_path, network, picture):
    """Inside the source's bounds; the plan's count of tiles, made from ``source_box``, is the count of tiles that run."""
    boxes = []

    class Recording(TensorSource):
        def read(self, box):
            assert Box(0, 0, *self.size).contains(box)
            assert box.area
            boxes.append(box)
            return super().read(box)

    Chain(tmp_path, network, Recording(picture(9, 21)), [8, 8], [0, 0]).render()
    boxes.clear()
    chain = Chain(tmp_path, network, Recording(picture(9, 21)), [8], [0])
    chain.render()
    plan = chain.image.plan
    assert boxes == [plan.source_box(plan.tile_at(*index).read) for index in plan.grid.indices()]


def test_two_tile_sizes_agree_to_a_level(tmp_path, network, picture):
    """With an exact halo only the order of sums differs: one pixel in 100,000 may round to its neighbour."""
    image, halo = picture(112, 150), exact_halo(network)
    results = [Chain(tmp_path / str(tile), network, image, [tile], [halo]).render().int() for tile in (40, 104)]
    difference = (results[0] - results[1]).abs()
    assert int(difference.max()) <= 1
    assert int((difference > 0).sum()) <= 10e-6 * difference.numel() + 1


def test_nonfinite_tile_is_named_and_stops(tmp_path, small_rrdb, picture):
    words = r"step 2: \d+ NaN or infinite values in tile \(row 2, column 0\); .*check the weights"
    for bad in (float("nan"), float("inf")):
        image = picture(40, 40)
        image[1, 39, 5] = bad
        for last in (True, False):
            chain = Chain(tmp_path, small_rrdb, image, [16], [4], last=last)
            with pytest.raises(RenderError, match=words):
                chain.render()
            assert len(chain.runs[0]) < 9
