"""First weights by name, from a file, with fewer blocks and from scratch; metadata of a weights file."""

import pytest
import torch
from safetensors.torch import load_file

from engine import archs
from engine.archs.esrgan import RRDBNet
from engine.errors import InputError, ModelError, UsageError
from engine.model.build import build
from engine.model.checkpoints import read_provenance
from engine.training.sr.networks import Shape, architecture_of, open_start, save


def test_file_is_opened_unchanged(start_file):
    start = open_start(str(start_file), Shape(), 0)
    state = start.network.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in load_file(start_file).items())
    assert all(p.requires_grad for p in start.network.parameters())
    assert (start.source, start.licence, start.sigma) == ("start.safetensors", "not stated", 0.0)


def test_model_gives_stage_of_index(tmp_path, start_file):
    state, path = load_file(start_file), tmp_path / "model.safetensors"
    state["conv_last.bias"] = state["conv_last.bias"] + 1
    save(
        tmp_path / "other.safetensors", state, {"licence": "CC0-1.0", "source": "a test", "sigma": 0.05}, torch.float32
    )
    build(None, [str(start_file), str(tmp_path / "other.safetensors")]).save(path)
    first, second, third = (open_start(str(path), Shape(), 0, index) for index in range(3))
    assert torch.equal(second.network.conv_last.bias, first.network.conv_last.bias + 1)
    assert (second.digest, second.facts["source"], second.sigma) == (third.digest, "a test", 0.05)
    assert (second.licence, second.source, first.facts) == ("CC0-1.0", "a test", {})
    assert architecture_of(str(path), Shape()) == "esrgan"


def test_fewer_blocks_are_evenly_spaced(tmp_path):
    torch.manual_seed(1)
    deep = RRDBNet(channels=8, blocks=5, growth=4)
    save(tmp_path / "deep.safetensors", deep.state_dict(), {}, torch.float32)
    for blocks, selected in ((1, [2]), (2, [0, 4]), (3, [0, 2, 4]), (5, [0, 1, 2, 3, 4])):
        network = open_start(str(tmp_path / "deep.safetensors"), Shape(blocks=blocks), 0).network
        assert len(network.body) == blocks
        for new, old in enumerate(selected):
            assert torch.equal(network.body[new].rdb2.conv3.weight, deep.body[old].rdb2.conv3.weight)
        assert torch.equal(network.conv_first.weight, deep.conv_first.weight)
        assert torch.equal(network.conv_last.bias, deep.conv_last.bias)


def test_noise_channels_are_added_once(tmp_path, start_file):
    first, same, other = (open_start(str(start_file), Shape(noise_channels=3), seed) for seed in (1, 1, 2))
    state = first.network.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in load_file(start_file).items())
    assert state["conv_noise.weight"].shape == (8, 3, 3, 3)
    assert first.digest == same.digest != other.digest
    save(tmp_path / "noisy.safetensors", state, {}, torch.float32)
    for shape in (Shape(), Shape(noise_channels=3), Shape(noise_channels=4)):
        again = open_start(str(tmp_path / "noisy.safetensors"), shape, 2)
        assert torch.equal(again.network.conv_noise.weight, first.network.conv_noise.weight)


def test_scratch_with_noise_channels():
    for architecture in ("rrdbnet", "swinir"):
        with torch.device("meta"):
            assert open_start("scratch", Shape(architecture, noise_channels=3), 0).network.noise_channels == 3


def test_scratch_follows_shape_and_seed():
    sizes = Shape("rrdbnet", channels=16, blocks=2)
    network, same, other = (open_start("scratch", sizes, seed).network for seed in (1, 1, 2))
    assert (network.conv_first.out_channels, len(network.body)) == (16, 2)
    assert network.body[0].rdb1.conv1.out_channels == 8
    assert torch.equal(network.conv_last.weight, same.conv_last.weight)
    assert not torch.equal(network.conv_last.weight, other.conv_last.weight)


def test_scratch_defaults_to_published_sizes():
    with torch.device("meta"):
        esrgan = open_start("scratch", Shape(), 0).network
        swinir = open_start("scratch", Shape("swinir"), 0).network
    assert sum(p.numel() for p in esrgan.parameters()) == 16_697_987
    assert sum(p.numel() for p in swinir.parameters()) == 11_715_559


def test_architecture_without_building_network(start_file):
    assert architecture_of(str(start_file), Shape()) == "esrgan"
    assert architecture_of("scratch", Shape("swinir")) == "swinir"
    assert architecture_of("scratch", Shape(blocks=2)) == "esrgan"


def test_saved_weights_keep_metadata(tmp_path, start_file):
    path = tmp_path / "trained.safetensors"
    state = load_file(start_file)
    for dtype, tolerance in ((torch.float32, 0), (torch.float16, 1e-3)):
        save(path, state, {"licence": "CC0-1.0", "source": "a test", "sigma": 0.05}, dtype)
        start = open_start(str(path), Shape(), 0)
        assert (start.licence, start.source, start.sigma) == ("CC0-1.0", "a test", 0.05)
        assert load_file(path)["conv_last.weight"].dtype == dtype
        for name, tensor in start.network.state_dict().items():
            torch.testing.assert_close(tensor, state[name], rtol=tolerance, atol=tolerance)
        assert [p.name for p in tmp_path.iterdir() if "trained" in p.name] == ["trained.safetensors"]


def test_foreign_files_have_no_metadata(tmp_path, start_file):
    assert read_provenance(start_file) == {}
    assert read_provenance(tmp_path / "other.pth") == {}
    (tmp_path / "cut.safetensors").write_bytes(start_file.read_bytes()[:100])
    with pytest.raises(ModelError, match="cannot be read"):
        read_provenance(tmp_path / "cut.safetensors")


def test_refusals(tmp_path, start_file):
    state = load_file(start_file)
    with pytest.raises(UsageError, match="architecture='edsr': unknown"):
        Shape("edsr")
    with pytest.raises(UsageError, match="blocks=0"):
        Shape(blocks=0)
    with pytest.raises(InputError, match="cannot be written"):
        save(tmp_path / "none" / "x.safetensors", state, {}, torch.float32)
    state["conv_last.bias"] = torch.tensor([1e6, 0, 0])
    with pytest.raises(ModelError, match="conv_last.bias holds NaN or infinity in torch.float16"):
        save(tmp_path / "x.safetensors", state, {}, torch.float16)


@pytest.mark.weights
def test_packaged_weights_have_licence():
    start = open_start("realsr", Shape(blocks=3), 0)
    assert start.licence.startswith("MIT")
    assert archs.identify(start.network.state_dict()).name == "esrgan"
