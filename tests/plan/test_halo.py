"""Profiles: which halo a policy gives, and that measurements survive JSON."""

import json

import pytest

from engine.errors import UsageError
from engine.plan.halo import ERF_FRACTIONS, HaloPolicy
from engine.plan.measured import Footprint, SeamPoint, StageProfile

MEASURED = [(0, 90.0), (4, 31.0), (8, 6.0), (12, 1.0), (16, 0.4), (20, 0.01)]
PROFILE = StageProfile(
    "crops of a.png",
    {"0.9": 11, "0.98": 26},
    {"0.9": 5, "0.95": 7, "0.98": 9, "0.99": 13},
    tuple(SeamPoint(halo, worst / 8, worst / 2, worst) for halo, worst in MEASURED),
)


@pytest.mark.parametrize(
    ("tolerance", "halo"), [(100.0, 0), (90.0, 0), (89.9, 4), (1.0, 12), (0.99, 16), (0.01, 20), (0.005, None)]
)
def test_halo_within_is_the_smallest_that_is_good_enough(tolerance, halo):
    point = PROFILE.halo_within(tolerance)
    assert (point and point.halo) == halo
    assert point is None or point.max <= tolerance


@pytest.mark.parametrize(("halo", "error"), [(0, 90.0), (3, 90.0), (4, 31.0), (15, 1.0), (20, 0.01), (999, 0.01)])
def test_the_error_at_a_halo_is_that_of_the_next_smaller_measured_one(halo, error):
    assert PROFILE.at(halo).max == error


def test_the_order_of_points_does_not_decide_the_error():
    backwards = StageProfile("", {}, {}, PROFILE.seam[::-1])
    assert backwards.at(10) == PROFILE.at(10)


def test_no_measurement_is_no_error_bound():
    empty = StageProfile("", {}, {}, ())
    assert empty.at(10) is None
    assert empty.halo_within(255.0) is None


def test_profile_survives_json():
    assert StageProfile.from_json(json.loads(json.dumps(PROFILE.to_json()))) == PROFILE


@pytest.mark.parametrize(
    ("policy", "tolerance", "align", "halo"),
    [
        ("auto", 1.0, 1, 12),
        ("auto", 1.0, 8, 16),
        ("auto", 0.5, 8, 16),
        ("auto", 200.0, 8, 0),
        ("auto", 0.001, 1, 30),  # nothing measured is good enough: the theoretical radius
        ("auto", 0.001, 8, 32),
        ("exact", 1.0, 1, 30),
        ("exact", 1.0, 8, 32),
        ("0", 1.0, 8, 0),
        ("10", 1.0, 1, 10),
        ("10", 1.0, 8, 16),
        ("100", 1.0, 1, 100),  # a number of pixels is taken as it is
        ("erf:0.98", 1.0, 1, 9),  # of the squared gradient: the paper's definition
        ("erf:0.98", 1.0, 8, 16),
        ("erf:0.999", 1.0, 8, 32),  # beyond the probe's crop: the theoretical radius
    ],
)
def test_policies(policy, tolerance, align, halo):
    assert HaloPolicy(policy, tolerance).choose(PROFILE, 30, align) == halo


@pytest.mark.parametrize("policy", ["auto", "erf:0.99"])
def test_a_measured_halo_never_exceeds_the_exact_one(policy):
    assert HaloPolicy(policy).choose(PROFILE, 5, 1) == 5
    assert HaloPolicy(policy).choose(PROFILE, 5, 8) == 8


@pytest.mark.parametrize("policy", ["auto", "erf:0.98"])
def test_measured_policies_want_a_measurement(policy):
    assert HaloPolicy(policy).needs_profile
    with pytest.raises(UsageError, match="engine probe"):
        HaloPolicy(policy).choose(None, 30, 1)


@pytest.mark.parametrize("policy", ["exact", "24"])
def test_other_policies_want_none(policy):
    assert not HaloPolicy(policy).needs_profile
    HaloPolicy(policy).choose(None, 30, 1)


@pytest.mark.parametrize("fraction", ERF_FRACTIONS)
def test_every_measured_fraction_can_be_asked_for(fraction):
    assert HaloPolicy(f"erf:{fraction}").policy == f"erf:{fraction}"


@pytest.mark.parametrize("policy", ["", "erf", "erf:", "erf:0.5", "-1", "1.5", "AUTO", "erf:98", "²"])
def test_unknown_policies_are_refused_with_the_known_ones(policy):
    with pytest.raises(UsageError, match=r"use auto, exact, a number of pixels, or one of erf:0.9,"):
        HaloPolicy(policy)


@pytest.mark.parametrize("tolerance", [0.0, -1.0, float("nan")])
def test_a_tolerance_of_nothing_is_refused(tolerance):
    with pytest.raises(UsageError, match="--overlap exact"):
        HaloPolicy("auto", tolerance)


def test_footprint_is_a_line():
    footprint = Footprint(fixed=1000, per_pixel=2.5, seconds_per_pixel=0.0)
    assert [footprint.bytes_at(n) for n in (0, 1, 4)] == [1000, 1002, 1010]
