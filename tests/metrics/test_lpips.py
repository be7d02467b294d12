"""LPIPS of all pairs against its definition, with random weights."""

import copy

import numpy as np
import pytest
import torch

from engine.errors import InputError
from engine.io.photo import TensorSource
from engine.metrics import lpips as module
from engine.metrics.lpips import Lpips


@pytest.fixture
def pictures(picture):
    return [picture(90, 101, seed=seed) for seed in range(4)]


def by_definition(network, heads, a, b, input_range):
    """Scaling layer, unit length over channels, squared difference, head, mean over positions."""
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64).view(1, 3, 1, 1)
    features = []
    for picture in (a, b):
        x = picture[None].double()
        x = 2 * x - 1 if input_range == "-1..1" else x
        features.append([f / (f.norm(dim=1, keepdim=True) + 1e-10) for f in network((x - shift) / scale)])
    layers = zip(*features, heads, strict=True)
    return sum(float(((f - g) ** 2 * h.view(1, -1, 1, 1)).sum(1).mean()) for f, g, h in layers)


def test_all_pairs_equal_definition(monkeypatch, lpips, alex_network, heads, pictures):
    for input_range in module.RANGES:
        expected = [[by_definition(alex_network, heads, a, b, input_range) for b in pictures] for a in pictures]
        assert expected[0][1] > 1e-3
        for strip_bytes in (1, module.STRIP_BYTES):  # 8 rows at a time, or all
            with monkeypatch.context() as patch:
                patch.setattr(module, "STRIP_BYTES", strip_bytes)
                matrix = lpips.pairwise([TensorSource(p) for p in pictures], input_range)
            np.testing.assert_allclose(matrix, expected, rtol=1e-9, atol=1e-12)


def test_input_ranges_differ(lpips, pictures):
    sources = [TensorSource(p) for p in pictures]
    usual, unscaled = (lpips.pairwise(sources, input_range) for input_range in module.RANGES)
    assert np.abs(usual - unscaled).max() > 1e-3 * usual.max()


def test_matrix_is_symmetric_with_zero_diagonal(lpips, pictures):
    matrix = lpips.pairwise([TensorSource(p) for p in (*pictures, pictures[1])])
    np.testing.assert_allclose(np.diag(matrix), 0, atol=1e-12)
    assert matrix[1, 4] == pytest.approx(0, abs=1e-12)
    np.testing.assert_array_equal(matrix, matrix.T)
    assert (matrix[~np.eye(5, dtype=bool)].reshape(5, 4)[[0, 2, 3]] > 1e-3).all()


def test_rows_are_counted(lpips, pictures):
    rows = []
    lpips.pairwise([TensorSource(p) for p in pictures], on_rows=rows.append)
    assert sum(rows) == 90


def test_other_sizes_are_refused(lpips, picture):
    with pytest.raises(InputError, match="one size; found 80x70, 80x71"):
        lpips.pairwise([TensorSource(picture(70, 80)), TensorSource(picture(71, 80))])
    with pytest.raises(InputError, match="found no pictures"):
        lpips.pairwise([])


def test_float32_is_near_float64(alex_network, heads, lpips, pictures):
    single = Lpips(copy.deepcopy(alex_network).float(), heads)
    sources = [TensorSource(p) for p in pictures]
    expected = lpips.pairwise(sources)
    np.testing.assert_allclose(single.pairwise(sources), expected, atol=1e-5 * expected.max())


def test_strip_height_bounds_memory(lpips):
    few, many = lpips._strip_rows(4096, 2), lpips._strip_rows(4096, 50)
    assert few > many >= 8
    row = 50 * 64 * 4096 / 4 * 4
    assert many / 4 * row <= module.STRIP_BYTES
