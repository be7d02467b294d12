"""Networks of SIFID and LPIPS: filled from published files, never from others."""

from importlib import util

import pytest
import torch

from engine.errors import ModelError
from engine.metrics import weights
from engine.metrics.inception import InceptionPrefix
from engine.metrics.lpips import AlexFeatures
from engine.metrics.weights import fill, load_inception, load_lpips, read_weights
from engine.model.weight_files import WEIGHTS, hub_folder

CACHE = hub_folder()  # the user's, before the fixture hides it


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch):
    """Point PyTorch's cache to an empty folder."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def test_missing_files_are_named(tmp_path):
    (line,) = weights.missing("sifid", tmp_path / "mine")
    assert "inception_v3_google-0cc3c7bd.pth is missing (torchvision's Inception-v3 of ImageNet); download" in line
    assert str(tmp_path / "mine") in line
    assert weights.missing("lpips", None)[0].endswith("; run engine weights fetch alexnet")
    with pytest.raises(ModelError, match=r"alexnet-owt-7be5be79\.pth is missing|alex\.pth is missing") as caught:
        load_lpips(None)
    assert caught.value.exit_code == 4
    assert "--weights-dir" in caught.value.for_command_line()
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=r"inception_v3_google-0cc3c7bd\.pth is missing"):
        load_inception(None)


def test_other_contents_are_refused(tmp_path):
    torch.save({"a": torch.rand(3)}, tmp_path / "alex.pth")
    with pytest.raises(ModelError, match="expected df73285e: not the linear heads of LPIPS 0.1 for AlexNet; delete it"):
        read_weights(WEIGHTS["lpips"], tmp_path)


def test_whole_inception_fills_prefix():
    """A file may hold more than the prefix, and no batch counters."""
    source, network = InceptionPrefix(), InceptionPrefix()
    state = {k: v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}
    fill(network, {**state, "fc.weight": torch.rand(1000, 2048), "Mixed_7a.x": torch.rand(2)}, "Inception")
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
    heads = read_weights(WEIGHTS["lpips"], None)
    shapes = [tuple(heads[f"lin{layer}.model.1.weight"].shape) for layer in range(5)]
    assert shapes == [(1, c, 1, 1) for c in (64, 192, 384, 256, 256)]
    assert all(float(head.min()) >= 0 for head in heads.values())


@pytest.mark.skipif(bool(weights.missing("sifid", None)), reason="torchvision's Inception-v3 is not in the cache")
def test_published_inception():
    load_inception(CACHE)


@pytest.mark.skipif(bool(weights.missing("lpips", None)), reason="AlexNet or the heads are not in the cache")
def test_published_alexnet():
    load_lpips(CACHE)
