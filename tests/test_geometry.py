"""Boxes and grids against sets of pixels."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.geometry import Box, Grid

cases = settings(deadline=None, derandomize=True, max_examples=50)


def boxes(low=-12, high=12):
    intervals = st.tuples(st.integers(low, high), st.integers(low, high)).map(sorted)
    return st.builds(lambda y, x: Box(y[0], x[0], y[1], x[1]), intervals, intervals)


grids = st.builds(Grid, st.integers(1, 39), st.integers(1, 39), st.tuples(*[st.integers(1, 16)] * 2))


def pixels(box):
    return {(y, x) for y in range(box.y0, box.y1) for x in range(box.x0, box.x1)}


@cases
@given(boxes(low=0))
def test_shape_area_and_slices(box):
    assert box.shape == (box.height, box.width)
    assert box.area == len(pixels(box))
    canvas = np.zeros((12, 12), bool)
    canvas[box.slices] = True
    assert set(zip(*np.nonzero(canvas), strict=True)) == pixels(box)


@cases
@given(boxes(), boxes())
def test_clip_and_contains(a, b):
    assert pixels(a.clip(b)) == pixels(a) & pixels(b)
    assert a.clip(b).area == b.clip(a).area
    assert min(a.clip(b).shape) >= 0
    if b.area:
        assert a.contains(b) == (pixels(b) <= pixels(a))
    assert a.contains(a)
    assert a.contains(a.clip(b)) or not a.clip(b).area


@cases
@given(boxes(), boxes())
def test_shift_and_relative_to(a, b):
    assert a.relative_to(b).shift(b.y0, b.x0) == a
    assert pixels(a.shift(3, -5)) == {(y + 3, x - 5) for y, x in pixels(a)}


@cases
@given(boxes(), st.integers(1, 5))
def test_scale_and_cover(box, factor):
    assert box.scale(factor).cover(factor) == box
    assert box.scale(factor).area == box.area * factor**2
    if box.area:
        assert pixels(box.cover(factor)) == {(y // factor, x // factor) for y, x in pixels(box)}


@cases
@given(grids)
def test_cells_cover_every_pixel_once(grid):
    counts = np.zeros((grid.height, grid.width), int)
    cells = list(grid.indices())
    for row, column in cells:
        box = grid.box(row, column)
        counts[box.slices] += 1
        assert box.area > 0
        assert box.height == grid.cell[0] or row == grid.rows - 1
        assert box.width == grid.cell[1] or column == grid.columns - 1
    assert (counts == 1).all()
    assert len(grid) == len(cells) == grid.rows * grid.columns
    assert cells == sorted(cells)


@cases
@given(grids, boxes(low=-5, high=45))
def test_indices_of_a_box_are_its_overlapping_cells(grid, box):
    assert list(grid.indices(box)) == [i for i in grid.indices() if grid.box(*i).clip(box).area]


def test_boxes_are_values():
    assert Box(0, 1, 2, 3) == Box(0, 1, 2, 3)
    assert len({Box(0, 1, 2, 3), Box(0, 1, 2, 3)}) == 1
    with pytest.raises(AttributeError):
        Box(0, 1, 2, 3).y0 = 5
