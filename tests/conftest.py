"""Fixtures of all tests: small networks with varied outputs, model files of them, and isolation from the machine."""

import os
import shlex
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel module is imported

from engine.archs.esrgan import RRDBNet
from engine.archs.hpvaegan import BaseGenerator, Config, scale_sizes
from engine.archs.swinir import SwinIR
from engine.cli.app import main
from engine.model import bundle as model
from engine.model.build import build
from engine.model.structure_file import write_structure

pytest.register_assert_rewrite("support")

# Results must not depend on the number of cores, and small tensors are faster on one.
torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter):
    """Print what recorded commands took; the reports of tests also come from other processes of xdist."""
    reports = [r for group in terminalreporter.stats.values() for r in group if getattr(r, "when", "") == "call"]
    recorded = [(r.nodeid.split("::")[-1], name, value) for r in reports for name, value in r.user_properties]
    if any(name == "command" for _, name, _ in recorded):
        terminalreporter.section("commands of a new user")
        terminalreporter.line(f"{'wall s':>7} {'CPU s':>7} {'peak MiB':>9}  test: command")
    for test, name, value in recorded:
        if name == "command":
            line, wall, cpu, peak = value
            terminalreporter.line(f"{wall:7.1f} {cpu:7.1f} {peak / 2**20:9.0f}  {test}: {line}")
        elif name == "note":
            terminalreporter.line(f"{test}: {value}")


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory):
    """Cache and data folders of the tests, in place of the user's."""
    path = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(path))
        patch.setenv("XDG_DATA_HOME", str(path / "data"))
        yield path


@pytest.fixture(scope="session", autouse=True)
def interruptible():
    """Restore Ctrl-C: a shell that starts the tests in the background ignores it, and child processes inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def call(capsys):
    """Function ``call("render ...") -> (exit code, stdout, stderr)`` that runs the command line in this process."""

    def run(line):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(shlex.split(line))
        output = capsys.readouterr()
        return caught.value.code, output.out, output.err

    return run


@pytest.fixture(autouse=True)
def seeds():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 (code under test may draw from the global generator)


def _picture(height, width, seed=0):
    """Picture [3, height, width] in [0, 1] of soft blobs and fine grain, in which a displaced or blurred pixel shows."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, max(2, height // 12), max(2, width // 12), generator=generator)
    soft = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)[0]
    grain = torch.rand(3, height, width, generator=generator)
    return (0.7 * soft + 0.3 * grain).clamp(0, 1)


@pytest.fixture(scope="session")
def picture():
    """Function ``picture(height, width, seed=0)`` -> float32 [3, height, width] in [0, 1]."""
    return _picture


@torch.no_grad()
def _lively(network, noise):
    """Randomise weights so that the output varies around 0.5; with the usual initialisation it is nearly constant."""
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
    """RRDBNet x4 with align 1; a new one per test, as a stage may cast it in place."""
    return _small_rrdb()


@pytest.fixture
def small_noisy_rrdb():
    """RRDBNet x4 with five noise channels."""
    return _small_rrdb(noise_channels=5)


@pytest.fixture
def small_swinir():
    """SwinIR x4 with align 8; a new one per test, as a stage may cast it in place."""
    return _small_swinir()


def _small_structure():
    """Step 1 of three scales up to 24 rows by 32 columns."""
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


def _bundle(folder: Path, network):
    """Write a model of two steps without a margin, so that sizes are simple; tests/run/test_margin.py has a margin."""
    write_structure(_small_structure(), folder / "structure.safetensors")
    save_file(network.state_dict(), folder / "sr.safetensors")
    checkpoint = str(folder / "sr.safetensors")
    bundle = build(folder / "structure.safetensors", [checkpoint, checkpoint], licence="CC0-1.0", margin=0)
    bundle.save(folder / "model.safetensors")
    return folder / "model.safetensors"


@pytest.fixture(scope="session")
def model_file(tmp_path_factory):
    """Path of a model: step 1 (24x32) and two RRDBNet steps x4 that share weights. Read only."""
    return _bundle(tmp_path_factory.mktemp("model"), _small_rrdb())


@pytest.fixture(scope="session")
def swin_model_file(tmp_path_factory):
    """Path of a model: step 1 (24x32) and two SwinIR steps x4 that share weights. Read only."""
    return _bundle(tmp_path_factory.mktemp("swin_model"), _small_swinir())


@pytest.fixture(scope="module")
def models(tmp_path_factory, model_file, swin_model_file):
    """Models by name: RRDBNet, SwinIR, and RRDBNet with input noise in both steps and noise channels in one."""
    folder, source = tmp_path_factory.mktemp("noisy"), model_file.parent
    path, channels = folder / "noisy.safetensors", folder / "channels.safetensors"
    save_file(_small_rrdb(noise_channels=5).state_dict(), channels)
    checkpoints = [str(source / "sr.safetensors"), str(channels)]
    build(source / "structure.safetensors", checkpoints, [0.05, 0.1], margin=0).save(path)
    return {"rrdb": model.load(model_file), "swinir": model.load(swin_model_file), "noisy": model.load(path)}
