"""Networks by spandrel behind the engine's interface: in bands where their code is local, named where they cannot run."""

import pytest
import torch
from support.community import (
    dncnn,
    drunet,
    mixdehazenet,
    moesr,
    mosr,
    omnisr,
    output_of,
    plksr,
    realplksr,
    safmn,
    state_of,
    swiftsrgan,
)
from support.streams import pour, whole

from engine.archs import build, foreign, identify
from engine.bands.graph import radius
from engine.bands.stream import RowStream, StreamPlan
from engine.errors import ModelError, UsageError
from engine.geometry import UNBOUNDED
from engine.run.stage import Stage

EXACT = 2e-6
"""Tolerance for values in [0, 1]: float32 sums in another order."""


@pytest.fixture
def state():
    return state_of(mosr())


def stage_of(make, precision="fp32"):
    state = state_of(make())
    return Stage(build(state), torch.device("cpu"), precision, lambda: build(state))


def test_equals_spandrel(state, picture):
    network, image = build(state), picture(20, 24)
    assert identify(state).name == "spandrel MoSR"
    expected, scale = output_of(state, image)
    assert (network.scale, network.align, network.has_halves) == (scale, 1, False)
    torch.testing.assert_close(whole(network, image), expected.clamp(0, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("make", "side"), [(drunet, 16), (mixdehazenet, 40)])
def test_a_network_is_called_as_spandrel_calls_it(make, side, picture):
    state, image = state_of(make()), picture(side, side)
    expected, _ = output_of(state, image)
    assert expected.std() > 0
    torch.testing.assert_close(whole(build(state), image), expected.clamp(0, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "make", [mosr, plksr, lambda: realplksr(layer_norm=True), dncnn, swiftsrgan, drunet, moesr, safmn]
)
def test_bands_equal_the_whole_picture(make, picture):
    """Layer norms of channels, parts of channels, some of them written to, layers of half the size, and constant maps."""
    stage = stage_of(make)
    unit = max(4, stage.align)
    image = picture(11 * unit, 2 * unit)
    expected = whole(stage.network, image)
    assert expected.std() > 0.02
    streamed = pour(RowStream(StreamPlan(stage.graph, unit, 2 * unit)), image)
    assert (streamed - expected).abs().max() <= EXACT
    assert stage.radius < UNBOUNDED <= stage.network.radius


def test_the_radius_follows_from_the_trace(picture):
    """A pixel changes the output up to the radius of MoSR, and not beyond."""
    stage = stage_of(mosr)
    image = picture(4, 2 * stage.radius + 6)
    other, x = image.clone(), stage.radius + 3
    other[:, :, x] = 1 - other[:, :, x]
    changed = (whole(stage.network, image) != whole(stage.network, other)).any(0).any(0).nonzero().flatten() // 2
    assert {int(changed.min()), int(changed.max())} == {x - stage.radius, x + stage.radius}


def test_half_precision_streams_what_was_checked_in_float32():
    stage = stage_of(mosr, "bf16")
    assert stage.radius == radius(stage_of(mosr).graph, 1)
    assert {stage.graph.values[op.name].dtype for op in stage.graph.ops} >= {torch.bfloat16}
    assert not stage_of(realplksr, "bf16").can_stream


@pytest.mark.parametrize(("make", "reason"), [(realplksr, r"GroupNorm \(.*\)"), (omnisr, "a network by spandrel")])
@pytest.mark.filterwarnings("ignore:torch.meshgrid")
def test_other_networks_run_in_tiles(make, reason):
    stage = stage_of(make)
    assert (stage.can_stream, stage.radius) == (False, stage.network.radius)
    with pytest.raises(UsageError, match=rf"^{reason}: cannot be streamed in bands \(.*\); use executor='tiles'$"):
        _ = stage.graph


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
