"""Footprints: a known appetite is measured, kept for the machine, and measured again when the file is damaged."""

import json
import mmap
import time

import pytest
import torch

from engine.device.memory import PeakMemory
from engine.device.queue import OutOfDeviceMemory
from engine.plan.measured import Footprint
from engine.probe import footprint

CPU = torch.device("cpu")


def hungry(per_pixel, fixed=0):
    """Takes ``fixed`` + ``per_pixel`` bytes a pixel from the system, touches them, and gives them back."""

    def run(height, width):
        # Not from the heap, which keeps what it was given back.
        with mmap.mmap(-1, fixed + height * width * per_pixel) as block:
            block[:: mmap.PAGESIZE] = bytes(len(range(0, len(block), mmap.PAGESIZE)))

    return run


@pytest.mark.parametrize("per_pixel", [500, 4_000])
@pytest.mark.parametrize("fixed", [0, 30_000_000])
def test_the_line_is_that_of_the_function(per_pixel, fixed):
    measured = footprint.measure(hungry(per_pixel, fixed), CPU)
    assert measured.per_pixel == pytest.approx(per_pixel, rel=0.25)
    for side in (64, 128, 512):
        assert measured.bytes_at(side**2) == pytest.approx(fixed + per_pixel * side**2, rel=0.25)


def test_a_network_takes_at_least_its_output(small_rrdb):
    """The bound that a plan is checked against must not be below what the result alone takes."""
    with torch.inference_mode():
        measured = footprint.measure(lambda h, w: small_rrdb(torch.rand(1, 3, h, w)), CPU)
    # Two maps of 16 channels at the size of the output are alive at once.
    assert measured.per_pixel > 2 * 16 * 16 * 4
    assert measured.per_pixel < 100 * 16 * 16 * 4


def test_nothing_is_not_negative():
    measured = footprint.measure(lambda h, w: None, CPU)
    assert measured.fixed >= 0
    assert measured.per_pixel >= 0
    assert measured.bytes_at(10**6) < 1 << 30


def test_time_is_that_of_the_larger_shape():
    def run(height, width):
        end = time.perf_counter() + height * width * 1e-6
        while time.perf_counter() < end:
            pass

    assert footprint.measure(run, CPU, largest=96).seconds_per_pixel == pytest.approx(1e-6, rel=0.5)


@pytest.mark.parametrize("align", [1, 8, 12, 48])
@pytest.mark.parametrize("largest", [64, 160, 256])
def test_shapes_are_whole_windows(align, largest):
    sides = []
    footprint.measure(lambda h, w: sides.append((h, w)), CPU, align, largest)
    assert all(h == w and h % align == 0 for h, w in sides)
    assert len(set(sides)) == 2
    assert max(sides)[0] <= max(largest, 2 * align)


@pytest.mark.parametrize(("largest", "expected"), [(1000, [192, 384]), (200, [96, 192]), (100, None)])
def test_an_accelerator_is_measured_at_larger_shapes_if_they_fit(monkeypatch, largest, expected):
    monkeypatch.setattr("engine.probe.footprint.accelerator_module", lambda device: torch.cpu)
    sides = []

    def run(height, width):
        if height > largest:
            raise OutOfDeviceMemory("CUDA out of memory")
        sides.append(height)

    if expected is None:
        with pytest.raises(OutOfDeviceMemory):
            footprint.measure(run, CPU)
    else:
        footprint.measure(run, CPU)
        assert sides[-4:] == [side for side in expected for _ in range(2)]


def test_the_peak_is_seen_after_it_is_gone():
    with PeakMemory(CPU) as peak:
        hungry(60_000_000)(1, 1)
    assert peak.host - peak.start == pytest.approx(60_000_000, rel=0.2)
    with PeakMemory(CPU) as second:
        pass
    # The peak of the block before is forgotten.
    assert second.host - second.start < 20_000_000


# The cache


@pytest.fixture
def calls(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return []


def asked(calls, key=("sr", "0123", "cpu", "fp32"), value=None):
    def measure_it():
        calls.append(key)
        return value or Footprint(1, 2.0, 3.0)

    return footprint.cached(key, measure_it)


def test_what_was_measured_is_not_measured_again(calls):
    assert asked(calls) == asked(calls) == Footprint(1, 2.0, 3.0)
    assert len(calls) == 1


def test_other_networks_have_measurements_of_their_own(calls):
    asked(calls)
    assert asked(calls, ("sr", "0123", "cpu", "bf16"), Footprint(9, 9.0, 9.0)) == Footprint(9, 9.0, 9.0)
    assert asked(calls).fixed == 1


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"fixed": 1}', "null", '{"fixed":1,"per_pixel":2,"more":3}'])
def test_a_damaged_file_is_measured_again(calls, tmp_path, content):
    asked(calls)
    (file,) = tmp_path.rglob("*.json")
    file.write_text(content)
    assert asked(calls) == Footprint(1, 2.0, 3.0)
    assert len(calls) == 2
    assert json.loads(file.read_text())["fixed"] == 1


def test_a_cache_that_cannot_be_written_costs_only_time(calls, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert asked(calls) == asked(calls) == Footprint(1, 2.0, 3.0)
    assert len(calls) == 2


def test_nothing_half_written_is_left(calls, tmp_path):
    asked(calls)
    assert [p.suffix for p in tmp_path.rglob("*") if p.is_file()] == [".json"]


def test_the_cache_is_not_the_users(cache_home):
    assert footprint.cache_folder() == cache_home / "ourgan-engine"
