"""Files of the user: an output never destroys an input, and a file is replaced on request only."""

import shutil

import pytest


@pytest.fixture
def folder(tmp_path, monkeypatch, model_file, photo, start_file, narrow_structure):
    monkeypatch.chdir(tmp_path)
    shutil.copy(model_file, "model.safetensors")
    (tmp_path / "link.safetensors").symlink_to("model.safetensors")
    (tmp_path / "link.png").symlink_to("photo.png")
    (tmp_path / "other.safetensors").write_bytes(b"mine")
    return tmp_path


SIZE = "--size 64x48 --precision fp32"
TRAIN = "--device cpu --preset quick"
# Command line, exit code and words of the error.
REFUSALS = [
    (f"render model.safetensors {SIZE} --out o.zarr --report model.safetensors", 2, "is the input model.safetensors"),
    (f"render model.safetensors {SIZE} --out o.zarr --report link.safetensors", 2, "is the input model.safetensors"),
    ("render start.safetensors --init photo.png --out photo.png --overwrite", 2, "--out photo.png: is the input"),
    ("render start.safetensors --init photo.png --out link.png --overwrite", 2, "--out link.png: is the input"),
    ("render start.safetensors --init photo.png --out o.zarr --report photo.png", 2, "is the input photo.png"),
    (f"render model.safetensors {SIZE} --out o.zarr --report o.zarr/r.json", 2, "cannot be written"),
    ("probe model.safetensors --image photo.png --plot link.png", 2, "--plot link.png: is the input photo.png"),
    ("model build --sr start.safetensors --out other.safetensors", 4, "other.safetensors: exists; give --overwrite"),
    ("model build --sr start.safetensors --out start.safetensors --overwrite", 2, "is the input start.safetensors"),
    (f"train structure photo.png --out photo.png {TRAIN} --overwrite", 2, "--out photo.png: is the input"),
    (f"train structure photo.png --out other.safetensors {TRAIN} --iterations 1", 4, "other.safetensors: exists; give --overwrite"),
    (f"train sr photo.png --out other.safetensors --start start.safetensors {TRAIN}", 4, "exists; give --overwrite"),
    (f"train sr photo.png --out start.safetensors --start start.safetensors {TRAIN} --overwrite", 2, "is the input"),
    (f"train distil photo.png --out start.safetensors --teacher start.safetensors {TRAIN} --overwrite", 2, "is the input"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "code", "words"), REFUSALS, ids=[line for line, *_ in REFUSALS])
def test_no_file_of_the_user_is_lost(call, folder, line, code, words):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    got, out, err = call(line)
    (error,) = [one for one in err.splitlines() if one.startswith("engine: ")]
    assert (got, out) == (code, "")
    assert words in error
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_build_replaces_on_request(call, folder):
    code, _, _ = call("model build --sr start.safetensors --out other.safetensors --overwrite")
    assert code == 0
    assert (folder / "other.safetensors").read_bytes() != b"mine"
