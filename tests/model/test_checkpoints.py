"""Checkpoints: safetensors and pickles are read as they were written; every damaged file is refused in one line."""

import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from engine.archs.esrgan import RRDBNet
from engine.errors import ModelError
from engine.model.checkpoints import READERS, read_checkpoint


@pytest.fixture
def state():
    torch.manual_seed(0)
    return RRDBNet(channels=3, blocks=1, growth=3).state_dict()


def same(loaded, expected):
    return loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in expected)


def refusal(path):
    with pytest.raises(ModelError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(str(path.with_suffix("")))
    assert "\n" not in message
    return message


def test_safetensors(tmp_path, state):
    state["conv_hr.weight"] = state["conv_hr.weight"].half()
    save_file(state, tmp_path / "net.safetensors")
    loaded = read_checkpoint(str(tmp_path / "net.safetensors"))
    assert same(loaded, state)
    assert loaded["conv_hr.weight"].dtype == torch.float16


def test_pickles(tmp_path, state):
    for suffix in (".pth", ".pt", ".PTH"):
        for zipped in (True, False):
            path = tmp_path / f"net{suffix}"
            torch.save(state, path, _use_new_zipfile_serialization=zipped)
            assert same(read_checkpoint(path), state), (suffix, zipped)


def test_wrapped_pickles(tmp_path, state):
    path = tmp_path / "net.pth"
    for wrapper in ("params_ema", "params", "state_dict"):
        torch.save({"epoch": 3, wrapper: {f"module.{name}": t for name, t in state.items()}}, path)
        assert same(read_checkpoint(path), state), wrapper


def test_the_ema_comes_first(tmp_path, state):
    torch.save({"params": {"a": torch.zeros(1)}, "params_ema": state}, tmp_path / "net.pth")
    assert same(read_checkpoint(tmp_path / "net.pth"), state)


# Refusals


def test_missing_files_and_folders_are_refused(tmp_path):
    for suffix in READERS:
        path = tmp_path / f"net{suffix}"
        assert "no such file" in refusal(path)
        path.mkdir()
        assert "not a file" in refusal(path)


def test_other_suffixes_are_refused(tmp_path):
    (tmp_path / "net.onnx").write_bytes(b"")
    assert "choose one of .safetensors, .pth, .pt, .param, .bin" in refusal(tmp_path / "net.onnx")


def test_garbage_is_refused(tmp_path):
    for content in (b"", b"garbage", b"\x80\x02}q\x00.", bytes(range(256)) * 9, b"PK\x03\x04" + bytes(99)):
        for suffix in (".safetensors", ".pth", ".pt"):
            path = tmp_path / f"net{suffix}"
            path.write_bytes(content)
            refusal(path)


def test_truncated_files_are_refused(tmp_path, state):
    for kind in ("safetensors", "pth", "legacy.pth"):
        path = tmp_path / f"net.{kind}"
        if kind == "safetensors":
            save_file(state, path)
        else:
            torch.save(state, path, _use_new_zipfile_serialization=kind == "pth")
        content = path.read_bytes()
        for share in (0.02, 0.5, 0.99):
            path.write_bytes(content[: int(share * len(content))])
            assert "damaged" in refusal(path), (kind, share)


def test_torchscript_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "net.pt", "w") as content:
        content.writestr("net/constants.pkl", pickle.dumps(()))
        content.writestr("net/code/main.py", "")
    assert "not a checkpoint of PyTorch" in refusal(tmp_path / "net.pt")


class Command:
    """Pickles to a call, as an attacker's file does."""

    def __reduce__(self):
        return (print, ("ran",))


def test_pickles_that_would_run_code_are_refused(tmp_path, capsys):
    path = tmp_path / "net.pth"
    for zipped in (True, False):
        torch.save({"a": Command()}, path, _use_new_zipfile_serialization=zipped)
        message = refusal(path)
        assert all(text in message for text in ("would run code", "print", "safetensors"))
    for protocol in (2, 4):
        path.write_bytes(pickle.dumps(Command(), protocol))
        refusal(path)
    assert capsys.readouterr().out == ""


def test_pickles_without_named_tensors_are_refused(tmp_path):
    for content in ({}, [], {"epoch": 3}, {"params": {"a": [1]}}, {7: torch.zeros(1)}, torch.zeros(3)):
        torch.save(content, tmp_path / "net.pth")
        assert "named tensor" in refusal(tmp_path / "net.pth")
