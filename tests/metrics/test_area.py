"""Area averages: equal to the definition, for whole factors and fractions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.metrics.area import AreaMean

SIDES = st.integers(1, 24)


def resize(picture, target):
    return AreaMean(tuple(picture.shape[1:]), target).add(picture)


def overlap(source, target):
    """Share of each source pixel in each target pixel, entry by entry: [target, source]."""
    step = source / target
    weights = np.zeros((target, source))
    for j in range(target):
        for i in range(source):
            weights[j, i] = max(0.0, min(i + 1, (j + 1) * step) - max(i, j * step)) / step
    return weights


@given(source=st.tuples(SIDES, SIDES), target=st.tuples(SIDES, SIDES), step=st.integers(1, 24))
@settings(deadline=None, derandomize=True, max_examples=50)
def test_equals_definition_for_any_strips(source, target, step):
    picture = torch.rand(3, *source, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    area = AreaMean(source, target)
    rows = torch.cat([area.add(part) for part in picture.split(step, 1)], 1)
    expected = overlap(source[0], target[0]) @ picture.numpy() @ overlap(source[1], target[1]).T
    assert rows.shape == (3, *target)
    np.testing.assert_allclose(rows.numpy(), expected, atol=1e-12)


def test_mean_is_preserved(picture):
    image = picture(101, 67)
    assert resize(image, (10, 9)).mean() == pytest.approx(float(image.double().mean()))


def test_reductions_compose():
    picture = torch.rand(3, 48, 32)
    torch.testing.assert_close(resize(resize(picture, (12, 8)), (3, 2)), resize(picture, (3, 2)))
