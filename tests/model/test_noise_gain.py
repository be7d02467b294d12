"""Noise channels that are louder than trained: in the weights, told in the manifest, refused where there are none."""

import pytest
import torch
from safetensors.torch import save_file

from engine.archs.esrgan import RRDBNet
from engine.cli.app import main
from engine.errors import ModelError, UsageError
from engine.model.bundle import build, load


@pytest.fixture
def noisy_checkpoint(tmp_path):
    torch.manual_seed(0)
    network = RRDBNet(8, 1, 4, noise_channels=5)
    save_file(network.state_dict(), tmp_path / "noisy.safetensors")
    return tmp_path / "noisy.safetensors"


def test_a_noise_gain_makes_noise_channels_louder_and_nothing_else(tmp_path, noisy_checkpoint):
    names = [str(noisy_checkpoint)] * 2
    build(None, names, noise_gains=[1.0, 1.5]).save(tmp_path / "model.safetensors")
    model, plain = load(tmp_path / "model.safetensors"), build(None, names)
    assert [stage.noise_gain for stage in model.stages] == [1.0, 1.5]
    assert model.digest != plain.digest
    x, noise = torch.rand(1, 3, 9, 7), torch.randn(1, 5, 9, 7)
    assert torch.equal(model.network(0)(torch.cat([x, noise], 1)), plain.network(0)(torch.cat([x, noise], 1)))
    louder, expected = (
        network(torch.cat([x, gain * noise], 1)) for network, gain in ((model.network(1), 1.0), (plain.network(1), 1.5))
    )
    torch.testing.assert_close(louder, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, plain.network(1)(torch.cat([x, noise], 1)), atol=1e-3)


def test_gains_of_a_model_that_is_built_again_multiply(tmp_path, noisy_checkpoint, capsys):
    build(None, [str(noisy_checkpoint)], noise_gains=[1.5]).save(tmp_path / "model.safetensors")
    again = build(None, [str(tmp_path / "model.safetensors")], noise_gains=[2.0])
    again.save(tmp_path / "again.safetensors")
    assert load(tmp_path / "again.safetensors").stages[0].noise_gain == 3.0
    with pytest.raises(SystemExit):
        main(["info", str(tmp_path / "again.safetensors")])
    assert "5 x 3" in capsys.readouterr().out


@pytest.mark.parametrize("gain", [0.0, -1.0, float("nan"), float("inf")])
def test_a_noise_gain_that_is_no_factor_is_refused(noisy_checkpoint, gain):
    with pytest.raises(UsageError, match=f"noise gain {gain:g}: must be above 0"):
        build(None, [str(noisy_checkpoint)], noise_gains=[gain])


def test_a_noise_gain_without_noise_channels_or_without_a_stage_is_refused(model_file):
    checkpoint = model_file.parent / "sr.safetensors"
    with pytest.raises(UsageError, match="noise gain 1.5: the network of .*sr.safetensors has no noise channels"):
        build(None, [str(checkpoint)], noise_gains=[1.5])
    with pytest.raises(ModelError, match="2 values of noise gain for 1 stages"):
        build(None, [str(checkpoint)], noise_gains=[1.0, 1.5])
