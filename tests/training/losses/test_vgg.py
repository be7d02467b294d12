"""VGG's feature maps against plain operations; files that are found, read and refused."""

import pytest
import torch
from safetensors.torch import save_file
from support.random_vgg import BEFORE_POOLING, CONVOLUTIONS, random_vgg
from torch.nn import functional as F

from engine.errors import InputError, UsageError
from engine.model.weight_files import WeightFile, weights_folder
from engine.training.losses.perceptual import PERCEPTUAL
from engine.training.losses.vgg import VGGFeatures, missing_vgg_error, open_vgg


@pytest.fixture(scope="module")
def states():
    return {name: random_vgg(name) for name in CONVOLUTIONS}


@pytest.fixture(scope="module")
def files(states, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vgg")
    for name, state in states.items():
        torch.save(state | {"classifier.0.weight": torch.zeros(4, 4)}, folder / f"{name}.pth")
    return {name: folder / f"{name}.pth" for name in states}


def by_hand(name, state, x):
    """Outputs of all convolutions and ReLUs by name."""
    x = (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    maps, block, number = {}, 1, 0
    for index in CONVOLUTIONS[name]:
        number += 1
        x = F.conv2d(x, state[f"features.{index}.weight"], state[f"features.{index}.bias"], padding=1)
        maps[f"conv{block}_{number}"] = x
        x = x.relu()
        maps[f"relu{block}_{number}"] = x
        if index in BEFORE_POOLING[name]:
            x, block, number = F.max_pool2d(x, 2), block + 1, 0
    return maps


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("VGG-16", ("relu1_2", "relu2_2", "relu3_3", "relu4_3")),
        ("VGG-16", ("conv5_3",)),
        ("VGG-19", ("conv1_2", "conv2_2", "conv3_4", "conv4_4", "conv5_4")),
        ("VGG-19", ("conv3_1", "relu3_1")),
    ],
)
def test_maps(files, states, name, layers):
    x = torch.rand(2, 3, 32, 48)
    network, expected = VGGFeatures(files[name], layers), by_hand(name, states[name], x)
    maps = network(x)
    assert network.name == name
    assert maps.keys() == set(layers)
    for layer in layers:
        torch.testing.assert_close(maps[layer], expected[layer], rtol=1e-4, atol=1e-4)


def test_both_networks_have_the_layers_of_forms(files):
    layers = PERCEPTUAL["forms"].weights
    for name in CONVOLUTIONS:
        assert VGGFeatures(files[name], tuple(layers))(torch.rand(1, 3, 16, 16)).keys() == layers.keys()


def test_weights_are_frozen(files):
    network = VGGFeatures(files["VGG-16"], ("relu2_2",))
    x = torch.rand(1, 3, 16, 16, requires_grad=True)
    network(x)["relu2_2"].sum().backward()
    assert x.grad.abs().max() > 0
    assert not any(p.requires_grad for p in network.parameters())
    assert len(network.features) == 9  # the network ends behind its last named layer


def test_half_precision_file(states, tmp_path):
    path = tmp_path / "vgg16.safetensors"
    save_file({key: value.half() for key, value in states["VGG-16"].items()}, path)
    network = open_vgg(path, ("relu1_1",))
    assert network(torch.rand(1, 3, 16, 16))["relu1_1"].dtype == torch.float32
    torch.testing.assert_close(network.features[0].bias.data, states["VGG-16"]["features.0.bias"].half().float())


def test_published_files(files, tmp_path, monkeypatch):
    """Found by name in torch.hub's folder and in the engine's, and refused with other contents."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert open_vgg(None, ("relu1_1",)) is None
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "vgg19_bn-c79401a0.pth").touch()
    assert open_vgg(None, ("relu1_1",)) is None
    (folder / "vgg16-397923af.pth").symlink_to(files["VGG-16"])
    with pytest.raises(InputError, match="expected 397923af: not torchvision's VGG-16"):
        open_vgg(None, ("relu3_3",))
    monkeypatch.setattr(WeightFile, "check", lambda self, path: None)
    assert open_vgg(None, ("relu3_3",)).name == "VGG-16"
    assert open_vgg(None, ("relu3_3", "conv5_4")) is None  # VGG-16 has no such layer
    (folder / "vgg19-dcbb9e9d.pth").symlink_to(files["VGG-19"])
    assert open_vgg(None, ("relu3_3",)).name == "VGG-19"
    assert open_vgg(files["VGG-16"], ("relu3_3",)).name == "VGG-16"
    weights_folder().mkdir(parents=True)
    save_file(random_vgg("VGG-16"), weights_folder() / "vgg16-c679942c.safetensors")
    (folder / "vgg19-dcbb9e9d.pth").unlink()
    assert open_vgg(None, ("relu3_3",)).path.parent == weights_folder()


@pytest.mark.parametrize(
    ("layers", "advice"), [(("relu3_3",), "engine weights fetch vgg16"), (("conv5_4",), "vgg19-dcbb9e9d.pth into")]
)
def test_missing_weights_are_explained(layers, advice):
    assert advice in str(missing_vgg_error(layers))


def test_other_networks_are_refused(states, tmp_path):
    path, usual = tmp_path / "other.safetensors", {key: value.half() for key, value in states["VGG-16"].items()}
    others = {
        "no features.14": {key: value for key, value in usual.items() if key != "features.14.weight"},
        "larger kernel": usual | {"features.0.weight": torch.zeros(64, 3, 5, 5)},
        "a layer too many": usual | {"features.30.weight": torch.zeros(1)},
        "another network": {"conv_first.weight": torch.zeros(64, 3, 3, 3)},
    }
    for name, state in others.items():
        save_file(state, path)
        with pytest.raises(InputError, match="neither VGG-16 nor VGG-19") as error:
            VGGFeatures(path, ("relu1_1",))
        assert str(path) in str(error.value), name
        assert "\n" not in str(error.value), name


def test_bad_files_and_layers_are_refused(files, tmp_path):
    with pytest.raises(InputError, match="no such file"):
        open_vgg(tmp_path / "none.pth", ("relu1_1",))
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(InputError, match="damaged"):
        open_vgg(tmp_path / "text.pth", ("relu1_1",))
    with pytest.raises(UsageError, match="VGG-16 has no layer conv5_4; give weights of VGG-19"):
        VGGFeatures(files["VGG-16"], ("relu1_1", "conv5_4"))
    with pytest.raises(UsageError, match="12 x 16 pixels"):
        VGGFeatures(files["VGG-16"], ("relu1_1",))(torch.zeros(1, 3, 12, 16))
