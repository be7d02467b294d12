"""LPIPS over pairs against its definition, with random weights."""

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


def by_definition(network, heads, a, b, given):
    """The reference: scaling layer, unit length over channels, squared difference, head, mean over positions."""
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64).view(1, 3, 1, 1)
    features = []
    for picture in (a, b):
        x = picture[None].double()
        x = 2 * x - 1 if given == "-1..1" else x
        features.append([f / (f.norm(dim=1, keepdim=True) + 1e-10) for f in network((x - shift) / scale)])
    layers = zip(*features, heads, strict=True)
    return sum(float(((f - g) ** 2 * h.view(1, -1, 1, 1)).sum(1).mean()) for f, g, h in layers)


@pytest.mark.parametrize("given", ["-1..1", "0..1"])
@pytest.mark.parametrize("strip_bytes", [1, module.STRIP_BYTES])
def test_all_pairs_are_the_definition(monkeypatch, lpips, alex_network, heads, pictures, given, strip_bytes):
    monkeypatch.setattr(module, "STRIP_BYTES", strip_bytes)  # 8 rows at a time, or all
    matrix = lpips.pairwise([TensorSource(p) for p in pictures], given)
    for i, a in enumerate(pictures):
        for j, b in enumerate(pictures):
            wanted = by_definition(alex_network, heads, a, b, given)
            assert matrix[i, j] == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    assert matrix[0, 1] > 1e-3


def test_the_two_ranges_differ(lpips, pictures):
    sources = [TensorSource(p) for p in pictures]
    usual, unscaled = (lpips.pairwise(sources, given) for given in ("-1..1", "0..1"))
    assert np.abs(usual - unscaled).max() > 1e-3 * usual.max()


def test_zero_of_itself_and_symmetric(lpips, pictures):
    matrix = lpips.pairwise([TensorSource(p) for p in (*pictures, pictures[1])])
    np.testing.assert_allclose(np.diag(matrix), 0, atol=1e-12)
    assert matrix[1, 4] == pytest.approx(0, abs=1e-12)
    np.testing.assert_array_equal(matrix, matrix.T)
    assert (matrix[~np.eye(5, dtype=bool)].reshape(5, 4)[[0, 2, 3]] > 1e-3).all()


def test_rows_are_counted(lpips, pictures):
    rows = []
    lpips.pairwise([TensorSource(p) for p in pictures], on_rows=rows.append)
    assert sum(rows) == 90


def test_pictures_of_two_sizes_are_refused(lpips, picture):
    with pytest.raises(InputError, match="one size; found 80x70, 80x71"):
        lpips.pairwise([TensorSource(picture(70, 80)), TensorSource(picture(71, 80))])
    with pytest.raises(InputError, match="found no pictures"):
        lpips.pairwise([])


def test_float32_is_near_float64(alex_network, heads, lpips, pictures):
    import copy

    single = Lpips(copy.deepcopy(alex_network).float(), heads)
    sources = [TensorSource(p) for p in pictures]
    np.testing.assert_allclose(
        single.pairwise(sources), lpips.pairwise(sources), atol=1e-5 * lpips.pairwise(sources).max()
    )


def test_strips_shrink_with_the_number_and_the_width_of_the_pictures(lpips):
    few, many = lpips._strip(4096, 2), lpips._strip(4096, 50)
    assert few > many >= 8
    row = 50 * 64 * 4096 / 4 * 4
    assert many / 4 * row <= module.STRIP_BYTES
