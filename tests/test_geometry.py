"""Boxes and grids against what they mean: sets of pixels."""

import numpy as np
import pytest

from engine.geometry import Box, Grid

CASES = 16


def pixels(box):
    return {(y, x) for y in range(box.y0, box.y1) for x in range(box.x0, box.x1)}


@pytest.fixture(params=range(CASES))
def rng(request):
    return np.random.default_rng(request.param)


def some_box(rng, low=-12, high=12):
    (y0, y1), (x0, x1) = (sorted(int(v) for v in rng.integers(low, high, 2)) for _ in range(2))
    return Box(y0, x0, y1, x1)


def test_shape_and_area_count_pixels(rng):
    box = some_box(rng)
    assert box.shape == (box.height, box.width)
    assert box.area == len(pixels(box))


def test_slices_select_the_box(rng):
    box = some_box(rng, low=0)
    canvas = np.zeros((12, 12), bool)
    canvas[box.slices] = True
    assert set(zip(*np.nonzero(canvas), strict=True)) == pixels(box)


def test_clip_is_intersection(rng):
    a, b = some_box(rng), some_box(rng)
    assert pixels(a.clip(b)) == pixels(a) & pixels(b)
    assert a.clip(b).area == b.clip(a).area


def test_clip_of_boxes_apart_is_empty_and_has_no_negative_side():
    clipped = Box(0, 0, 2, 2).clip(Box(5, 7, 9, 9))
    assert clipped.area == 0
    assert min(clipped.shape) >= 0


def test_contains_is_subset(rng):
    a, b = some_box(rng), some_box(rng)
    if b.area:
        assert a.contains(b) == (pixels(b) <= pixels(a))
    assert a.contains(a)
    assert a.contains(a.clip(b)) or not a.clip(b).area


def test_relative_to_undoes_shift(rng):
    a, b = some_box(rng), some_box(rng)
    assert a.relative_to(b).shift(b.y0, b.x0) == a
    assert pixels(a.shift(3, -5)) == {(y + 3, x - 5) for y, x in pixels(a)}


def test_cover_undoes_scale_and_is_the_smallest(rng):
    box, factor = some_box(rng), int(rng.integers(1, 6))
    assert box.scale(factor).cover(factor) == box
    assert box.scale(factor).area == box.area * factor**2
    if box.area:
        covered = {(y // factor, x // factor) for y, x in pixels(box)}
        assert pixels(box.cover(factor)) == covered


@pytest.fixture
def grid(rng):
    return Grid(*(int(v) for v in rng.integers(1, 40, 2)), int(rng.integers(1, 17)))


def test_cells_cover_every_pixel_once(grid):
    counts = np.zeros((grid.height, grid.width), int)
    cells = list(grid.indices())
    for index in cells:
        counts[grid.box(*index).slices] += 1
        assert grid.box(*index).area > 0
    assert (counts == 1).all()
    assert len(grid) == len(cells) == grid.rows * grid.columns
    assert cells == sorted(cells)


def test_only_the_last_cells_are_cut(grid):
    for row, column in grid.indices():
        height, width = grid.box(row, column).shape
        assert height == grid.cell or row == grid.rows - 1
        assert width == grid.cell or column == grid.columns - 1


def test_indices_of_a_box_are_the_cells_that_meet_it(grid, rng):
    box = some_box(rng, low=-5, high=45)
    expected = [i for i in grid.indices() if grid.box(*i).clip(box).area]
    assert list(grid.indices(box)) == expected


def test_boxes_are_values():
    assert Box(0, 1, 2, 3) == Box(0, 1, 2, 3)
    assert len({Box(0, 1, 2, 3), Box(0, 1, 2, 3)}) == 1
    with pytest.raises(AttributeError):
        Box(0, 1, 2, 3).y0 = 5
