"""Frechet distance against closed forms, moments against NumPy."""

import math

import numpy as np
import pytest
import torch

from engine.metrics.frechet import Gaussian, Moments, frechet_distance


def gaussian(mean, covariance):
    return Gaussian(np.asarray(mean, float), np.asarray(covariance, float), 1000)


def random_covariance(size, seed, rank=None):
    a = np.random.default_rng(seed).normal(size=(size, rank or size))
    return a @ a.T


def test_one_dimension():
    """(m - n)^2 + (s - t)^2 for deviations s and t."""
    assert frechet_distance(gaussian([1.0], [[4.0]]), gaussian([4.0], [[25.0]])) == pytest.approx(9 + 9)


def test_two_dimensions_without_commuting():
    """For 2 x 2 matrices tr(M^1/2) = sqrt(tr M + 2 sqrt(det M))."""
    a, b = random_covariance(2, 0), random_covariance(2, 1)
    assert not np.allclose(a @ b, b @ a)
    root = math.sqrt(np.trace(a @ b) + 2 * math.sqrt(np.linalg.det(a @ b)))
    expected = 1 + 4 + np.trace(a) + np.trace(b) - 2 * root
    assert frechet_distance(gaussian([0, 0], a), gaussian([1, 2], b)) == pytest.approx(expected)


def test_common_axes():
    """With a common basis the distance is the sum of (s_i - t_i)^2."""
    basis, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(5, 5)))
    s, t = np.array([1.0, 2, 3, 4, 0]), np.array([2.0, 2, 1, 0, 0])
    pair = [gaussian(np.zeros(5), basis * d**2 @ basis.T) for d in (s, t)]
    assert frechet_distance(*pair) == pytest.approx(((s - t) ** 2).sum())


def test_scaled_copy():
    """Sigma against c^2 Sigma: (1 - c)^2 tr Sigma."""
    covariance = random_covariance(40, 3)
    expected = 0.25 * np.trace(covariance)
    assert frechet_distance(gaussian(np.zeros(40), covariance), gaussian(np.zeros(40), 2.25 * covariance)) == (
        pytest.approx(expected)
    )


def test_equal_and_singular_is_zero():
    """With fewer vectors than channels, the square root of the product would lose half of the digits."""
    covariance = random_covariance(200, 4, rank=7)
    same = gaussian(np.ones(200), covariance)
    assert frechet_distance(same, same) <= 1e-12 * np.trace(covariance)


def test_symmetric():
    a, b = gaussian(np.zeros(9), random_covariance(9, 5)), gaussian(np.ones(9), random_covariance(9, 6, rank=3))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))
    assert frechet_distance(a, b) > 9


def test_moments_of_parts_equal_numpy():
    """With a mean a million times the deviation, where sums of squares leave no digits."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 5, 60, 3, dtype=torch.float64, generator=generator) + 1e6
    vectors = features[0].flatten(1).numpy()
    for parts in ([60], [1, 59], [20, 20, 20], [7, 52, 1]):
        moments = Moments(5)
        for part in features.split(parts, 2):
            moments.add(part)
        result = moments.gaussian()
        assert result.count == 180
        np.testing.assert_allclose(result.mean, vectors.mean(1), rtol=1e-14)
        np.testing.assert_allclose(result.covariance, np.cov(vectors), atol=1e-7)
