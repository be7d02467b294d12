"""SIFID of whole pictures, with random weights, against the definition written out."""

import numpy as np
import pytest
import torch

from engine.metrics.frechet import frechet_distance
from engine.metrics.sifid import LAYERS, Inception


def moments(inception, picture, step):
    features = inception.start(tuple(picture.shape[1:]))
    for rows in picture.split(step, 1):
        features.add(rows)
    return features.gaussians()


def by_definition(network, picture):
    """Every position a vector; numpy's covariance."""
    outputs = network(2 * picture[None].double() - 1)
    vectors = [o[0].flatten(1).numpy() for o in outputs]
    return [(v.mean(1), np.cov(v)) for v in vectors]


def test_moments_are_those_of_the_whole_picture(inception, inception_network, picture):
    image = picture(150, 131)
    for found, (mean, covariance) in zip(
        moments(inception, image, 64), by_definition(inception_network, image), strict=True
    ):
        np.testing.assert_allclose(found.mean, mean, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(found.covariance, covariance, rtol=1e-7, atol=1e-12)


def test_channels_are_those_of_the_layers(inception, picture):
    found = moments(inception, picture(120, 100), 32)
    assert [g.mean.shape[0] for g in found] == list(LAYERS.values()) == [192, 768]


def test_a_picture_is_at_distance_zero_of_itself_whatever_the_strips(inception, picture):
    image = picture(150, 131)
    for a, b in zip(moments(inception, image, 64), moments(inception, image, 13), strict=True):
        assert frechet_distance(a, b) <= 1e-9 * np.trace(a.covariance)


def test_another_picture_is_farther_than_a_little_noise(inception, picture):
    image, other = picture(150, 131), picture(150, 131, seed=5) ** 2
    noisy = (image + 0.01 * torch.randn(image.shape)).clamp(0, 1)
    real = moments(inception, image, 64)
    for layer in range(2):
        near, far = (frechet_distance(moments(inception, p, 64)[layer], real[layer]) for p in (noisy, other))
        assert 0 < near < far / 2


def test_float32_is_near_float64(inception_network, inception, picture):
    """What users get, since files hold float32."""
    import copy

    single = Inception(copy.deepcopy(inception_network).float())
    image, other = picture(150, 131), picture(150, 131, seed=5) ** 2
    for layer in range(2):
        wanted, found = (
            frechet_distance(moments(i, image, 64)[layer], moments(i, other, 64)[layer]) for i in (inception, single)
        )
        assert found == pytest.approx(wanted, rel=1e-4)
