"""Requests: accepted texts and values, and refusals."""

import dataclasses
import pydoc
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import UsageError
from engine.geometry import Box, parse_box, parse_size
from engine.plan.halo import HaloPolicy
from engine.plan.request import MAX_SEED, PictureRequest, Request, RequestOptions, parse_bytes

quick = settings(deadline=None, derandomize=True, max_examples=50)
sides = st.integers(1, 10**6)
offsets = st.integers(0, 10**6)

BAD_TEXTS = {
    parse_size: (
        "size",
        ["", "4096", "4096x", "x3072", "0x5", "5x0", "-4x5", "4.5x5", "4x5x6", " 4x5", "4 x 5", "4*5"],
    ),
    parse_box: ("roi", ["", "1,2,3", "1,2,3,4,5", "1,2,3,-4", "1, 2,3,4", "a,b,c,d", "1.0,2,3,4"]),
    parse_bytes: ("memory", ["", "GiB", "-2GiB", "2XB", "2ib", "2GiBs", "1e9"]),
}

BAD_VALUES = [
    ({"seed": -1}, "seed=-1: must be from 0 to 18446744073709551615"),
    ({"seed": MAX_SEED + 1}, "seed=18446744073709551616: must be from 0"),
    ({"tile": 0}, "tile=0: must be at least 1"),
    ({"blend": -1}, "blend=-1: must be from 0"),
    ({"blend": 513}, "blend=513: must be from 0 (no cross-fade) to 512"),
    ({"ramp": "step"}, "ramp='step': unknown weight curve; use one of cosine, linear"),
    ({"overlap": "some"}, "some"),
    *(({"noise_gain": (1, g)}, f"noise_gain={g:g}: must be from 0 (silent) to 4; give 1") for g in (-1, 4.01)),
    ({"noise_gain": float("nan")}, "noise_gain='nan': must be from 0"),
    ({"seam_tolerance": 0}, "tolerance"),
]


@quick
@given(sides, sides, st.sampled_from("xX"))
def test_size_is_width_first(width, height, letter):
    assert parse_size(f"{width}{letter}{height}") == (width, height)


@quick
@given(offsets, offsets, sides, sides)
def test_box_is_corner_first(x, y, width, height):
    assert parse_box(f"{x},{y},{width},{height}") == Box(y, x, y + height, x + width)


def test_memory_units():
    amounts = {
        "2GiB": 2 << 30,
        "2gib": 2 << 30,
        "2 GiB": 2 << 30,
        "1.5g": 1_500_000_000,
        "800MB": 800_000_000,
        "800m": 800_000_000,
        "2048Ki": 2 << 20,
        "4194304B": 4 << 20,
        "1TiB": 1 << 40,
    }
    assert {text: parse_bytes(text) for text in amounts} == amounts


@pytest.mark.parametrize("parse", BAD_TEXTS)
def test_bad_texts(parse):
    name, texts = BAD_TEXTS[parse]
    for text in texts:
        with pytest.raises(UsageError) as caught:
            parse(text)
        assert caught.value.for_command_line().startswith(f"--{name} {text}: not a"), text


def test_memory_without_a_unit_or_below_1_mb_is_refused():
    refusals = {
        "10": "has no unit; write one, such as 10GiB or 10MiB",
        "0": "has no unit",
        "999999B": "too little to be meant (at least 1 MB)",
        "0.0GiB": "too little to be meant",
        "500KiB": "too little to be meant",
    }
    for text, words in refusals.items():
        with pytest.raises(UsageError) as caught:
            parse_bytes(text)
        assert caught.value.for_command_line().startswith(f"--memory {text}: {words}")
    for name in ("memory", "vram"):
        with pytest.raises(UsageError, match=f"{name}=10: too little"):
            Request(**{name: 10})


def test_memory_error_names_its_option():
    with pytest.raises(UsageError) as caught:
        parse_bytes("lots", name="vram")
    assert caught.value.for_command_line().startswith("--vram lots: ")


def test_bad_values():
    for options, words in BAD_VALUES:
        with pytest.raises(UsageError) as caught:
            Request(**options)
        assert words in str(caught.value), options


def test_bad_values_on_the_command_line():
    with pytest.raises(UsageError) as caught:
        Request(blend=-8)
    assert caught.value.for_command_line() == (
        "--blend -8: must be from 0 (no cross-fade) to 512 low-resolution pixels"
    )


def test_seed_has_64_bits():
    assert [Request(seed=seed).seed for seed in (0, 1, 2**32, MAX_SEED)] == [0, 1, 2**32, 2**64 - 1]


def test_stream_is_an_alias_of_batched():
    assert Request(executor="stream") == Request(executor="batched")
    assert dataclasses.replace(Request(), executor="stream").executor == "batched"


def test_halo_policy_combines_overlap_and_tolerance():
    assert Request(seam_tolerance=0.25).halo_policy == HaloPolicy("auto", 0.25)


def test_requests_are_values():
    assert Request(size=(4, 5)) == Request(size=(4, 5))
    with pytest.raises(dataclasses.FrozenInstanceError):
        Request().seed = 2


