"""Exploration of a model, as the page of engine view asks for it: samples, images, and what they leave behind."""

import shlex
import threading

import numpy as np
import pytest
from support.stores import attributes, pixels, render, shards

from engine.errors import BudgetError, UsageError
from engine.explore import Exploration
from engine.geometry import Box
from engine.plan.request import Request

SIZE = (512, 384)
PATIENCE = 300
"""Seconds that a busy machine may take."""


class Page:
    """Waits for states of an exploration."""

    def __init__(self, exploration):
        self.exploration, self._changed = exploration, threading.Event()
        exploration.on_change = self._changed.set
        exploration.start()

    def wait(self, condition):
        while not condition(self.exploration.state):
            assert self._changed.wait(PATIENCE), self.exploration.state
            self._changed.clear()
        return self.exploration.state


@pytest.fixture
def explore(tmp_path, models):
    """Function that starts an exploration of a small model; it ends with the test."""
    opened = []

    def start(name="rrdb", **changes):
        request = Request(**{"size": SIZE, "precision": "fp32", "tile": 64} | changes)
        command = lambda planned: ["engine", "render", str(planned.seed)]  # noqa: E731
        opened.append(Exploration(models[name], request, tmp_path / "views", command))
        return Page(opened[-1])

    yield start
    for exploration in opened:
        exploration.close()


def test_a_sample_is_chosen_looked_at_and_finished(tmp_path, models, explore):
    page = explore()
    exploration = page.exploration
    exploration.want_samples(0, 10**9)
    exploration.want_samples(3, 2)  # nobody looks at the others any more
    page.wait(lambda state: state["samples"] == ["3", "4"])
    sheet = exploration.state["sheet"]
    assert exploration.sample(sheet, 99) is None
    samples = [exploration.sample(sheet, seed) for seed in (3, 4)]
    assert (samples[0] != samples[1]).any()
    with pytest.raises(UsageError, match="size"):
        exploration.open(3, "0x9")
    exploration.open(3, None)
    page.wait(lambda state: state["seed"] == "3" and not state["computing"] and exploration.look is not None)
    number, store = exploration.canvas
    assert exploration.state["gain"] is None  # without noise channels
    assert (store.name, shards(store)) == (f"{models['rrdb'].path.stem}-3-512x384.zarr", 0)
    exploration.view(Box(200, 300, 210, 310))
    page.wait(lambda state: state["command"])
    assert shlex.split(exploration.command) == ["engine", "render", "3", "--out", str(store), "--resume"]
    assert attributes(store)["command"] == ["engine", "render", "3"]
    exploration.render(is_wanted=True)
    page.wait(lambda state: state["rendering"] is False and not state["computing"])
    request = Request(size=SIZE, seed=3, precision="fp32", executor="bands", tile=64)
    whole = render(models["rrdb"], request, tmp_path / "whole.zarr")
    np.testing.assert_array_equal(pixels(store), pixels(whole.out))
    np.testing.assert_array_equal(samples[0], whole.base_image(3))
    exploration.open(4, "300x400")
    assert page.wait(lambda state: state["seed"] == "4")["size"] == [300, 400]
    assert exploration.canvas[0] == number + 1
    assert exploration.state["sheet"] == sheet + 1
    assert exploration.close() is None
    assert [path.name for path in store.parent.iterdir()] == [store.name]


def test_what_cannot_be_continued_gets_another_store(tmp_path, models, explore):
    page = explore()
    page.exploration.open(1, None)
    page.wait(lambda state: state["seed"] == "1")
    page.exploration.view(Box(0, 0, 9, 9))
    page.wait(lambda state: state["command"])
    first = page.exploration.canvas[1]
    page.exploration.close()
    again = explore()
    again.exploration.open(1, None)
    again.wait(lambda state: state["seed"] == "1")
    assert again.exploration.canvas[1] == first
    other = explore(dither=True)
    other.exploration.open(1, None)
    other.wait(lambda state: state["seed"] == "1")
    assert other.exploration.canvas[1].stem == f"{first.stem}-2"


def test_a_noise_gain_is_seen_in_a_crop_and_opened(tmp_path, models, explore):
    """The crop has the pixels of the render that opens then, in strips of its own; of several wishes the last one counts."""
    page = explore("noisy")
    exploration = page.exploration
    exploration.want_crop(2, 9, 9)  # of no image
    exploration.open(3, None)
    assert page.wait(lambda state: state["seed"] == "3" and not state["computing"])["gain"] == 1
    plain = exploration.canvas[1]
    halos = [stage["halo"] for stage in attributes(plain)["plan"]["stages"]]
    with pytest.raises(UsageError, match="noise_gain=4.01: must be from 0"):
        exploration.want_crop(4.01, 9, 9)
    exploration.view(Box(0, 0, 9, 9))
    for wish in ((0, 9, 9), (3.5, 10**9, 10**9), (2, 300, 200)):
        exploration.want_crop(*wish)
    state = page.wait(lambda state: state["crop"] and state["crop"]["gain"] == 2 and not state["cropping"])
    number, (x, y, width, height) = state["crop"]["number"], state["crop"]["box"]
    assert (x, y, width, height) == (156, 104, 288, 192)
    crop = exploration.crop(number)
    assert exploration.crop(number - 1) is None
    exploration.open(3, None, 2)
    page.wait(lambda state: state["gain"] == 2 and state["seed"] == "3")
    assert exploration.crop(number) is None
    store = exploration.canvas[1]
    assert store.name == f"{models['noisy'].path.stem}-3-512x384-gain2.zarr"
    exploration.render(is_wanted=True)
    page.wait(lambda state: state["rendering"] is False and not state["computing"])
    overlap = str(max(halos))
    request = Request(size=SIZE, seed=3, precision="fp32", executor="bands", tile=64, noise_gain=2, overlap=overlap)
    whole = pixels(render(models["noisy"], request, tmp_path / "whole.zarr").out)
    np.testing.assert_array_equal(pixels(store), whole)
    np.testing.assert_array_equal(crop, whole[:, y : y + height, x : x + width].transpose(1, 2, 0))
    exploration.open(3, None, 1)
    page.wait(lambda state: state["gain"] == 1 and state["seed"] == "3")
    assert exploration.canvas[1] == plain


def test_memory_holds_the_page_too(explore):
    with pytest.raises(BudgetError, match="for the page"):
        explore(memory="200MiB")
