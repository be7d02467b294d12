"""Files of weights: found by name, checked by digest, never replaced by others."""

import hashlib
from importlib import util

import pytest
import torch

from engine.errors import ModelError
from engine.metrics import weights
from engine.metrics.inception import InceptionPrefix
from engine.metrics.lpips import AlexFeatures
from engine.metrics.weights import ALEXNET, HEADS, INCEPTION, WeightFile, fill, load_inception, load_lpips

CACHE = weights.hub_folder()  # the user's, before the fixture hides it


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch):
    """Point PyTorch's cache to an empty folder."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def saved(folder, state, name="weights-{}.pth"):
    """Save a file whose name carries its digest, as PyTorch's do; returns its description."""
    folder.mkdir(exist_ok=True)
    path = folder / "part"
    torch.save(state, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    path = path.rename(folder / name.format(digest))
    return WeightFile({path.name: digest}, "random weights", "nowhere")


def test_names_carry_digests():
    for file in (INCEPTION, ALEXNET):
        for name, digest in file.names.items():
            assert name.endswith(f"-{digest}.pth")
    assert next(iter(INCEPTION.names)) == "inception_v3_google-0cc3c7bd.pth"
    assert list(ALEXNET.names) == ["alexnet-owt-7be5be79.pth", "alexnet-owt-4df8aa71.pth"]


def test_missing_files_are_named(tmp_path, hub):
    (line,) = weights.missing("sifid", None)
    assert "inception_v3_google-0cc3c7bd.pth is missing" in line
    assert str(hub) in line
    (line,) = weights.missing("sifid", tmp_path / "mine")
    assert str(tmp_path / "mine") in line
    with pytest.raises(ModelError, match=r"alexnet-owt-7be5be79\.pth is missing|alex\.pth is missing") as caught:
        load_lpips(None)
    assert caught.value.exit_code == 4
    assert "--weights-dir" in caught.value.for_command_line()
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=r"inception_v3_google-0cc3c7bd\.pth is missing"):
        load_inception(None)


def test_folder_comes_before_cache(tmp_path, hub):
    state = {"a": torch.rand(3)}
    file = saved(hub, state)
    (name,) = file.names
    assert file.find(None) == file.find(tmp_path) == hub / name
    saved(tmp_path / "mine", state)
    assert file.find(tmp_path / "mine") == tmp_path / "mine" / name
    torch.testing.assert_close(file.load(None)["a"], state["a"])


def test_wrong_digest_is_refused(tmp_path):
    folder = tmp_path / "mine"
    file = saved(folder, {"a": torch.rand(3)})
    torch.save({"a": torch.rand(3)}, folder / next(iter(file.names)))
    with pytest.raises(ModelError, match="sha256 begins with .*: not random weights; download it again from nowhere"):
        file.load(folder)


def test_whole_inception_fills_prefix(tmp_path):
    """A file may hold more than the prefix, and no batch counters."""
    source, network = InceptionPrefix(), InceptionPrefix()
    state = {k: v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}
    file = saved(tmp_path / "mine", {**state, "fc.weight": torch.rand(1000, 2048), "Mixed_7a.x": torch.rand(2)})
    fill(network, file.load(tmp_path / "mine"), file.content)
    x = torch.rand(1, 3, 90, 90)
    for a, b in zip(network.eval()(x), source.eval()(x), strict=True):
        torch.testing.assert_close(a, b)


def test_wrong_tensors_are_named():
    state = dict(AlexFeatures().state_dict())
    with pytest.raises(ModelError, match=r"features\.6\.weight is \[2, 2\], expected \[384, 192, 3, 3\]"):
        fill(AlexFeatures(), {**state, "features.6.weight": torch.rand(2, 2)}, "AlexNet")
    del state["features.8.bias"]
    with pytest.raises(ModelError, match=r"features\.8\.bias is missing, expected \[256\]"):
        fill(AlexFeatures(), state, "AlexNet")


@pytest.mark.skipif(util.find_spec("lpips") is None, reason="the lpips package is not installed")
def test_heads_of_lpips_package():
    heads = HEADS.load(None)
    shapes = [tuple(heads[f"lin{layer}.model.1.weight"].shape) for layer in range(5)]
    assert shapes == [(1, c, 1, 1) for c in (64, 192, 384, 256, 256)]
    assert all(float(head.min()) >= 0 for head in heads.values())


@pytest.mark.skipif(bool(weights.missing("sifid", None)), reason="torchvision's Inception-v3 is not in the cache")
def test_published_inception():
    load_inception(CACHE)


@pytest.mark.skipif(bool(weights.missing("lpips", None)), reason="AlexNet or the heads are not in the cache")
def test_published_alexnet():
    load_lpips(CACHE)
