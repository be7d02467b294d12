"""Effective receptive fields of networks with known fields."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from engine.plan.halo import ERF_FRACTIONS
from engine.probe.erf import SIDE, effective_radius


class Filter(nn.Module):
    """One linear kernel for every channel, followed by nearest-neighbour enlargement."""

    def __init__(self, kernel, scale=1):
        super().__init__()
        self.scale = scale
        side = len(kernel)
        self.register_buffer("kernel", torch.tensor(kernel).expand(3, 1, side, side))

    def forward(self, x):
        y = F.conv2d(x, self.kernel, padding=self.kernel.shape[-1] // 2, groups=3)
        return F.interpolate(y, scale_factor=self.scale, mode="nearest") if self.scale > 1 else y


def box(side):
    return [[1.0 / side**2] * side for _ in range(side)]


def spike(distance, height, directions=((-1, 0), (1, 0), (0, -1), (0, 1))):
    """Kernel with 1 in the middle and ``height`` at four points at ``distance``."""
    side = 2 * distance + 1
    kernel = [[0.0] * side for _ in range(side)]
    kernel[distance][distance] = 1.0
    for y, x in directions:
        kernel[distance + y * distance][distance + x * distance] = height
    return kernel


DIAGONAL = ((-1, -1), (-1, 1), (1, -1), (1, 1))


@pytest.fixture
def content(picture):
    return [picture(64, 64, seed)[None] for seed in range(2)]


def all_radii(value):
    return dict.fromkeys(ERF_FRACTIONS, value)


def test_identity_has_radius_0(content):
    assert effective_radius(nn.Identity(), content, 1, 1) == (all_radii(0), all_radii(0))


def test_box_filter_has_radius_2(content):
    """Four of nine equal weights lie at distance sqrt(2), so every fraction needs radius 2."""
    absolute, square = effective_radius(Filter(box(3)), content, 1, 1)
    assert absolute == square == all_radii(2)


def test_cross_has_radius_1(content):
    cross = [[0.0, 0.2, 0.0], [0.2, 0.2, 0.2], [0.0, 0.2, 0.0]]
    assert effective_radius(Filter(cross), content, 1, 1) == (all_radii(1), all_radii(1))


def test_absolute_and_squared_magnitude(content):
    # 0.96 of the magnitude lies at the centre: absolute for height 0.01, squared for 0.1 (4 * 0.01 of 1.04).
    centre_holds_95_percent = {"0.9": 0, "0.95": 0, "0.98": 7, "0.99": 7, "0.999": 7}
    for height, absolute, square in [
        (0.1, all_radii(7), centre_holds_95_percent),
        (-0.1, all_radii(7), centre_holds_95_percent),
        (0.01, centre_holds_95_percent, all_radii(0)),
    ]:
        assert effective_radius(Filter(spike(7, height)), content, 1, 1) == (absolute, square), height


def test_distance_is_in_lr_pixels_from_the_output_pixel(content):
    """An output pixel lies up to 3/8 off the centre of the LR pixel that it copies, so its radius is 1."""
    for scale in (2, 4):
        assert effective_radius(Filter(box(1), scale), content, scale, 1) == (all_radii(1), all_radii(1))
        absolute, _ = effective_radius(Filter(spike(9, 1.0), scale), content, scale, 1)
        assert absolute == all_radii(10)


def test_alignment_does_not_matter_without_windows(content):
    for align in (1, 2, 8):
        assert effective_radius(Filter(spike(5, 1.0)), content, 1, align) == (all_radii(5), all_radii(5)), align


def test_radii_grow_with_the_fraction(content):
    gauss = torch.exp(-((torch.arange(41.0) - 20) ** 2) / 60)
    kernel = (gauss[:, None] * gauss).tolist()
    for radii in effective_radius(Filter(kernel), content, 1, 1):
        values = [radii[f] for f in ERF_FRACTIONS]
        assert values == sorted(values)
        assert len(set(values)) > 2
    # The square of a Gaussian is a Gaussian, narrower by sqrt(2).
    absolute, square = effective_radius(Filter(kernel), content, 1, 1)
    assert square["0.98"] / absolute["0.98"] == pytest.approx(0.5**0.5, abs=0.05)
    # The magnitude inside radius r is 1 - exp(-r^2 / 60).
    assert absolute["0.98"] == pytest.approx((60 * 3.912) ** 0.5, abs=1)


def test_large_fields_are_measured_on_the_large_crop(picture):
    """Points in the corners of the small crop, outside the largest disc that it holds."""
    side = SIDE // 2 - 12
    absolute, square = effective_radius(Filter(spike(side, 1.0, DIAGONAL)), [picture(SIDE + 16, SIDE + 16)[None]], 1, 1)
    assert absolute == square == all_radii(math.ceil(side * 2**0.5))
    assert absolute["0.98"] > SIDE // 2


def test_fractions_beyond_the_content_are_absent(picture):
    """0.93 of the magnitude lies at the centre, the rest in the corners."""
    absolute, square = effective_radius(Filter(spike(26, 0.02, DIAGONAL)), [picture(64, 64)[None]], 1, 1)
    assert absolute == {"0.9": 0}
    assert square == {"0.9": 0, "0.95": 0, "0.98": 0, "0.99": 0}


def test_small_content_holds_small_fields(picture):
    content = [picture(24, 40)[None]]
    assert effective_radius(Filter(spike(5, 1.0)), content, 1, 8) == (all_radii(5), all_radii(5))


@pytest.mark.slow
def test_effective_fields_are_smaller_than_theoretical_ones(small_rrdb, small_swinir, picture):
    for network in (small_rrdb, small_swinir):
        absolute, square = effective_radius(network, [picture(72, 80)[None]], network.scale, network.align)
        assert set(absolute) == set(square) == set(ERF_FRACTIONS)
        assert 0 < square["0.98"] <= absolute["0.98"] < network.radius


def test_radii_are_reproducible(small_rrdb, picture):
    content = [picture(40, 40)[None]]
    assert effective_radius(small_rrdb, content, 4, 1) == effective_radius(small_rrdb, content, 4, 1)
