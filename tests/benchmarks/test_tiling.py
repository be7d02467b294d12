"""Other programs' rules for tiles: exact where a tile sees all that its pixels follow from, and only there."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "peers"))
import tiling  # noqa: E402 (found by the path above)

RADIUS, SCALE = 3, 2
TILE, OVERLAP = 16, 8


@pytest.fixture
def enlarge():
    """A network with a receptive field of RADIUS, and the sides of the parts that it saw."""
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 3, 3, padding=1) for _ in range(RADIUS - 1)]
    network = nn.Sequential(*convs, nn.Conv2d(3, 3 * SCALE**2, 3, padding=1), nn.PixelShuffle(SCALE)).requires_grad_(
        False
    )
    return lambda part: network(torch.from_numpy(part)[None])[0].numpy()


@pytest.fixture
def image():
    return np.random.default_rng(0).random((3, 37, 53), dtype=np.float32)


def test_cropped_is_exact_with_the_receptive_field(enlarge, image):
    whole = enlarge(image)
    exact, short = (tiling.cropped(enlarge, image, SCALE, TILE, pad) for pad in (RADIUS, RADIUS - 1))
    assert exact.shape == short.shape == whole.shape
    np.testing.assert_allclose(exact, whole, atol=1e-6)
    wrong = np.abs(short - whole).max(0) > 1e-6
    border = TILE * SCALE
    assert wrong[border - 1 : border + 1].any(1).all()
    assert not wrong[SCALE : border - SCALE, SCALE : border - SCALE].any()


def test_feathered_is_exact_where_all_tiles_see_enough(enlarge, image):
    whole = enlarge(image)
    result = tiling.feathered(enlarge, image, SCALE, TILE, OVERLAP)
    assert result.shape == whole.shape
    axes = []
    for length in image.shape[1:]:
        begins = tiling.starts(length, TILE, OVERLAP)
        ends = [min(first + TILE, length) for first in begins]
        inner = [side for side in (*begins, *ends) if 0 < side < length]
        axes.append(
            np.repeat(
                [all(not side - RADIUS <= pixel < side + RADIUS for side in inner) for pixel in range(length)], SCALE
            )
        )
    far = np.logical_and.outer(*axes)
    error = np.abs(result - whole).max(0)
    assert far.any()
    assert error[far].max() < 1e-6
    assert error.max() > 1e-3


def test_a_picture_of_one_tile_is_whole(enlarge, image):
    np.testing.assert_array_equal(tiling.feathered(enlarge, image, SCALE, 53, OVERLAP), enlarge(image))


def test_tiles_are_halved_while_memory_is_exhausted():
    tried = []

    def enlarge_by(tile):
        tried.append(tile)
        if tile > 128:
            raise MemoryError
        return "result"

    assert tiling.halved(enlarge_by, 512, 128, lambda _: True) == ("result", 128)
    assert tried == [512, 256, 128]
    with pytest.raises(MemoryError):
        tiling.halved(enlarge_by, 512, 256, lambda _: True)
    with pytest.raises(MemoryError):
        tiling.halved(enlarge_by, 512, 128, lambda _: False)
