"""A stage as a stream of rows: any first row, any block height, any columns give the rows of the whole stage."""

import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.plans import stage_of
from support.stages import exact_halo, whole_image

from engine.geometry import Box
from engine.io.photo import TensorSource
from engine.run.pipeline import row_chain
from engine.run.rows import RowBlock, RowReader, SourceRows
from engine.run.stage import Stage

ROUNDING = 2e-6
"""Largest difference in full scale: float32 sums in another order."""


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=20), st.lists(st.integers(1, 50), min_size=1))
def test_reader_takes_any_number_of_rows(heights, requests):
    """A half comes with whole pairs of rows, and with an odd last row of the image."""
    total = sum(heights)
    rows = torch.arange(total).float().repeat(3, 2, 1).transpose(1, 2)
    halves, ends = rows[:, ::2, :1], list(itertools.accumulate(heights))
    ends = [end // 2 for end in ends[:-1]] + [halves.shape[1]]
    blocks = zip(rows.split(heights, 1), halves.tensor_split(ends[:-1], 1), strict=True)
    reader, at = RowReader(itertools.starmap(RowBlock, blocks)), 0
    for count in requests * total:
        is_paired = at % 2 == 0 and all(n % 2 == 0 for n in requests)
        taken = reader.take(count)
        assert torch.equal(taken.pixels, rows[:, at : at + count])  # fewer at the end of the image
        if taken.half is not None:
            assert torch.equal(taken.half, halves[:, at // 2 : -(-(at + count) // 2)])
        assert (taken.half is not None) or not is_paired
        assert taken.half is None or at % 2 == 0
        assert taken.half is None or count % 2 == 0 or at + count >= total
        if (at := at + count) >= total:
            break
    assert reader.take(1).pixels.shape[1] == 0


@pytest.fixture(params=["noise channels", "swinir", pytest.param("rrdb", marks=pytest.mark.slow)])
def stage(request, small_rrdb, small_noisy_rrdb, small_swinir):
    network = {"rrdb": small_rrdb, "noise channels": small_noisy_rrdb, "swinir": small_swinir}[request.param]
    return Stage(network, torch.device("cpu"), "fp32")


class Streamed:
    """One stage over an image, for the HR columns ``columns``."""

    def __init__(self, stage, image, columns=None, sigma=0.0, last=False):
        height, width = image.shape[1:]
        band, halo = stage.stream_plan(stage.align).band, exact_halo(stage)
        cut = stage_of(height, width, width, halo, stage.align, stage.scale, sigma=sigma, band=band, is_image=last)
        cut.check()
        self.radius = stage.radius
        self._rows = row_chain([cut], [stage], TensorSource(image), columns or (0, width * stage.scale), seed=5)

    def rows(self, first=0, last=None):
        return torch.cat([block.pixels for block in self._rows.rows(first, last)], 1)


SIZES = [(75, 40), (64, 48), (33, 51), (130, 9), (5, 70), (1, 1), (3, 2), (17, 8)]


def test_rows_equal_the_whole_stage(stage, picture):
    """Rows from the top equal the whole stage; rows from anywhere equal rows from the top, bit for bit."""
    for height, width in SIZES:
        for sigma in (0.0, 0.1):
            image = picture(height, width)
            streamed = Streamed(stage, image, sigma=sigma)
            rows = streamed.rows()
            whole = whole_image(stage.network, image, sigma=sigma, seed=5)
            assert rows.shape == whole.shape
            assert float((rows - whole).abs().max()) <= ROUNDING, (height, width, sigma)
            end = height * stage.scale
            chance = random.Random(height)
            starts = {end - 1, min(end - 1, 4 * streamed.radius + 64), *(chance.randrange(end) for _ in range(4))}
            for first in sorted(starts):
                last = chance.choice((end, chance.randrange(first, end) + 1))
                assert torch.equal(streamed.rows(first, last), rows[:, first:last]), (height, width, sigma, first, last)


def test_rows_of_a_strip_equal_the_whole_stage(stage, picture):
    """With an exact halo."""
    image = picture(45, 93)
    for sigma in (0.0, 0.1):
        whole = whole_image(stage.network, image, sigma=sigma, seed=5)
        for columns in ((0, 1), (0, 160), (150, 333), (331, 332), (371, 372)):
            streamed = Streamed(stage, image, columns, sigma)
            rows = streamed.rows()
            assert float((rows - whole[:, :, slice(*columns)]).abs().max()) <= ROUNDING, (columns, sigma)
            assert torch.equal(streamed.rows(101), rows[:, 101:]), (columns, sigma)


def test_last_stage_gives_uint8(stage, picture):
    image = picture(21, 30)
    levels, rows = Streamed(stage, image, last=True).rows(), Streamed(stage, image).rows()
    assert levels.dtype == torch.uint8
    assert torch.equal(levels, (rows * 255).round().to(torch.uint8))


def test_source_is_read_in_blocks_and_every_row_once(picture):
    boxes = []

    class Recording(TensorSource):
        def read(self, box):
            assert Box(0, 0, *self.size).contains(box)
            boxes.append(box)
            return super().read(box)

    image = picture(150, 20)
    source = SourceRows(Recording(image), (3, 17))
    assert torch.equal(torch.cat([block.pixels for block in source.rows(7)], 1), image[:, 7:, 3:17])
    assert sum(box.area for box in boxes) == 143 * 14
    assert math.prod(boxes[0].shape) < 143 * 14
