"""Lazy stages: what they render is the whole image, however it is cut, asked for and held."""

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

    @pytest.mark.parametrize("shift", [2, 4, 6])
    def test_a_tile_off_the_window_grid_is_wrong_everywhere(self, network, picture, shift):
        """Why tiles are aligned: no halo repairs the phase of the windows."""
        image = picture(96, 96)
        whole = whole_image(network, image)
        with torch.inference_mode():
            tile = network(image[None, :, shift : shift + 88, shift : shift + 88])[0].clamp(0, 1)
        inner = slice(30 * 4, 58 * 4)
        same = slice((30 + shift) * 4, (58 + shift) * 4)
        assert float((tile[:, inner, inner] - whole[:, same, same]).abs().max()) > 100 * EXACT


@pytest.fixture(params=["rrdb", "swinir"])
def network(request, small_rrdb, small_swinir):
    return {"rrdb": small_rrdb, "swinir": small_swinir}[request.param]


def two_stages(network, image, **options):
    first = whole_image(network, image, **options)
    return whole_image(network, first, **options, position=1)


@pytest.mark.parametrize("sigma", [0.0, 0.05])
def test_two_chained_stages_equal_two_whole_runs(tmp_path, network, picture, sigma):
    image = picture(15, 21)
    halo = exact_halo(network)
    chain = Chain(tmp_path, network, image, [16, 32], [halo, halo], sigma=sigma, seed=4, last=False)
    expected = two_stages(network, image, sigma=sigma, seed=4)
    # The second network amplifies the float32 differences of the first.
    assert float((chain.render() - expected).abs().max()) <= 3 * EXACT


def test_stages_of_one_seed_have_noise_of_their_own(tmp_path, small_rrdb, picture):
    image = picture(20, 20)
    halo = exact_halo(small_rrdb)
    result = Chain(tmp_path, small_rrdb, image, [16, 32], [halo, halo], sigma=0.1, seed=4, last=False).render()
    first = whole_image(small_rrdb, image, sigma=0.1, seed=4)
    repeated = whole_image(small_rrdb, first, sigma=0.1, seed=4, position=0)
    assert float((result - repeated).abs().max()) > 0.02


@pytest.mark.parametrize(
    "roi", [Box(0, 0, 17, 23), Box(55, 101, 177, 230), Box(200, 300, 240, 336), Box(63, 64, 64, 65)]
)
@pytest.mark.parametrize("sigma", [0.0, 0.1])
def test_a_region_is_the_crop_of_the_full_render_bit_for_bit(tmp_path, network, picture, roi, sigma):
    image = picture(15, 21)
    options = {"cores": [8, 16], "halos": [8, 8], "sigma": sigma, "seed": 3}
    whole = Chain(tmp_path / "whole", network, image, **options).render()
    rows, columns = roi.slices
    assert whole.dtype == torch.uint8
    assert whole[:, rows, columns].unique().numel() > 1
    part = Chain(tmp_path / "part", network, image, **options).image.read(roi)
    assert torch.equal(part, whole[:, rows, columns])


def test_a_region_in_shards_is_the_crop_too(tmp_path, small_rrdb, picture):
    """As a region is rendered: piece by piece, off the tile grid, with next to no memory for finished tiles."""
    image = picture(15, 21)
    options = {"cores": [8, 16], "halos": [8, 8]}
    whole = Chain(tmp_path / "whole", small_rrdb, image, **options).render()
    chain = Chain(tmp_path / "part", small_rrdb, image, **options, limit=1)
    roi = Box(30, 70, 190, 250)
    for y in range(roi.y0, roi.y1, 64):
        for x in range(roi.x0, roi.x1, 64):
            box = Box(y, x, y + 64, x + 64).clip(roi)
            assert torch.equal(chain.image.read(box), whole[:, box.y0 : box.y1, box.x0 : box.x1])
    assert len(chain.runs[1]) == len(list(chain.stages[1].plan.tiles(roi)))


@pytest.mark.parametrize("limit", [0, 50_000, 1 << 30])
@pytest.mark.parametrize(
    ("cores", "halos"),
    [
        ((8, 8), (4, 6)),
        ((8, 24), (4, 6)),
        # What a tile of the second stage reads is, at the corner, exactly one tile of the first: 16 + 2 * 8 = 4 * 8.
        ((8, 16), (4, 8)),
        ((8, 16, 24), (4, 4, 4)),
    ],
)
def test_every_tile_of_every_stage_is_computed_once(tmp_path, small_rrdb, picture, cores, halos, limit):
    image = picture(5, 6) if len(cores) == 3 else picture(11, 19)
    chain = Chain(tmp_path, small_rrdb, image, cores, halos, limit=limit)
    chain.render()
    assert chain.counts() == [len(s.plan.grid) for s in chain.stages]


def test_a_finished_run_takes_up_spilled_tiles(tmp_path, small_rrdb, picture):
    """A killed render left its inner tiles in the scratch array: they are not computed again."""
    image = picture(17, 25)
    first = Chain(tmp_path, small_rrdb, image, [8, 24], [4, 6], limit=0)
    expected = first.render()
    second = Chain(tmp_path, small_rrdb, image, [8, 24], [4, 6], limit=0)
    assert torch.equal(second.render(), expected)
    assert second.counts() == [0, len(second.stages[1].plan.grid)]


def test_the_cache_does_not_change_pixels(tmp_path, network, picture):
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


def test_sources_are_read_inside_their_bounds_only(tmp_path, network, picture):
    class Strict(TensorSource):
        def read(self, box):
            assert Box(0, 0, *self.size).contains(box)
            assert box.area
            return super().read(box)

    Chain(tmp_path, network, Strict(picture(9, 21)), [8, 8], [0, 0]).render()


def test_a_tile_reads_what_the_plan_says(tmp_path, network, picture):
    """The count of tiles to run, which the plan makes from ``source_box``, is then the count of tiles run."""
    seen = []

    class Recording(TensorSource):
        def read(self, box):
            seen.append(box)
            return super().read(box)

    chain = Chain(tmp_path, network, Recording(picture(9, 21)), [8], [0])
    chain.render()
    plan = chain.image.plan
    assert seen == [plan.source_box(plan.tile_at(*index).read) for index in plan.grid.indices()]


def test_two_tile_sizes_agree_to_a_level(tmp_path, network, picture):
    """With an exact halo the sums differ in their order only: a pixel in 100,000 may round to its neighbour."""
    image, halo = picture(112, 150), exact_halo(network)
    results = [Chain(tmp_path / str(core), network, image, [core], [halo]).render().int() for core in (40, 104)]
    difference = (results[0] - results[1]).abs()
    assert int(difference.max()) <= 1
    assert int((difference > 0).sum()) <= 10e-6 * difference.numel() + 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("last", [True, False])
def test_a_network_that_fails_is_named_with_its_tile(tmp_path, small_rrdb, picture, bad, last):
    image = picture(40, 40)
    image[1, 39, 5] = bad
    chain = Chain(tmp_path, small_rrdb, image, [16], [4], last=last)
    with pytest.raises(
        RenderError, match=r"step 2: \d+ NaN or infinite values in tile \(row 2, column 0\); .*check the weights"
    ):
        chain.render()
    assert len(chain.runs[0]) < 9
