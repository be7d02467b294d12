"""Halos: policies, profiles and seam errors."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.plans import cost_of, stage_of

from engine.errors import UsageError
from engine.geometry import UNBOUNDED
from engine.plan.halo import ERF_FRACTIONS, HaloPolicy, largest, seam_error
from engine.plan.measured import BandCost, Footprint, MissingMeasurement, SeamPoint, StageProfile

quick = settings(deadline=None, derandomize=True, max_examples=50)

MEASURED = {0: 90.0, 4: 31.0, 8: 6.0, 12: 1.0, 16: 0.4, 20: 0.01}
PROFILE = StageProfile(
    "crops of a.png",
    {"0.9": 11, "0.98": 26},
    {"0.9": 5, "0.95": 7, "0.98": 9, "0.99": 13},
    tuple(SeamPoint(halo, worst / 8, worst / 2, worst) for halo, worst in MEASURED.items()),
)
EMPTY = StageProfile("", {}, {}, ())

POLICIES = [
    ("auto", 1.0, 1, 12),
    ("auto", 1.0, 8, 16),
    ("auto", 0.5, 8, 16),
    ("auto", 200.0, 8, 0),
    # No measured halo is good enough: the theoretical radius.
    ("auto", 0.001, 1, 30),
    ("auto", 0.001, 8, 32),
    ("exact", 1.0, 1, 30),
    ("exact", 1.0, 8, 32),
    ("0", 1.0, 8, 0),
    ("10", 1.0, 1, 10),
    ("10", 1.0, 8, 16),
    # A number of pixels is not limited by the radius.
    ("100", 1.0, 1, 100),
    # The squared gradient: the paper's definition.
    ("erf:0.98", 1.0, 1, 9),
    ("erf:0.98", 1.0, 8, 16),
    # Beyond the probe's crop: the theoretical radius.
    ("erf:0.999", 1.0, 8, 32),
]

# Profiles


def test_halo_within_is_the_smallest_good_one():
    halos = {100.0: 0, 90.0: 0, 89.9: 4, 1.0: 12, 0.99: 16, 0.01: 20, 0.005: None}
    for tolerance, halo in halos.items():
        point = PROFILE.halo_within(tolerance)
        assert (point and point.halo) == halo, tolerance
        assert point is None or point.max <= tolerance


def test_error_is_that_of_the_next_smaller_halo():
    errors = {0: 90.0, 3: 90.0, 4: 31.0, 15: 1.0, 20: 0.01, 999: 0.01}
    assert {halo: PROFILE.at(halo).max for halo in errors} == errors


def test_order_of_points_is_irrelevant():
    backwards = StageProfile("", {}, {}, PROFILE.seam[::-1])
    assert [backwards.at(halo) for halo in range(25)] == [PROFILE.at(halo) for halo in range(25)]


def test_empty_profile_bounds_nothing():
    assert EMPTY.at(10) is None
    assert EMPTY.halo_within(255.0) is None


def test_profile_survives_json():
    assert StageProfile.from_json(json.loads(json.dumps(PROFILE.to_json()))) == PROFILE


# Policies


def test_policies():
    chosen = [HaloPolicy(policy, tolerance).choose(PROFILE, 30, align) for policy, tolerance, align, _ in POLICIES]
    assert chosen == [halo for *_, halo in POLICIES]


@quick
@given(st.sampled_from(["auto", "exact", *(f"erf:{f}" for f in ERF_FRACTIONS)]), st.integers(0, 40), st.integers(1, 16))
def test_halo_never_exceeds_the_exact_one(policy, radius, align):
    halo = HaloPolicy(policy).choose(PROFILE, radius, align)
    assert halo % align == 0
    assert 0 <= halo <= -(-radius // align) * align


def test_policies_that_need_a_profile():
    for policy in ("auto", "erf:0.98"):
        assert HaloPolicy(policy).needs_profile
        with pytest.raises(MissingMeasurement):
            HaloPolicy(policy).choose(None, 30, 1)
    for policy, halo in (("exact", 30), ("24", 24)):
        assert not HaloPolicy(policy).needs_profile
        assert HaloPolicy(policy).choose(None, 30, 1) == halo


def test_unknown_receptive_fields_take_measured_halos():
    seam = (SeamPoint(8, 0.5, 2.0, 4.0), SeamPoint(16, 0.1, 0.4, 0.8))
    profile, empty = (StageProfile("a picture", {}, {}, points) for points in (seam, ()))
    for policy, of, halo in [("auto", profile, 16), ("auto", empty, 32), ("5", profile, 8)]:
        assert HaloPolicy(policy).choose(of, UNBOUNDED, 8) == halo
        with pytest.raises(MissingMeasurement):  # measuring refuses networks that look at the whole picture
            HaloPolicy(policy).choose(None, UNBOUNDED, 8)
    with pytest.raises(UsageError, match=r"seam_tolerance=0\.1: no halo that was measured has a smaller error"):
        HaloPolicy("auto", 0.1).choose(profile, UNBOUNDED, 8)
    with pytest.raises(UsageError, match="whose receptive field is not known; use auto"):
        HaloPolicy("exact").choose(profile, UNBOUNDED, 8)


def test_unknown_policies_are_refused():
    for policy in ("", "erf", "erf:", "erf:0.5", "-1", "1.5", "AUTO", "erf:98", "²"):
        with pytest.raises(
            UsageError, match=r"use auto, exact, a number of pixels, or erf:0.9, .*erf:0.999$"
        ) as caught:
            HaloPolicy(policy)
        assert caught.value.for_command_line().startswith(f"--overlap {policy}: unknown policy; "), policy


def test_tolerance_must_be_positive():
    for tolerance in (0.0, -1.0, math.nan):
        with pytest.raises(UsageError) as caught:
            HaloPolicy("auto", tolerance)
        assert caught.value.for_command_line() == (
            f"--seam-tolerance {tolerance}: must be above 0 levels; use --overlap exact for no error"
        )


# Seam errors


def test_seam_error_of_a_stage():
    """Exact without inner edges and with the whole receptive field; otherwise as measured."""
    cases = [
        (12, PROFILE, False, 0.0),
        (12, None, False, 0.0),
        (30, PROFILE, True, 0.0),
        (30, None, True, 0.0),
        (29, PROFILE, True, 0.01),
        (12, PROFILE, True, 1.0),
        (0, PROFILE, True, 90.0),
        (12, None, True, None),
        (12, EMPTY, True, None),
    ]
    for halo, profile, has_inner_edges, error in cases:
        stage, cut = cost_of(radius=30, profile=profile), stage_of(100, 100, 16, halo)
        assert seam_error(cut, stage, has_inner_edges=has_inner_edges) == error, (halo, profile, has_inner_edges)


def test_largest_seam_error():
    assert largest([0.0, 0.0]) == 0.0
    assert largest([0.5, 0.7]) == 0.7
    assert largest([0.5, None]) is None
    assert largest([None, 0.5]) is None


# Costs


def test_footprint_is_linear():
    footprint = Footprint(fixed=1000, per_pixel=2.5, seconds_per_pixel=0.0)
    assert [footprint.bytes_at(n) for n in (0, 1, 4)] == [1000, 1002, 1010]


def test_band_cost_is_the_smaller_line():
    cost = BandCost(16, bytes_per_column=10.0, seconds_per_pixel=0.0, fixed=1000, narrow_bytes_per_column=30.0)
    assert [cost.bytes_at(n) for n in (0, 10, 50, 100)] == [0, 300, 1500, 2000]
    assert BandCost(16, 10.0, 0.0, fixed=1000).bytes_at(1) == 1010
