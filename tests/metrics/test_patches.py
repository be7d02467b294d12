"""Sliced Wasserstein distance of patches: equal images, closed forms, scales."""

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


def test_scales_end_at_32_pixels():
    assert scale_sizes((2160, 4096)) == [(2160, 4096), (540, 1024), (135, 256), (34, 64)]
    assert scale_sizes((127, 500)) == [(127, 500)]


def test_equal_images_have_distance_zero(picture):
    image = picture(140, 150)
    assert distances(projections(image, 64), projections(image, 3)) == pytest.approx((0, 0), abs=1e-6)


def test_two_constants():
    """A constant shift moves a projection by the shift times the sum of the direction."""
    dark, light = torch.full((3, 140, 150), 0.25), torch.full((3, 140, 150), 0.75)
    expected = 127.5 * float(patches._directions().sum(1).abs().mean())
    assert distances(projections(dark), projections(light)) == pytest.approx((expected, expected), rel=1e-5)


def test_white_noise():
    """Projections of independent normal pixels are normal, so deviations s and t differ by |s - t| * E|N(0, 1)|."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3, 400, 500, generator=generator)
    other = torch.randn(3, 400, 500, generator=generator)
    distance = distances(projections(0.5 + 0.04 * noise), projections(0.5 + 0.10 * other))[0]
    assert distance == pytest.approx(0.06 * 255 * np.sqrt(2 / np.pi), rel=0.03)


def test_scales_see_structures_of_their_size():
    """A checkerboard of pixels differs from grey at full size only; one of 64-pixel blocks at every scale."""
    y, x = torch.meshgrid(torch.arange(512), torch.arange(512), indexing="ij")
    grey = torch.full((3, 512, 512), 0.5)
    fine = ((x + y) % 2).float().expand(3, 512, 512)
    coarse = ((x // 64 + y // 64) % 2).float().expand(3, 512, 512)
    at_fine, at_coarse = (distances(projections(p), projections(grey)) for p in (fine, coarse))
    assert at_fine[0] > 50
    assert max(at_fine[1:]) < 1e-3
    assert min(at_coarse) > 50


def test_patches_are_sampled_uniformly(picture):
    """Patches equal the image at the drawn positions, which reach all rows and columns evenly."""
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


def test_floor_is_below_distance(picture):
    image, other = picture(200, 300), picture(200, 300, seed=1) ** 2
    real = projections(image)
    floor, far = distances(projections(image, draw=1), real), distances(projections(other), real)
    assert all(0 < f < d / 5 for f, d in zip(floor, far, strict=True))
