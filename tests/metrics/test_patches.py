"""Sliced Wasserstein distance of patches: zero, closed forms, scales."""

import numpy as np
import pytest
import torch

from engine.metrics import patches
from engine.metrics.patches import PatchScales, distances, scale_sizes


def projections(picture, step=64, draw=0):
    scales = PatchScales(tuple(picture.shape[1:]), draw)
    for rows in picture.split(step, 1):
        scales.add(rows)
    return scales.projections()


def test_scales_are_steps_of_four_down_to_32_pixels():
    assert scale_sizes((2160, 4096)) == [(2160, 4096), (540, 1024), (135, 256), (34, 64)]
    assert scale_sizes((127, 500)) == [(127, 500)]


def test_equal_pictures_are_at_zero_whatever_the_strips(picture):
    image = picture(140, 150)
    assert distances(projections(image, 64), projections(image, 3)) == pytest.approx((0, 0), abs=1e-6)


def test_two_constants():
    """A constant shift moves every projection by it times the sum of the direction."""
    dark, light = torch.full((3, 140, 150), 0.25), torch.full((3, 140, 150), 0.75)
    wanted = 127.5 * float(patches._directions().sum(1).abs().mean())
    assert distances(projections(dark), projections(light)) == pytest.approx((wanted, wanted), rel=1e-5)


def test_white_noise():
    """Projections of independent normal pixels are normal with the same deviation, so between two deviations s and t
    the sorted numbers differ by |s - t| * E|N(0, 1)|."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3, 400, 500, generator=generator)
    other = torch.randn(3, 400, 500, generator=generator)
    found = distances(projections(0.5 + 0.04 * noise), projections(0.5 + 0.10 * other))[0]
    assert found == pytest.approx(0.06 * 255 * np.sqrt(2 / np.pi), rel=0.03)


def test_a_scale_sees_what_is_coarser_than_the_finer_ones_patches():
    """A checkerboard of single pixels differs from its mean at full size only; blocks of 64 pixels at a sixteenth too."""
    y, x = torch.meshgrid(torch.arange(512), torch.arange(512), indexing="ij")
    grey = torch.full((3, 512, 512), 0.5)
    fine = ((x + y) % 2).float().expand(3, 512, 512)
    coarse = ((x // 64 + y // 64) % 2).float().expand(3, 512, 512)
    at_fine, at_coarse = (distances(projections(p), projections(grey)) for p in (fine, coarse))
    assert at_fine[0] > 50
    assert max(at_fine[1:]) < 1e-3
    assert min(at_coarse) > 50


def test_places_are_even_and_patches_are_the_pictures(picture):
    """Every sampled patch is one of the picture's, at the place that was drawn, and the places reach all rows and columns."""
    image = picture(60, 50)
    scales = PatchScales((60, 50))
    for rows in image.split(7, 1):
        scales.add(rows)
    sampler = scales._samplers[0]
    assert sampler._taken == patches.COUNT
    for index in range(0, patches.COUNT, 1111):
        y, x = int(sampler._y[index]), int(sampler._x[index])
        torch.testing.assert_close(sampler.patches[index].view(3, 7, 7), image[:, y : y + 7, x : x + 7])
    assert (int(sampler._y.min()), int(sampler._y.max())) == (0, 53)
    assert (int(sampler._x.min()), int(sampler._x.max())) == (0, 43)
    counts = torch.bincount(sampler._y, minlength=54).double()
    assert counts.std() < 3 * (patches.COUNT / 54) ** 0.5


def test_two_draws_of_one_picture_are_near(picture):
    image, other = picture(200, 300), picture(200, 300, seed=1) ** 2
    real = projections(image)
    floor, far = distances(projections(image, draw=1), real), distances(projections(other), real)
    assert all(0 < f < d / 5 for f, d in zip(floor, far, strict=True))