def test_values_may_be_written_in_several_ways():
    expected = Request(
        size=(400, 300),
        roi=Box(20, 10, 60, 40),
        memory=2 << 30,
        vram=800_000_000,
        init=Path("photo.jpg"),
        seed=7,
        overlap="8",
        seam_tolerance=2.0,
    )
    texts = {
        "size": "400x300",
        "roi": "10,20,30,40",
        "memory": "2GiB",
        "vram": "800MB",
        "init": "photo.jpg",
        "seed": "7",
    }
    arrays = {"size": np.array([400, 300]), "roi": [10, 20, 30, 40], "memory": np.int64(2 << 30), "seed": np.uint8(7)}
    assert Request(**texts, overlap=8, seam_tolerance=2) == expected
    assert Request(**texts | arrays, overlap=np.int32(8), seam_tolerance=np.float32(2)) == expected
    assert expected.shape_for((3, 4)) == (300, 400)
    assert Request().shape_for((3, 4)) is None
    assert {Request(noise_gain=gains).noise_gain for gains in ("1,2.5", (1, 2.5), [1.0, 2.5])} == {(1.0, 2.5)}
    assert Request(noise_gain=0).noise_gain == (0.0,)
    assert Request(noise_gain="1,1") == Request(noise_gain=1) == Request()


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Request)])
def test_wrong_types_are_refused_at_once(name):
    for value in (object(), {"a": 1}, 1.5j, b"x"):
        with pytest.raises(UsageError) as caught:
            Request(**{name: value})
        assert str(caught.value).startswith(f"{name}: {value!r} is not "), value
        assert "; give " in str(caught.value)
    optional = next(field for field in dataclasses.fields(Request) if field.name == name).default is None
    if optional:
        assert getattr(Request(**{name: None}), name) is None
    else:
        with pytest.raises(UsageError, match=f"{name}: None is not"):
            Request(**{name: None})


WRONG = [
    ({"size": "large"}, "size='large': not a size; write WIDTHxHEIGHT"),
    ({"size": (5, 0)}, "size: (5, 0) is not a size; give (width, height)"),
    ({"size": (5,)}, "size: (5,) is not a size"),
    ({"size": (5.5, 3)}, "size: (5.5, 3) is not a size"),
    ({"roi": (1, 2, 3, 0)}, "roi: (1, 2, 3, 0) is not a region; give (x, y, width, height), a Box"),
    ({"roi": "1,2"}, "roi='1,2': not a region"),
    ({"memory": "lots"}, "memory='lots': not an amount of memory"),
    ({"memory": 0}, "memory=0: too little to be meant"),
    ({"vram": "lots"}, "vram='lots'"),
    ({"seed": 1.5}, "seed: 1.5 is not a whole number"),
    ({"seed": True}, "seed: True is not a whole number"),
    ({"tile": "wide"}, "tile='wide': not a tile; write a side such as 64, or WIDTHxHEIGHT such as 128x64"),
    ({"tile": "64x"}, "tile='64x': not a tile"),
    ({"tile": (64, 0)}, "tile: (64, 0) is not a tile"),
    ({"tile": 64.5}, "tile: 64.5 is not a tile"),
    ({"dither": 1}, "dither: 1 is not True or False"),
    ({"noise_gain": "1,loud"}, "noise_gain='1,loud': not a factor; write one, or one per step such as 1,2"),
    ({"noise_gain": (1, "2")}, "noise_gain: '2' is not a number"),
]


def test_wrong_values_are_refused_at_once():
    for options, words in WRONG:
        with pytest.raises(UsageError) as caught:
            Request(**options)
        assert str(caught.value).startswith(words), options
        assert "\n" not in str(caught.value)


def test_type_checkers_know_every_option():
    assert set(RequestOptions.__annotations__) == {field.name for field in dataclasses.fields(Request)}


def test_help_is_readable():
    """The signature shows defaults only, and every option has its type, its default and its text."""
    text = pydoc.plain(pydoc.render_doc(Request))
    assert "Annotated[" not in text
    for field in dataclasses.fields(Request):
        assert re.search(rf"{field.name}: .+ = {re.escape(repr(field.default))}\n \|          [A-Z].{{15}}", text), (
            field.name
        )


def test_sizes_by_scale_and_width():
    """The other side follows from the picture, to the nearest pixel."""
    assert Request(scale=2.5).shape_for((30, 41)) == (75, 102)
    assert Request(scale=1).shape_for((1, 7)) == (1, 7)
    assert Request(width=100).shape_for((2, 3)) == (67, 100)
    assert Request(width=1).shape_for((1, 1000)) == (1, 1)
    assert Request(width=2**31 - 1).shape_for((10**6, 10**6)) == (2**31 - 1, 2**31 - 1)
    for options in (
        {"scale": 0.5},
        {"scale": 65},
        {"scale": float("nan")},
        {"width": 0},
        {"width": 2**31},
        {"scale": True},
    ):
        with pytest.raises(UsageError, match=f"^{next(iter(options))}"):
            Request(**options)
    for options in ({"size": (3, 4), "scale": 2}, {"scale": 2, "width": 4}, {"size": (3, 4), "width": 4}):
        with pytest.raises(UsageError, match="exclude each other"):
            Request(**options)


def test_pictures_of_a_command_share_all_but_their_file():
    shared = PictureRequest(scale=2, memory="2GiB", dither=True)
    assert shared.of(Path("a.png")) == Request(scale=2, memory="2GiB", dither=True, init=Path("a.png"))
