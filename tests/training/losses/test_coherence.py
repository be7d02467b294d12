"""Coherence: distance of each patch of an image to its nearest patch of the photograph."""

import pytest
import torch

from engine.training.losses.coherence import Coherence


def test_own_patches_are_near():
    real = torch.rand(2, 3, 12, 15, generator=torch.Generator().manual_seed(0))
    assert Coherence()(real, real) == 0
    assert Coherence()(real.roll(4, 3)[..., 4:], real) == 0  # anywhere in the row ...
    assert Coherence()(real.roll(1, 2), real) < 0.3 * Coherence()(real.roll(6, 2), real)  # ... at about the same height
    assert Coherence()(real, real.flip(0)) > 0.05  # and in the same image only


def test_lonely_patches_are_preferred():
    """Grey lies between the photograph's dark and bright halves, nearer to the dark one; each half needs a near patch."""
    photograph = torch.full((1, 3, 5, 20), 0.2)
    photograph[..., 10:] = 0.9
    dark, grey = torch.full((1, 3, 5, 5), 0.2), torch.full((1, 3, 5, 5), 0.5)
    together = torch.cat([dark, grey], 3).requires_grad_()
    (gradient,) = torch.autograd.grad(Coherence()(together, photograph), together)
    assert gradient[..., 5:].mean() < 0  # descent makes the grey brighter, because dark has a near patch already
    alone = grey.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(Coherence()(alone, photograph), alone)
    assert gradient.mean() > 0


def test_against_loops():
    """Images of five rows, so that heights are equal: patch by patch in Python."""
    generator = torch.Generator().manual_seed(2)
    fake, real = torch.rand(1, 3, 5, 11, generator=generator), torch.rand(1, 3, 5, 9, generator=generator)
    fake_patches = [fake[0, :, :, x : x + 5] for x in range(7)]
    real_patches = [real[0, :, :, x : x + 5] for x in range(5)]
    distances = [[float((a - b).square().mean()) for b in real_patches] for a in fake_patches]
    least = [min(row[j] for row in distances) for j in range(5)]
    nearest = [min(range(5), key=lambda j, row=row: row[j] / (least[j] + Coherence.ALPHA)) for row in distances]
    expected = sum(row[j] for row, j in zip(distances, nearest, strict=True)) / 7
    assert float(Coherence()(fake, real)) == pytest.approx(expected, rel=1e-5)


def test_large_images_are_sampled():
    image = torch.rand(1, 3, 200, 150, generator=torch.Generator().manual_seed(0))
    values, heights = Coherence()._patches(image[0], 5)
    assert len(values) == len(heights) <= Coherence.MAX_SIDE**2
    assert 0 == heights[0] < heights[-1] < Coherence.HEIGHT
    assert Coherence()(image, image) == 0
