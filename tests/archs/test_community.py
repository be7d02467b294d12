"""Networks that the engine does not run: named by their tensors, and told from incomplete files.

``community_names.txt`` holds the tensor names of small networks that spandrel 0.4.2 and spandrel_extra_arches 0.2.0 build,
without repetitions.
"""

import pytest
import torch
from support.archs import COMMUNITY_NAMES as NAMES

from engine.archs import build, identify
from engine.archs.community import SIGNATURES, recognise
from engine.archs.esrgan import RRDBNet
from engine.archs.swinir import SwinIR
from engine.errors import ModelError


def refusal(state):
    with pytest.raises(ModelError) as caught:
        identify(state, "some.pth")
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_every_network_is_recognised_by_its_own_signature():
    for label, names in NAMES.items():
        line = recognise(names)
        assert line is not None, label
        assert line.name.split()[0] == label.split()[0], label


def test_a_signature_needs_all_its_tensors():
    for line in SIGNATURES:
        assert recognise(line.tensors) is line
        for name in line.tensors:
            assert recognise(set(line.tensors) - {name}) is not line


def test_the_networks_of_the_engine_are_not_in_the_table():
    for network in (RRDBNet(channels=8, blocks=1, growth=4), SwinIR(dim=8, depths=(2,), heads=(2,), window=4)):
        assert recognise(network.state_dict()) is None


def test_networks_with_the_tensors_of_swinir_are_not_taken_for_it():
    assert identify(dict.fromkeys(NAMES["HAT"], torch.zeros(1))).name == "spandrel HAT"
    message = refusal(dict.fromkeys(NAMES["SRFormer"], torch.zeros(1)))
    assert message.startswith("some.pth: SRFormer is not supported (ESRGAN, SwinIR, Compact and SPAN are); open it")


def test_parts_of_a_training_are_named():
    discriminator = {"conv0.weight": torch.zeros(1), "conv1.weight_orig": torch.zeros(1)}
    assert "discriminator of Real-ESRGAN's training is not supported" in refusal(discriminator)
    assert "name the generator's file" in refusal(discriminator)


# Incomplete files


BLOCK = {
    "sequential": "model.1.sub.0.RDB{}.conv{}.0",
    "trunk": "RRDB_trunk.0.RDB{}.conv{}",
    "basicsr": "body.0.rdb{}.conv{}",
}
HEAD = {
    "sequential": ("model.0", "model.1.sub.1"),
    "trunk": ("conv_first", "trunk_conv"),
    "basicsr": ("conv_first", "conv_body"),
}
TAIL = {
    "sequential": ("model.3", "model.6", "model.8", "model.10"),
    "trunk": ("upconv1", "upconv2", "HRconv", "conv_last"),
    "basicsr": ("conv_up1", "conv_up2", "conv_hr", "conv_last"),
}


def esrgan(naming):
    """Tensors of an ESRGAN of 8 channels and one block."""
    names = [*HEAD[naming], *(BLOCK[naming].format(i, j) for i in (1, 2, 3) for j in range(1, 6)), *TAIL[naming]]
    state = {f"{name}.weight": torch.zeros(8, 8, 3, 3) for name in names}
    state[f"{names[0]}.weight"], state[f"{names[-1]}.weight"] = torch.zeros(8, 3, 3, 3), torch.zeros(3, 8, 3, 3)
    return state | {f"{name}.bias": torch.zeros(8) for name in names}


@pytest.mark.parametrize("naming", BLOCK)
def test_incomplete_files_are_still_incomplete(naming):
    first, _, hr, last = TAIL[naming]
    for name in (first, hr, last):
        state = {key: tensor for key, tensor in esrgan(naming).items() if not key.startswith(f"{name}.")}
        with pytest.raises(
            ModelError, match=r"2 tensors .* missing of \d+; the file is incomplete|the tensor .* is missing"
        ):
            build(state)


def test_an_upsampling_is_missed_where_files_number_them():
    state = {key: tensor for key, tensor in esrgan("sequential").items() if not key.startswith("model.6.")}
    with pytest.raises(ModelError, match=r"the tensor model\.6\.weight, .* is missing"):
        build(state)


def test_incomplete_swinir_is_still_incomplete():
    network = SwinIR(dim=8, depths=(2,), heads=(2,), window=4, hidden=12, features=6)
    for name in ("conv_up1", "conv_hr", "conv_last"):
        state = {key: tensor for key, tensor in network.state_dict().items() if not key.startswith(name)}
        with pytest.raises(ModelError, match="missing"):
            build(state)
