"""The table of architectures: detection, building, and one line for everything that can be wrong with a checkpoint."""

import pytest
import torch

from engine.archs import ARCHITECTURES, build, identify
from engine.archs.esrgan import RRDBNet
from engine.archs.swinir import SwinIR
from engine.errors import ModelError

SMALL = {
    "esrgan": lambda: RRDBNet(channels=8, blocks=2, growth=4),
    "swinir": lambda: SwinIR(dim=8, depths=(2, 2), heads=(2, 2), window=4, hidden=12, features=6),
}


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


def test_full_precision_is_not_copied(state):
    assert build(state).conv_first.weight.data_ptr() == state["conv_first.weight"].data_ptr()


def test_unknown_architecture():
    message = refusal({f"encoder.{i}.weight": torch.zeros(1) for i in range(9)})
    assert "9 tensors (encoder.0.weight, encoder.1.weight, encoder.2.weight, ...)" in message
    assert "not supported (ESRGAN x4 and SwinIR nearest+conv are)" in message
    assert "0 tensors" in refusal({})


def test_missing(state):
    del state["conv_hr.weight"], state["conv_hr.bias"]
    assert "2 tensors (conv_hr.weight, conv_hr.bias) missing" in refusal(state)


def test_missing_size(state):
    del state["conv_first.weight"]
    assert "the tensor conv_first.weight, which tells the network's size, is missing" in refusal(state)


def test_misshapen(state):
    state["conv_last.weight"] = torch.zeros(4, 8, 3, 3)
    message = refusal(state)
    assert "1 tensor (conv_last.weight) misshapen; conv_last.weight is [4, 8, 3, 3], expected [3," in message


def test_misshapen_size(state):
    for shape in [(), (8,)]:
        assert "misshapen" in refusal(state | {"conv_first.weight": torch.zeros(shape)})


def test_impossible_size(state, name):
    key, tensor = {
        "esrgan": ("conv_first.weight", torch.zeros(8, 5, 3, 3)),
        "swinir": ("layers.0.residual_group.blocks.0.attn.relative_position_bias_table", torch.zeros(49, 3)),
    }[name]
    assert f"({name}): " in refusal(state | {key: tensor})


def test_unexpected(state):
    assert "1 tensor (conv_extra.weight) unexpected" in refusal(state | {"conv_extra.weight": torch.zeros(1)})


def test_not_finite(state):
    for value in (float("nan"), float("inf")):
        state["conv_up1.bias"][:2] = value
        assert "conv_up1.bias holds 2 NaN or infinite values of" in refusal(state)


def test_not_floating_point(state):
    state["conv_up1.bias"] = state["conv_up1.bias"].to(torch.int8)
    assert "conv_up1.bias is stored as torch.int8" in refusal(state)
