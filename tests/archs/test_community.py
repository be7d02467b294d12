"""Networks that the engine does not run: named by their tensors, and told from incomplete files.

``community_names.txt`` holds the tensor names of small networks that spandrel 0.4.2 and spandrel_extra_arches 0.2.0 build,
without repetitions. Variants of ESRGAN and SwinIR are made here; spandrel loads each of them.
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
    for name in ("HAT", "DRCT", "SRFormer"):
        message = refusal(dict.fromkeys(NAMES[name], torch.zeros(1)))
        assert message.startswith(f"some.pth: {name} is not supported (ESRGAN x4 and SwinIR nearest+conv are); open it")


def test_parts_of_a_training_are_named():
    discriminator = {"conv0.weight": torch.zeros(1), "conv1.weight_orig": torch.zeros(1)}
    assert "discriminator of Real-ESRGAN's training is not supported" in refusal(discriminator)
    assert "name the generator's file" in refusal(discriminator)


# Variants of ESRGAN


def tail(upsamplings, naming):
    """Names of the convolutions behind the blocks."""
    ups = range(1, upsamplings + 1)
    if naming == "sequential":
        return [f"model.{3 * i}" for i in ups] + [f"model.{3 * upsamplings + 2}", f"model.{3 * upsamplings + 4}"]
    if naming == "trunk":
        return [f"upconv{i}" for i in ups] + ["HRconv", "conv_last"]
    return [f"conv_up{i}" for i in ups] + ["conv_hr", "conv_last"]


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


def esrgan(upsamplings, naming="basicsr", inputs=3):
    """Tensors of an ESRGAN of 8 channels and one block with any number of upsamplings."""
    names = [
        *HEAD[naming],
        *(BLOCK[naming].format(i, j) for i in (1, 2, 3) for j in range(1, 6)),
        *tail(upsamplings, naming),
    ]
    state = {f"{name}.weight": torch.zeros(8, 8, 3, 3) for name in names}
    state[f"{names[0]}.weight"] = torch.zeros(8, inputs, 3, 3)
    return state | {f"{name}.bias": torch.zeros(8) for name in names}


@pytest.mark.parametrize("naming", BLOCK)
def test_variants_of_esrgan(naming):
    assert identify(esrgan(2, naming)).name == "esrgan"
    for inputs in (12, 48):  # folded pixels, which the engine runs
        assert identify(esrgan(2, naming, inputs)).name == "esrgan"
    for arguments, name in [
        ((0,), "ESRGAN x1 (no upsampling)"),
        ((1,), "ESRGAN x2 (one upsampling)"),
        ((3,), "ESRGAN x8 (3 upsamplings)"),
        ((2, 1), "ESRGAN x4 (greyscale)"),
        ((2, 4), "ESRGAN x4 (RGBA)"),
        ((1, 1), "ESRGAN x2 (one upsampling, greyscale)"),
    ]:
        upsamplings, *inputs = arguments
        message = refusal(esrgan(upsamplings, naming, *inputs))
        assert message.startswith(f"some.pth: {name} is not supported ("), arguments
        assert message.endswith("open it with spandrel, the loader of chaiNNer")


def test_esrgan_plus():
    assert "ESRGAN+ x4 is not" in refusal(esrgan(2) | {"body.0.rdb1.conv1x1.weight": torch.zeros(8, 8, 1, 1)})


@pytest.mark.parametrize("naming", BLOCK)
def test_incomplete_files_are_still_incomplete(naming):
    for name in tail(2, naming)[::3] + tail(2, naming)[2:3]:  # the first upsampling and both last convolutions
        state = {key: tensor for key, tensor in esrgan(2, naming).items() if not key.startswith(f"{name}.")}
        with pytest.raises(ModelError, match=r"2 tensors .* missing of \d+; the file is incomplete"):
            build(state)


# Variants of SwinIR

DIM, FEATURES = 8, 6


def swinir(upsampler, scale=4, resi="1conv", inputs=3):
    """Tensors of a SwinIR of any form."""
    own = 2 if scale == 2 else 4
    state = SwinIR(dim=DIM, depths=(2,), heads=(2,), window=4, hidden=12, features=FEATURES, scale=own).state_dict()
    state["conv_first.weight"] = torch.zeros(DIM, inputs, 3, 3)
    if upsampler != "nearest+conv":
        state = {key: tensor for key, tensor in state.items() if not key.startswith(("conv_up", "conv_hr"))}
    if upsampler == "pixelshuffle":
        for i in range(1 if scale == 3 else scale.bit_length() - 1):
            state[f"upsample.{2 * i}.weight"] = torch.zeros(FEATURES * (9 if scale == 3 else 4), FEATURES, 3, 3)
    elif upsampler != "nearest+conv":
        state = {key: tensor for key, tensor in state.items() if not key.startswith("conv_before_upsample")}
    if upsampler == "pixelshuffledirect":
        del state["conv_last.weight"]
        state["upsample.0.weight"] = torch.zeros(inputs * scale**2, DIM, 3, 3)
    if resi == "3conv":
        state["conv_after_body.0.weight"] = state.pop("conv_after_body.weight")
    return state


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        *((("pixelshuffle", scale), f"SwinIR x{scale} (pixelshuffle)") for scale in (2, 3, 4, 8)),
        *((("pixelshuffledirect", scale), f"SwinIR x{scale} (pixelshuffledirect)") for scale in (2, 3, 4)),
        (("no", 1), "SwinIR x1 (no upsampling)"),
        (("no", 1, "1conv", 1), "SwinIR x1 (no upsampling, greyscale)"),
        (("nearest+conv", 4, "3conv"), "SwinIR x4 (nearest+conv, 3conv)"),
        (("nearest+conv", 2, "3conv"), "SwinIR x2 (nearest+conv, 3conv)"),
        (("nearest+conv", 4, "1conv", 1), "SwinIR x4 (nearest+conv, greyscale)"),
    ],
)
def test_variants_of_swinir(arguments, name):
    assert refusal(swinir(*arguments)).startswith(f"some.pth: {name} is not supported (")


def test_swinir_of_the_own_form():
    assert [identify(swinir("nearest+conv", scale)).name for scale in (2, 4)] == ["swinir"] * 2


def test_incomplete_swinir_is_still_incomplete():
    for name in ("conv_up1", "conv_hr", "conv_last"):
        state = {key: tensor for key, tensor in swinir("nearest+conv").items() if not key.startswith(name)}
        with pytest.raises(ModelError, match="missing"):
            build(state)
