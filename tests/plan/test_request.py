"""Requests: what a person writes, and what is refused."""

import dataclasses

import pytest

from engine.errors import UsageError
from engine.geometry import Box
from engine.plan.halo import HaloPolicy
from engine.plan.request import Request, parse_box, parse_bytes, parse_size


@pytest.mark.parametrize(
    ("text", "size"), [("4096x3072", (3072, 4096)), ("1X2", (2, 1)), ("16384x10912", (10912, 16384))]
)
def test_sizes_are_written_width_first(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "4096", "4096x", "x3072", "0x5", "5x0", "-4x5", "4.5x5", "4x5x6", " 4x5", "4 x 5", "4*5"]
)
def test_other_sizes_are_refused(text):
    with pytest.raises(UsageError, match="WIDTHxHEIGHT"):
        parse_size(text)


def test_boxes_are_written_corner_first():
    assert parse_box("10,20,300,40") == Box(20, 10, 60, 310)


@pytest.mark.parametrize("text", ["", "1,2,3", "1,2,3,4,5", "1,2,3,-4", "1, 2,3,4", "a,b,c,d", "1.0,2,3,4"])
def test_other_boxes_are_refused(text):
    with pytest.raises(UsageError, match="X,Y,WIDTH,HEIGHT"):
        parse_box(text)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("2GiB", 2 << 30),
        ("2gib", 2 << 30),
        ("2 GiB", 2 << 30),
        ("1.5g", 1_500_000_000),
        ("800MB", 800_000_000),
        ("800m", 800_000_000),
        ("512Ki", 512 << 10),
        ("4096", 4096),
        ("4096B", 4096),
        ("1TiB", 1 << 40),
    ],
)
def test_memory(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "0", "0.0GiB", "-2GiB", "2XB", "2ib", "2GiBs", "1e9", "0.0000001k"])
def test_other_memory_is_refused(text):
    """Also what rounds to nothing: zero would be taken for "choose"."""
    with pytest.raises(UsageError, match="2GiB"):
        parse_bytes(text)


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**64 - 1])
def test_seeds_have_64_bits(seed):
    assert Request(seed=seed).seed == seed


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_other_seeds_are_refused(seed):
    with pytest.raises(UsageError, match=f"--seed {seed}: .*18446744073709551615"):
        Request(seed=seed)


def test_a_bad_overlap_is_refused_at_once():
    with pytest.raises(UsageError, match="overlap 'some'"):
        Request(overlap="some")
    with pytest.raises(UsageError, match="tolerance"):
        Request(seam_tolerance=0)


def test_halo_policy_combines_overlap_and_tolerance():
    assert Request(seam_tolerance=0.25).halo_policy == HaloPolicy("auto", 0.25)


def test_requests_are_values():
    assert Request(size=(4, 5)) == Request(size=(4, 5))
    with pytest.raises(dataclasses.FrozenInstanceError):
        Request().seed = 2
