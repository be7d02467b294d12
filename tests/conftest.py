"""Fixtures for every test: networks of a few weights whose outputs vary, files made of them, and isolation."""

import os
import shlex
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel's file is imported

from engine.archs.esrgan import RRDBNet
from engine.archs.hpvaegan import BaseGenerator, Config, scale_sizes
from engine.archs.swinir import SwinIR
from engine.cli.app import main
from engine.model import bundle as model
from engine.model.build import build

pytest.register_assert_rewrite("contracts")

# Results must not depend on the machine's cores, and small tensors are slower on several.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory):
    """Measurements are cached per user; tests share a folder of their own and leave the user's alone."""
    path = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(path))
        yield path


@pytest.fixture(scope="session", autouse=True)
def interruptible():
    """A shell that starts the tests in the background lets them ignore Ctrl-C, which children would inherit."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    """``--precision auto`` means float32 in tests, whatever the machine is good at; tests of the choice say otherwise."""
    monkeypatch.setattr("engine.measure.fast_half", lambda device: None)


@pytest.fixture
def call(capsys):
    """call("render ...") -> (exit code, stdout, stderr) of the command line, in this process."""

    def run(line):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(shlex.split(line))
        said = capsys.readouterr()
        return caught.value.code, said.out, said.err

    return run


@pytest.fixture(autouse=True)
def seeds():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 (for code under test that draws from the global generator)


def _picture(height, width, seed=0):
    """[3, height, width] in [0, 1]: soft blobs under fine grain, so that a displaced or blurred pixel shows."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, max(2, height // 12), max(2, width // 12), generator=generator)
    soft = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)[0]
    grain = torch.rand(3, height, width, generator=generator)
    return (0.7 * soft + 0.3 * grain).clamp(0, 1)


@pytest.fixture(scope="session")
def picture():
    """(height, width, seed=0) -> float32 [3, height, width] in [0, 1]."""
    return _picture


@torch.no_grad()
def _lively(network, noise):
    """Random weights for an output that varies around a half: a network at its usual start is nearly constant."""
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * noise)
    network = network.eval().requires_grad_(False)
    x = torch.cat([_picture(48, 48), torch.randn(network.noise_channels, 48, 48, generator=generator)])[None]
    output = network(x)
    network.conv_last.weight.mul_(0.15 / output.std())
    output = network(x)
    network.conv_last.bias.add_(0.5 - output.mean(dim=(0, 2, 3)))
    return network


def _small_rrdb(**options):
    torch.manual_seed(0)
    return _lively(RRDBNet(channels=16, blocks=2, growth=8, **options), 0.08)


def _small_swinir():
    torch.manual_seed(0)
    return _lively(SwinIR(dim=12, depths=(2, 2), heads=(2, 2), window=8, hidden=16, features=8), 0.2)


@pytest.fixture
def small_rrdb():
    """x4, align 1. Fresh for every test: a stage may cast it in place."""
    return _small_rrdb()


@pytest.fixture
def small_noisy_rrdb():
    """The same with five noise channels."""
    return _small_rrdb(noise_channels=5)


@pytest.fixture
def small_swinir():
    """x4, align 8. Fresh for every test: a stage may cast it in place."""
    return _small_swinir()


def _small_structure():
    """Three scales, the last one 24 rows by 32 columns."""
    config = Config(last=2, last_vae=1, channels=8, latent=6, layers=1)
    torch.manual_seed(0)
    structure = BaseGenerator(
        config, scale_sizes((48, 64), config.last, 32, 12), {"licence": "CC0-1.0", "source": "test"}
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in structure.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        structure.sigmas[:] = torch.tensor([1.0, 0.3, 0.2])
    return structure.requires_grad_(False)


@pytest.fixture
def small_structure():
    return _small_structure()


def _bundle(folder: Path, network, sigmas=()):
    """Without a margin, so that sizes are easily told; tests/test_margin.py has models with one."""
    _small_structure().to_file(folder / "structure.safetensors")
    save_file(network.state_dict(), folder / "sr.safetensors")
    checkpoint = str(folder / "sr.safetensors")
    bundle = build(folder / "structure.safetensors", [checkpoint, checkpoint], sigmas, "CC0-1.0", margin=0)
    bundle.save(folder / "model.safetensors")
    return folder / "model.safetensors"


@pytest.fixture(scope="session")
def model_file(tmp_path_factory):
    """Path of a bundle: step 1 (24x32) and two RRDB stages x4 that share their weights. Do not write to it."""
    return _bundle(tmp_path_factory.mktemp("model"), _small_rrdb())


@pytest.fixture(scope="session")
def swin_model_file(tmp_path_factory):
    """The same with two SwinIR stages. Do not write to it."""
    return _bundle(tmp_path_factory.mktemp("swin_model"), _small_swinir())


@pytest.fixture(scope="module")
def models(tmp_path_factory, model_file, swin_model_file):
    """Bundles by name: convolutions, windows, and convolutions with input noise in both stages and noise channels in one."""
    folder, given = tmp_path_factory.mktemp("noisy"), model_file.parent
    path, channels = folder / "noisy.safetensors", folder / "channels.safetensors"
    save_file(_small_rrdb(noise_channels=5).state_dict(), channels)
    checkpoints = [str(given / "sr.safetensors"), str(channels)]
    build(given / "structure.safetensors", checkpoints, [0.05, 0.1], margin=0).save(path)
    return {"rrdb": model.load(model_file), "swinir": model.load(swin_model_file), "noisy": model.load(path)}
