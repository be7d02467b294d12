"""Networks by spandrel behind the engine's interface; each is named where it cannot run."""

import pytest
import torch
from support.community import drunet, mixdehazenet, mosr, output_of, state_of
from support.streams import whole

from engine.archs import build, foreign, identify
from engine.bands.graph import read_graph
from engine.errors import ModelError, UsageError
from engine.geometry import UNBOUNDED


@pytest.fixture
def state():
    return state_of(mosr())


def test_equals_spandrel(state, picture):
    network, image = build(state), picture(20, 24)
    assert identify(state).name == "spandrel MoSR"
    expected, scale = output_of(state, image)
    assert (network.scale, network.align, network.has_halves) == (scale, 1, False)
    assert network.radius >= UNBOUNDED
    torch.testing.assert_close(whole(network, image), expected.clamp(0, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("make", "side"), [(drunet, 16), (mixdehazenet, 40)])
def test_a_network_is_called_as_spandrel_calls_it(make, side, picture):
    state, image = state_of(make()), picture(side, side)
    expected, _ = output_of(state, image)
    assert expected.std() > 0
    torch.testing.assert_close(whole(build(state), image), expected.clamp(0, 1), rtol=0, atol=1e-5)


def test_bands_are_refused(state):
    with pytest.raises(UsageError, match="a network by spandrel: cannot be streamed in bands"):
        read_graph(build(state), 1)


def test_incomplete_files_are_refused_in_one_line(state):
    del state["gblocks.1.fc2.weight"]
    with pytest.raises(
        ModelError, match=r"^some.pth \(spandrel MoSR\): spandrel cannot load MoSR \(.*\); fetch it"
    ) as caught:
        build(state, "some.pth")
    assert "\n" not in str(caught.value)


def test_without_spandrel_its_extra_is_named(state, monkeypatch):
    monkeypatch.setattr(foreign, "is_installed", lambda: False)
    with pytest.raises(ModelError, match=r"MoSR is not supported .*; install ourgan-engine\[models\]"):
        identify(state)
