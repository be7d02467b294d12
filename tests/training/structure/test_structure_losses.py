"""Coherence: each patch of a picture has one near to it in the photograph."""

import pytest
import torch

from engine.training.structure.losses import Coherence


def test_every_patch_of_the_photograph_is_near_to_itself():
    real = torch.rand(2, 3, 12, 15, generator=torch.Generator().manual_seed(0))
    assert Coherence()(real, real) == 0
    assert Coherence()(real.roll(4, 3)[..., 4:], real) == 0  # wherever it lies ...
    assert Coherence()(real.roll(1, 2), real) < 0.3 * Coherence()(real.roll(6, 2), real)  # ... at about its height
    assert Coherence()(real, real.flip(0)) > 0.05  # and in which picture


def test_what_nothing_is_near_to_is_preferred():
    """Grey lies between the photograph's two halves, a little nearer to the dark one: both are to have their share."""
    photograph = torch.full((1, 3, 5, 20), 0.2)
    photograph[..., 10:] = 0.9
    dark, grey = torch.full((1, 3, 5, 5), 0.2), torch.full((1, 3, 5, 5), 0.5)
    together = torch.cat([dark, grey], 3).requires_grad_()
    (gradient,) = torch.autograd.grad(Coherence()(together, photograph), together)
    assert gradient[..., 5:].mean() < 0  # a step down makes the grey brighter, although dark is nearer
    alone = grey.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(Coherence()(alone, photograph), alone)
    assert gradient.mean() > 0


def test_nearest_patches_by_another_way():
    """Of a picture whose height does not count, five rows high: patch by patch, in Python."""
    generator = torch.Generator().manual_seed(2)
    fake, real = torch.rand(1, 3, 5, 11, generator=generator), torch.rand(1, 3, 5, 9, generator=generator)
    ours = [fake[0, :, :, x : x + 5] for x in range(7)]
    theirs = [real[0, :, :, x : x + 5] for x in range(5)]
    apart = [[float((a - b).square().mean()) for b in theirs] for a in ours]
    least = [min(row[j] for row in apart) for j in range(5)]
    chosen = [min(range(5), key=lambda j, row=row: row[j] / (least[j] + Coherence.ALPHA)) for row in apart]
    expected = sum(row[j] for row, j in zip(apart, chosen, strict=True)) / 7
    assert float(Coherence()(fake, real)) == pytest.approx(expected, rel=1e-5)


def test_of_large_pictures_some_rows_and_columns_are_compared():
    picture = torch.rand(1, 3, 200, 150, generator=torch.Generator().manual_seed(0))
    values, heights = Coherence()._patches(picture[0], 5)
    assert len(values) == len(heights) <= Coherence.MOST**2
    assert 0 == heights[0] < heights[-1] < Coherence.HEIGHT
    assert Coherence()(picture, picture) == 0
