"""Files of step 1: they hold the network as it was, and a damaged one is refused with a single line."""

import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from engine.archs.hpvaegan import BaseGenerator, Config, scale_sizes
from engine.errors import ModelError
from engine.model.structure_file import (
    METADATA_KEY,
    read_structure,
    structure_from_state,
    structure_metadata,
    structure_state,
    write_structure,
)


def noise(m, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(m))


def test_round_trip_in_half_precision(small_structure, tmp_path):
    path = tmp_path / "s.safetensors"
    write_structure(small_structure, path)
    loaded = read_structure(path)
    assert list(tmp_path.iterdir()) == [path]
    assert loaded.config == small_structure.config
    assert loaded.sizes == small_structure.sizes
    assert structure_metadata(loaded) == structure_metadata(small_structure)
    assert structure_metadata(loaded)["licence"] == "CC0-1.0"
    assert torch.equal(loaded.sigmas, small_structure.sigmas)
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in loaded.parameters())
    for name, tensor in small_structure.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, atol=1e-3, rtol=1e-3)
    assert (loaded.sample(noise) - small_structure.sample(noise)).abs().mean() < 0.01
    with safe_open(path, framework="pt") as file:
        assert list(file.metadata()) == [METADATA_KEY]
        assert "blocks.0.head.conv.weight" in file.keys()  # noqa: SIM118 (not a dict)
        assert file.get_tensor("decoder.tail.weight").dtype == torch.float16


@pytest.mark.parametrize("last", [0, 3])
def test_round_trip_is_exact_in_float32(last):
    config = Config(last=last, last_vae=last // 2, channels=6, latent=5, layers=2)
    generator = BaseGenerator(config, scale_sizes((10, 20), last, 32, 8))
    metadata = json.loads(json.dumps(structure_metadata(generator)))
    loaded = structure_from_state(structure_state(generator, torch.float32), metadata)
    assert torch.equal(loaded.sample(noise), generator.sample(noise))


DAMAGED = [
    (lambda s: {k: v for k, v in s.items() if k != "blocks.1.tail.bias"}, "blocks.1.tail.bias is missing"),
    (lambda s: {k: v for k, v in s.items() if not k.startswith("decoder")}, "decoder.head.conv.weight is missing"),
    (lambda s: {**s, "extra": torch.zeros(1)}, "extra is unknown"),
    (lambda s: {**s, "sigmas": torch.zeros(2)}, "sigmas has shape"),
    (lambda s: {**s, "decoder.tail.weight": torch.zeros(3, 8)}, "four dimensions"),
    (lambda s: {**s, "decoder.tail.weight": torch.zeros(3, 11, 3, 3)}, "expected 8 or 9"),
    (lambda s: {**s, "decoder.tail.bias": torch.full((3,), math.nan)}, "decoder.tail.bias holds NaN"),
    (lambda s: {**s, "decoder.tail.bias": torch.zeros(3, dtype=torch.int32)}, "expected a float type"),
]


def test_damaged_tensors_are_named(small_structure):
    for damage, message in DAMAGED:
        with pytest.raises(ModelError) as error:
            structure_from_state(damage(structure_state(small_structure)), structure_metadata(small_structure))
        assert message in str(error.value)
        assert "\n" not in str(error.value)


WRONG = [
    ("kind", "sr", "kind and architecture"),
    ("architecture", "singan", "kind and architecture"),
    ("M", 4, "M = 4"),
    ("L", 7, "L = 7"),
    ("L", "one", "L = 'one'"),
    ("coordinates", False, "coordinates = False"),
    ("padding", "symmetric", "padding 'symmetric'"),
    ("padding", None, "padding = None"),
    ("sizes", [[1, 2]], "'sizes'"),
    ("sizes", [[0, 2]] * 3, "'sizes'"),
    ("sizes", None, "'sizes'"),
]


def test_wrong_metadata_is_named(small_structure):
    for key, value, message in WRONG:
        with pytest.raises(ModelError) as error:
            structure_from_state(structure_state(small_structure), {**structure_metadata(small_structure), key: value})
        assert message in str(error.value), (key, value)


def test_unreadable_files(tmp_path):
    path = tmp_path / "s.safetensors"
    with pytest.raises(ModelError, match="cannot be read"):
        read_structure(path)
    path.write_bytes(b"not a model at all")
    with pytest.raises(ModelError, match="cannot be read"):
        read_structure(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ModelError, match="not a file of step 1"):
        read_structure(path)
    save_file({"x": torch.zeros(1)}, path, metadata={METADATA_KEY: "{}"})
    with pytest.raises(ModelError, match=r"s\.safetensors: kind"):
        read_structure(path)


def test_infinite_weights_are_not_written(small_structure, tmp_path):
    with torch.no_grad():
        small_structure.decoder.tail.bias[0] = 1e6  # infinite in half precision
    with pytest.raises(ModelError, match="decoder.tail.bias"):
        write_structure(small_structure, tmp_path / "s.safetensors")
    assert not list(tmp_path.iterdir())
