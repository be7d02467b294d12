"""Footprints: a known cost is measured, cached for the machine, and measured again when the cache is damaged."""

import json
import mmap
from statistics import median
from types import SimpleNamespace

import pytest
import torch

from engine.device.memory import PeakMemory
from engine.device.queue import OutOfDeviceMemory
from engine.plan.measured import Footprint
from engine.probe import cache, footprint
from engine.probe.sides import side_within

CPU = torch.device("cpu")


def hungry(per_pixel, fixed=0):
    """Function that takes ``fixed`` + ``per_pixel`` bytes a pixel from the system, touches them, and frees them."""

    def run(height, width):
        # Not from the heap, which keeps freed blocks.
        with mmap.mmap(-1, fixed + height * width * per_pixel) as block:
            block[:: mmap.PAGESIZE] = bytes(len(range(0, len(block), mmap.PAGESIZE)))

    return run


def test_line_is_that_of_the_function():
    for per_pixel in (500, 4_000):
        for fixed in (0, 30_000_000):
            # The system counts resident pages for each core and adds them up late: one reading may be off by megabytes.
            measured = [footprint.measure(hungry(per_pixel, fixed), CPU) for _ in range(3)]
            assert median(m.per_pixel for m in measured) == pytest.approx(per_pixel, rel=0.25)
            for side in (64, 128, 512):
                taken = median(m.bytes_at(side**2) for m in measured)
                assert taken == pytest.approx(fixed + per_pixel * side**2, rel=0.25)


def test_network_takes_at_least_its_output(small_rrdb):
    """The bound that a plan is checked against is not below the bytes of the output alone."""
    with torch.inference_mode():
        measured = footprint.measure(lambda h, w: small_rrdb(torch.rand(1, 3, h, w)), CPU)
    # Two maps of 16 channels at the size of the output are alive at once.
    assert measured.per_pixel > 2 * 16 * 16 * 4
    assert measured.per_pixel < 100 * 16 * 16 * 4


def test_empty_run_is_not_negative():
    measured = footprint.measure(lambda h, w: None, CPU)
    assert measured.fixed >= 0
    assert measured.per_pixel >= 0
    assert measured.bytes_at(10**6) < 1 << 30


def test_time_is_that_of_the_larger_shape(monkeypatch):
    """By a clock that only the run advances: a first run of a shape takes longer, and is not counted."""
    seconds, shapes = 0.0, set()

    def run(height, width):
        nonlocal seconds
        seconds += (1 if (height, width) in shapes else 100) * (height * width * 1e-6 + 0.01)
        shapes.add((height, width))

    monkeypatch.setattr(footprint, "time", SimpleNamespace(perf_counter=lambda: seconds))
    measured = footprint.measure(run, CPU, largest=100)
    assert shapes == {(50, 50), (100, 100)}
    assert measured.seconds_per_pixel == pytest.approx(1e-6 + 0.01 / 100**2)


def test_shapes_are_whole_windows():
    for align in (1, 8, 12, 48):
        for largest in (64, 160, 256):
            sides = []
            footprint.measure(lambda h, w, sides=sides: sides.append((h, w)), CPU, align, largest)
            assert all(h == w and h % align == 0 for h, w in sides)
            assert len(set(sides)) == 2
            assert max(sides)[0] <= max(largest, 2 * align)


def test_accelerator_is_measured_at_larger_shapes_if_they_fit(monkeypatch):
    monkeypatch.setattr("engine.probe.footprint.memory_module", lambda device: torch.cpu)
    for largest, expected in ((1000, [192, 384]), (200, [96, 192]), (100, [48, 96]), (50, None)):
        sides = []

        def run(height, width, largest=largest, sides=sides):
            if height > largest:
                raise OutOfDeviceMemory("CUDA out of memory")
            sides.append(height)

        if expected is None:
            with pytest.raises(OutOfDeviceMemory):
                footprint.measure(run, CPU)
        else:
            footprint.measure(run, CPU)
            assert sides[-4:] == [side for side in expected for _ in range(2)]


def test_peak_is_measured_after_it_is_freed():
    with PeakMemory(CPU) as peak:
        hungry(60_000_000)(1, 1)
    assert peak.host - peak.start == pytest.approx(60_000_000, rel=0.2)
    with PeakMemory(CPU) as second:
        pass
    assert second.host - second.start < 20_000_000  # the peak of the block before is reset


# The cache


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Keys that were measured, with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return []


def cached(calls, key=("sr", "0123", "cpu", "fp32"), value=None):
    def measure_it():
        calls.append(key)
        return value or Footprint(1, 2.0, 3.0)

    return footprint.cached(key, measure_it)


def test_measured_once(calls):
    assert cached(calls) == cached(calls) == Footprint(1, 2.0, 3.0)
    assert len(calls) == 1
    other = ("sr", "0123", "cpu", "bf16")
    assert cached(calls, other, Footprint(9, 9.0, 9.0)) == Footprint(9, 9.0, 9.0)
    assert cached(calls).fixed == 1
    assert len(calls) == 2


POISON = ("null", "-1", "NaN", "Infinity", "1e999", '"2"', "true", "[2]")


def test_damaged_file_is_measured_again(calls, tmp_path):
    cached(calls)
    (file,) = tmp_path.rglob("*.json")
    poisoned = [f'{{"fixed": 1, "per_pixel": {n}, "seconds_per_pixel": 3}}' for n in POISON]
    for content in (
        "",
        "{",
        "[]",
        "{}",
        '{"fixed": 1}',
        '{"fixed":1,"per_pixel":2,"more":3}',
        "[" * 200_000,
        *poisoned,
    ):
        before = len(calls)
        file.write_text(content)
        assert cached(calls) == Footprint(1, 2.0, 3.0)
        assert len(calls) == before + 1, content
        assert json.loads(file.read_text())["fixed"] == 1


def test_read_only_cache_costs_only_time(calls, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert cached(calls) == cached(calls) == Footprint(1, 2.0, 3.0)
    assert len(calls) == 2


def test_no_half_written_file_is_left(calls, tmp_path):
    cached(calls)
    assert [p.suffix for p in tmp_path.rglob("*") if p.is_file()] == [".json"]


def test_cache_is_not_the_users(cache_home):
    assert cache.cache_folder() == cache_home / "ourgan-engine"


def test_the_largest_side_that_fits_is_measured(monkeypatch):
    monkeypatch.setattr("engine.probe.sides.resident", lambda: 1000)
    assert side_within(None, 192, 48, 1) == 192
    sides = [side_within(1000 + side**2, 192, 48, 1) for side in (192, 191, 144, 143, 96, 95, 72, 71, 48, 1)]
    assert sides == [192, 144, 144, 96, 96, 72, 72, 48, 48, 48]
