"""SIFID with random weights against its definition."""

import copy

import numpy as np
import pytest
import torch

from engine.metrics.frechet import frechet_distance
from engine.metrics.sifid import LAYERS, Inception


def moments(inception, picture, step=64):
    features = inception.start(tuple(picture.shape[1:]))
    for rows in picture.split(step, 1):
        features.add(rows)
    return features.gaussians()


def sifid(a, b):
    return [frechet_distance(*pair) for pair in zip(a, b, strict=True)]


def by_definition(network, picture):
    """Mean and NumPy's covariance, with every position as one vector."""
    outputs = network(2 * picture[None].double() - 1)
    vectors = [o[0].flatten(1).numpy() for o in outputs]
    return [(v.mean(1), np.cov(v)) for v in vectors]


def test_moments_equal_definition(inception, inception_network, picture):
    image = picture(150, 131)
    result = moments(inception, image)
    assert [g.mean.shape[0] for g in result] == list(LAYERS.values()) == [192, 768]
    for gaussian, (mean, covariance) in zip(result, by_definition(inception_network, image), strict=True):
        np.testing.assert_allclose(gaussian.mean, mean, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(gaussian.covariance, covariance, rtol=1e-7, atol=1e-12)


@pytest.mark.slow
def test_equal_images_have_distance_zero(inception, picture):
    image = picture(150, 131)
    real = moments(inception, image)
    for distance, gaussian in zip(sifid(real, moments(inception, image, 13)), real, strict=True):
        assert distance <= 1e-9 * np.trace(gaussian.covariance)


@pytest.mark.slow
def test_other_image_is_farther_than_noise(inception, picture):
    image, other = picture(150, 131), picture(150, 131, seed=5) ** 2
    noisy = (image + 0.01 * torch.randn(image.shape)).clamp(0, 1)
    real = moments(inception, image)
    near, far = (sifid(moments(inception, p), real) for p in (noisy, other))
    assert all(0 < a < b / 2 for a, b in zip(near, far, strict=True))


@pytest.mark.slow
def test_float32_is_near_float64(inception_network, inception, picture):
    """Weights files hold float32."""
    single = Inception(copy.deepcopy(inception_network).float())
    image, other = picture(150, 131), picture(150, 131, seed=5) ** 2
    double, result = (sifid(moments(i, image), moments(i, other)) for i in (inception, single))
    assert result == pytest.approx(double, rel=1e-4)
