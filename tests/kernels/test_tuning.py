"""Choice of a tile: measured once for a shape, a size and a machine, and read from the disk afterwards."""

import json

import pytest
import torch

from engine.kernels import tuning
from engine.probe import cache

TILES = ((8, 8), (16, 16), (32, 32))
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A machine without memory, on which 16 x 16 is fastest and 32 x 32 spills; returns the list of timed tiles."""
    timed = []

    def seconds(call, device):
        call()
        return {8: 2e-3, 16: 1e-3, 32: 1e-9}[timed[-1]]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "_store", cache.Group("tiles"))
    monkeypatch.setattr(tuning, "_stack", lambda kernel, grid, arguments, options, device: 40 * (options["side"] == 32))
    monkeypatch.setattr(tuning, "_seconds", seconds)
    monkeypatch.setattr(tuning, "launch", lambda *_, side: timed.append(side))
    return timed


def start(tile, launcher):
    launcher(None, (1,), side=tile[0])


def choose(shape=("conv", 64, 32), device=CPU, tiles=TILES):
    return tuning.fastest("name 1", tiles, shape, device, start)


def test_the_fastest_that_does_not_spill_is_measured_once(machine, monkeypatch):
    assert choose() == choose() == (16, 16)
    assert machine == [8, 16]
    monkeypatch.setattr(tuning, "_chosen", {})  # another process
    assert choose() == (16, 16)
    assert machine == [8, 16]


def test_the_only_one_that_does_not_spill_is_not_measured(machine):
    assert choose(tiles=TILES[1:]) == (16, 16)
    assert choose(tiles=TILES[2:]) == (32, 32)  # nothing else can run
    assert not machine


def test_size_shape_device_and_versions_are_measured_apart(machine, monkeypatch):
    choose()
    for shape in (("conv", 64, 64), ("conv", 64, 32, tuning.size_bucket(2**14))):
        choose(shape)
    monkeypatch.setattr(tuning, "_chosen", {})
    choose(device=torch.device("mps"))
    monkeypatch.setattr(torch, "__version__", "99")
    choose()
    assert machine == [8, 16] * 5
    assert tuning.size_bucket(128 * 128) != tuning.size_bucket(512 * 512)
    assert tuning.size_bucket(500 * 500) == tuning.size_bucket(512 * 511)


@pytest.mark.parametrize(
    "data",
    [
        "not JSON",
        [],
        {"tile": [64, 64], "seconds": 1e-3},
        {"tile": [32], "seconds": 1e-3},
        {"tile": [32, 32], "seconds": 1e-3},  # spills
        {"tile": 16, "seconds": 1e-3},
        {"tile": [8, 8]},
        {"tile": [8, 8], "seconds": -1.0},
        {"tile": [8, 8], "seconds": float("nan")},
        {"tile": [8, 8], "seconds": "1"},
    ],
    ids=str,
)
def test_poisoned_entries_are_measured_again(machine, monkeypatch, tmp_path, data):
    choose()
    (path,) = tmp_path.rglob("tiles/*.json")
    good = path.read_text()
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    monkeypatch.setattr(tuning, "_chosen", {})
    assert choose() == (16, 16)
    assert machine == [8, 16] * 2
    assert path.read_text() == good


def test_a_sound_entry_is_believed(machine, monkeypatch, tmp_path):
    """The disk may at worst choose a slow tile."""
    choose()
    (path,) = tmp_path.rglob("tiles/*.json")
    path.write_text(json.dumps({"tile": [8, 8], "seconds": 1e-3}))
    monkeypatch.setattr(tuning, "_chosen", {})
    assert choose() == (8, 8)


def test_where_nothing_can_be_measured_the_first_is_taken(machine, monkeypatch):
    monkeypatch.setattr(tuning, "_seconds", lambda *_: float("inf"))
    assert choose() == (8, 8)
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose(device=torch.device("cuda", 0)) == (8, 8)
    assert not tuning._chosen
