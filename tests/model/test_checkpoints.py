"""Checkpoints: safetensors and pickles are read as they were written; every damaged file is refused in one line."""

import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from support.model_files import refusal

from engine.model.checkpoints import READERS, read_checkpoint


def same(loaded, expected):
    return loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in expected)


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


def test_contents_decide_the_format(tmp_path, state):
    for name in ("net.pth", "net.ckpt", "net.bin", "net"):
        save_file(state, tmp_path / name)
        assert same(read_checkpoint(tmp_path / name), state), name
    for name in ("net.safetensors", "net.ckpt", "net.bin", "net"):
        for zipped in (True, False):
            torch.save(state, tmp_path / name, _use_new_zipfile_serialization=zipped)
            assert same(read_checkpoint(tmp_path / name), state), name


def prefixed(prefix, state):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


OTHER = {"conv0.weight": torch.zeros(2)}
WRAPPED = {
    "params_ema": lambda state: {"epoch": 3, "params_ema": state},
    "params": lambda state: {"params": prefixed("module.", state), "iter": 7},
    "state_dict": lambda state: {"state_dict": prefixed("module.", state)},
    "model": lambda state: {"model": state, "optimizer": {"state": {0: torch.zeros(1)}, "param_groups": [{}]}},
    "model, nested": lambda state: {"model": {"params": state}},
    "netG": lambda state: {"netG": state, "netD": OTHER},
    "another name": lambda state: {"upscaler": state, "optimizers": [{}]},
    "Lightning": lambda state: {"state_dict": prefixed("netG.", state) | prefixed("netD.", OTHER)},
    "compiled": lambda state: {"params": prefixed("module._orig_mod.", state)},
    "model.": lambda state: {"state_dict": prefixed("model.", state)},
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrapped_pickles(tmp_path, state, kind):
    torch.save(WRAPPED[kind](state), tmp_path / "net.pth")
    assert same(read_checkpoint(tmp_path / "net.pth"), state)


def test_names_that_begin_with_model_are_kept(tmp_path):
    state = {"model.0.weight": torch.zeros(1), "model.1.sub.0.RDB1.conv1.0.weight": torch.zeros(1)}
    torch.save(state, tmp_path / "net.pth")
    assert same(read_checkpoint(tmp_path / "net.pth"), state)


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


def test_other_files_are_refused(tmp_path):
    (tmp_path / "net.txt").write_text("a text")
    assert "not a checkpoint; name a file such as .safetensors, .pth, .pt, .ckpt, .param, .bin" in refusal(
        tmp_path / "net.txt"
    )


def test_onnx_graphs_are_refused_by_name_and_by_contents(tmp_path):
    (tmp_path / "net.onnx").write_bytes(b"")
    (tmp_path / "net.pth").write_bytes(b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:")
    for name in ("net.onnx", "net.pth"):
        assert "an ONNX graph, which is not supported; name the .pth or .safetensors" in refusal(tmp_path / name)


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
    assert "a TorchScript program, not a checkpoint" in refusal(tmp_path / "net.pt")


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


def test_ambiguous_and_foreign_wrappers_are_named(tmp_path):
    refusals = [
        ({"a": OTHER, "b": OTHER}, "holds several sets of tensors ('a', 'b'); save the network's alone"),
        ({"epoch": 1, "optimizers": [{}], "schedulers": [{}]}, "the state of a training, without weights; name"),
        ({"nunif_model": 1, "name": "waifu2x.upcunet", "state_dict": OTHER}, "waifu2x.upcunet is not supported"),
    ]
    for content, words in refusals:
        torch.save(content, tmp_path / "net.pth")
        assert words in refusal(tmp_path / "net.pth")


def test_pickles_without_named_tensors_are_refused(tmp_path):
    for content in ({}, [], {"epoch": 3}, {"params": {"a": [1]}}, {7: torch.zeros(1)}, torch.zeros(3)):
        torch.save(content, tmp_path / "net.pth")
        assert "named tensor" in refusal(tmp_path / "net.pth")
