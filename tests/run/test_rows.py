"""A stage as a stream of rows: from anywhere, in any blocks, of any columns, the rows of the whole stage."""

import math
import random

import pytest
import torch
from support.plans import stage_of
from support.stages import exact_halo, whole_image

from engine.geometry import Box
from engine.io.photo import TensorSource
from engine.run.pipeline import row_chain
from engine.run.rows import RowReader, SourceRows
from engine.run.stage import Stage


@pytest.mark.parametrize("seed", range(20))
def test_any_blocks_are_taken_in_any_requests(seed):
    chance = random.Random(seed)
    rows = torch.arange(97).float().repeat(3, 2, 1).transpose(1, 2)
    blocks, at = [], 0
    while at < 97:
        blocks.append(rows[:, at : at + chance.choice([1, 2, 5, 16, 64])])
        at += blocks[-1].shape[1]
    taker, at = RowReader(iter(blocks)), 0
    while at < 97:
        count = chance.choice([1, 3, 16, 50])
        taken = taker.take(count)
        assert torch.equal(taken, rows[:, at : at + count])  # fewer where the image ends
        at += count


@pytest.fixture(params=["rrdb", "noise channels", "swinir"])
def stage(request, small_rrdb, small_noisy_rrdb, small_swinir):
    network = {"rrdb": small_rrdb, "noise channels": small_noisy_rrdb, "swinir": small_swinir}[request.param]
    return Stage(network, torch.device("cpu"), "fp32")


class Streamed:
    """One stage over an image, for the HR columns ``columns``."""

    def __init__(self, stage, image, columns=None, sigma=0.0, last=False):
        height, width = image.shape[1:]
        band, halo = stage.stream_plan(stage.align).band, exact_halo(stage)
        cut = stage_of(height, width, width, halo, stage.align, stage.scale, sigma=sigma, band=band, is_last=last)
        cut.check()
        self.radius = stage.radius
        self._rows = row_chain([cut], [stage], TensorSource(image), columns or (0, width * stage.scale), seed=5)

    def rows(self, first=0):
        return torch.cat(list(self._rows.rows(first)), 1)


SIZES = [(75, 40), (64, 48), (33, 51), (130, 9), (5, 70), (1, 1), (3, 2), (17, 8)]


@pytest.mark.parametrize("sigma", [0.0, 0.1])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_rows_from_anywhere_are_those_of_the_whole_stage(stage, picture, height, width, sigma):
    image = picture(height, width)
    streamed = Streamed(stage, image, sigma=sigma)
    rows = streamed.rows()
    whole = whole_image(stage.network, image, sigma=sigma, seed=5)
    assert rows.shape == whole.shape
    assert float((rows - whole).abs().max()) <= 2e-6
    end = height * stage.scale
    chance = random.Random(height)
    for first in sorted({end - 1, min(end - 1, 4 * streamed.radius + 64), *(chance.randrange(end) for _ in range(4))}):
        assert torch.equal(streamed.rows(first), rows[:, first:])


@pytest.mark.parametrize("sigma", [0.0, 0.1])
@pytest.mark.parametrize("columns", [(0, 1), (0, 160), (150, 333), (331, 332), (371, 372)])
def test_rows_of_a_strip_with_an_exact_halo_are_those_of_the_whole_stage(stage, picture, columns, sigma):
    image = picture(45, 93)
    whole = whole_image(stage.network, image, sigma=sigma, seed=5)[:, :, slice(*columns)]
    streamed = Streamed(stage, image, columns, sigma)
    rows = streamed.rows()
    assert float((rows - whole).abs().max()) <= 2e-6
    assert torch.equal(streamed.rows(101), rows[:, 101:])


def test_the_last_stage_gives_levels(stage, picture):
    image = picture(21, 30)
    levels, rows = Streamed(stage, image, last=True).rows(), Streamed(stage, image).rows()
    assert levels.dtype == torch.uint8
    assert torch.equal(levels, (rows * 255).round().to(torch.uint8))


def test_a_source_is_read_inside_its_bounds_and_every_row_once(stage, picture):
    seen = []

    class Recording(TensorSource):
        def read(self, box):
            assert Box(0, 0, *self.size).contains(box)
            seen.append(box)
            return super().read(box)

    image = picture(150, 20)
    source = SourceRows(Recording(image), (3, 17))
    assert torch.equal(torch.cat(list(source.rows(7)), 1), image[:, 7:, 3:17])
    assert sum(box.area for box in seen) == 143 * 14
    assert math.prod(seen[0].shape) < 143 * 14  # in blocks
