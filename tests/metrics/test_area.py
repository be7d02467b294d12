"""Averages over areas: exact for whole factors, and for fractions by the definition."""

import numpy as np
import pytest
import torch

from engine.metrics.area import AreaMean, resized


def overlap(source, target):
    """[target, source]: the share of each source pixel in each target pixel, entry by entry."""
    step = source / target
    weights = np.zeros((target, source))
    for j in range(target):
        for i in range(source):
            weights[j, i] = max(0.0, min(i + 1, (j + 1) * step) - max(i, j * step)) / step
    return weights


@pytest.mark.parametrize(
    ("source", "target"),
    [((12, 16), (3, 4)), ((13, 17), (5, 4)), ((20, 9), (20, 9)), ((7, 5), (1, 1)), ((5, 6), (9, 8))],
)
@pytest.mark.parametrize("step", [1, 2, 5, 100])
def test_by_definition_whatever_the_strips(source, target, step):
    picture = torch.rand(3, *source, dtype=torch.float64)
    area = AreaMean(source, target)
    rows = torch.cat([area.add(part) for part in picture.split(step, 1)], 1)
    wanted = overlap(source[0], target[0]) @ picture.numpy() @ overlap(source[1], target[1]).T
    assert rows.shape == (3, *target)
    np.testing.assert_allclose(rows.numpy(), wanted, atol=1e-12)


def test_the_mean_stays(picture):
    image = picture(101, 67)
    assert resized(image, (10, 9)).mean() == pytest.approx(float(image.double().mean()))


def test_reductions_one_after_the_other_are_one():
    picture = torch.rand(3, 48, 32)
    torch.testing.assert_close(resized(resized(picture, (12, 8)), (3, 2)), resized(picture, (3, 2)))
