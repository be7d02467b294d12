"""The table of architectures: detection, building, and one line for everything that can be wrong with a checkpoint."""

import pytest
import torch

from engine.archs import ARCHITECTURES, build, identify
from engine.archs.compact import Compact
from engine.archs.esrgan import RRDBNet
from engine.archs.span import SPAN
from engine.archs.swinir import SwinIR
from engine.errors import ModelError

SMALL = {
    "esrgan": lambda: RRDBNet(channels=8, blocks=2, growth=4),
    "swinir": lambda: SwinIR(dim=8, depths=(2, 2), heads=(2, 2), window=4, hidden=12, features=6),
    "compact": lambda: Compact(channels=8, convs=2),
    "span": lambda: SPAN(channels=8),
}


FIRST = {"esrgan": "conv_first", "swinir": "conv_first", "compact": "body.0", "span": "conv_1"}
INNER = {"esrgan": "conv_hr", "swinir": "conv_hr", "compact": "body.2", "span": "conv_2"}
LAST = {"esrgan": "conv_last", "swinir": "conv_last", "compact": "body.6", "span": "upsampler.0"}
"""Names of convolutions."""


@pytest.fixture(params=SMALL)
def name(request):
    return request.param


@pytest.fixture
def state(name):
    torch.manual_seed(0)
    return SMALL[name]().state_dict()


def refusal(state):
    with pytest.raises(ModelError) as caught:
        build(state, "some.pth")
    message = str(caught.value)
    assert message.startswith("some.pth")
    assert "\n" not in message
    return message


def test_every_architecture_is_tried():
    assert [architecture.name for architecture in ARCHITECTURES] == list(SMALL)


def test_exactly_one_architecture_detects_its_tensors(name, state):
    assert [a.name for a in ARCHITECTURES if a.detect(state)] == [name]
    assert identify(state).name == name


def test_built_for_inference(state):
    net = build(state)
    assert not net.training
    assert not any(parameter.requires_grad for parameter in net.parameters())
    assert all(tensor.device.type == "cpu" for tensor in (*net.parameters(), *net.buffers()))
    assert torch.isfinite(net(torch.rand(1, 3, 8, 8))).all()


def test_built_network_holds_the_tensors(name, state):
    network = SMALL[name]()
    network.load_state_dict(state)
    x = torch.rand(1, 3, 8, 8)
    assert torch.equal(build(state)(x), network(x))


def test_half_precision_files_become_fp32(state):
    net = build({name: tensor.half() for name, tensor in state.items()})
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}


def test_full_precision_is_not_copied(name, state):
    first = f"{FIRST[name]}.weight"
    assert build(state).get_parameter(first).data_ptr() == state[first].data_ptr()


def test_unknown_architecture():
    message = refusal({f"encoder.{i}.weight": torch.zeros(1) for i in range(9)})
    assert "9 tensors (encoder.0.weight, encoder.1.weight, encoder.2.weight, ...)" in message
    assert "not supported (ESRGAN, SwinIR, Compact and SPAN are)" in message
    assert "0 tensors" in refusal({})


def test_missing(name, state):
    inner = INNER[name]
    del state[f"{inner}.weight"], state[f"{inner}.bias"]
    assert f"2 tensors ({inner}.weight, {inner}.bias) missing" in refusal(state)


def test_missing_size(name, state):
    known_by_all_names = name == "compact"
    for key in (f"{FIRST[name]}.weight", f"{LAST[name]}.weight")[known_by_all_names:]:
        message = refusal({k: tensor for k, tensor in state.items() if k != key})
        assert key in message
        assert "missing" in message


def test_misshapen(name, state):
    key = f"{INNER[name]}.weight"
    state[key] = torch.zeros(4, 8, 3, 3)
    message = refusal(state)
    assert f"1 tensor ({key}) misshapen; {key} is [4, 8, 3, 3], expected [" in message


def test_misshapen_size(name, state):
    for shape in [(), (8,)]:
        assert "misshapen" in refusal(state | {f"{FIRST[name]}.weight": torch.zeros(shape)})


def test_impossible_size(state, name):
    key, tensor = {
        "esrgan": ("conv_first.weight", torch.zeros(8, 5, 3, 3)),
        "swinir": ("layers.0.residual_group.blocks.0.attn.relative_position_bias_table", torch.zeros(49, 3)),
        "compact": ("body.6.weight", torch.zeros(40, 8, 3, 3)),
        "span": ("upsampler.0.weight", torch.zeros(3 * 17**2, 8, 3, 3)),
    }[name]
    assert f"({name}): " in refusal(state | {key: tensor})


def test_unexpected(name, state):
    extra = "body.1.bias" if name == "compact" else "conv_extra.weight"
    assert f"1 tensor ({extra}) unexpected" in refusal(state | {extra: torch.zeros(1)})


def test_not_finite(name, state):
    key = f"{INNER[name]}.bias"
    for value in (float("nan"), float("inf")):
        state[key][:2] = value
        assert f"{key} holds 2 NaN or infinite values of" in refusal(state)


def test_not_floating_point(name, state):
    key = f"{INNER[name]}.bias"
    state[key] = state[key].to(torch.int8)
    assert f"{key} is stored as torch.int8" in refusal(state)
