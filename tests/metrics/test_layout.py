"""Measures of layout against values computed by hand."""

import pytest
import torch

from engine.metrics.layout import Border, colour_profile_distance, diversity, pairwise_rms


def test_profile_of_shifted_channel(picture):
    image = picture(40, 60)
    moved = image.clone()
    moved[0] += 10 / 255
    assert colour_profile_distance(image, image) == 0
    assert colour_profile_distance(moved, image) == pytest.approx(10 / 3**0.5, rel=1e-5)


def test_profile_ignores_columns(picture):
    image = picture(40, 60)
    assert colour_profile_distance(image.flip(2), image) == pytest.approx(0, abs=1e-4)
    assert colour_profile_distance(image[:, :, :30].repeat(1, 1, 4), image[:, :, :30]) == pytest.approx(0, abs=1e-4)
    assert colour_profile_distance(image.flip(1), image) > 1


def test_border_of_a_frame():
    """Each side separately, in levels; corners belong to two sides."""
    picture = torch.full((3, 30, 40), 0.5)
    picture[:, :2] += 10 / 255
    border = Border.of(picture)
    assert (border.top, border.bottom) == (pytest.approx(10, rel=1e-4), pytest.approx(0, abs=1e-4))
    assert border.left == border.right == pytest.approx(0, abs=1e-4)
    picture = torch.full((3, 30, 40), 0.5)
    picture[:, :, -2:] -= 20 / 255
    assert Border.of(picture).right == pytest.approx(-20, rel=1e-4)
    assert Border.of(picture).left == pytest.approx(0, abs=1e-4)
    turned = Border.of(picture.transpose(1, 2))
    assert turned.bottom == pytest.approx(-20, rel=1e-4)


def test_border_of_a_slope():
    """With a slope of one level per row, two rows and the next two differ by two levels."""
    picture = (torch.arange(50.0) / 255).view(1, 50, 1).expand(3, 50, 60)
    border = Border.of(picture)
    assert (border.top, border.bottom) == (pytest.approx(-2, abs=1e-4), pytest.approx(2, abs=1e-4))


def test_mean_border():
    assert Border.mean([Border(1, 2, 3, 4), Border(3, 2, 1, -4)]) == Border(2, 2, 2, 0)


def test_diversity_of_independent_noise():
    """Each pixel varies over many samples as the photograph varies over its pixels: 1."""
    generator = torch.Generator().manual_seed(0)
    samples = [torch.rand(3, 20, 30, generator=generator) for _ in range(200)]
    assert diversity(samples, samples[0]) == pytest.approx(1, abs=0.03)
    assert pairwise_rms(samples[:40]) == pytest.approx(255 * (1 / 6) ** 0.5, rel=0.02)


def test_diversity_of_equal_samples(picture):
    image = picture(20, 30)
    assert diversity([image, image.clone(), image.clone()], image) == pytest.approx(0, abs=1e-6)
    assert pairwise_rms([image, image.clone()]) == 0


def test_diversity_by_hand():
    """Grey samples at 0.2 and 0.6 deviate by 0.2; a photograph half black and half white by 0.5."""
    photograph = torch.zeros(3, 4, 8)
    photograph[:, :, 4:] = 1
    samples = [torch.full((3, 4, 8), 0.2), torch.full((3, 4, 8), 0.6)]
    assert diversity(samples, photograph) == pytest.approx(0.4)
    assert pairwise_rms(samples) == pytest.approx(0.4 * 255)
