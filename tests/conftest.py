"""Fixtures of all tests: small networks with varied outputs, model files of them, and isolation from the machine."""

import os
import shlex
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel module is imported
from engine.cli.app import main
from engine.model import bundle as model
from engine.model.build import build

pytest.register_assert_rewrite("support")

from support import small  # noqa: E402 (its asserts are rewritten)

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


@pytest.fixture(scope="session")
def picture():
    """Function ``picture(height, width, seed=0)`` -> float32 [3, height, width] in [0, 1]."""
    return small.picture


@pytest.fixture
def small_rrdb():
    """RRDBNet x4 with align 1; a new one per test, as a stage may cast it in place."""
    return small.rrdb()


@pytest.fixture
def small_noisy_rrdb():
    """RRDBNet x4 with five noise channels."""
    return small.rrdb(noise_channels=5)


@pytest.fixture
def small_swinir():
    """SwinIR x4 with align 8; a new one per test, as a stage may cast it in place."""
    return small.swinir()


@pytest.fixture
def small_structure():
    return small.structure()


@pytest.fixture(scope="session")
def model_file(tmp_path_factory):
    """Path of a model: step 1 (24x32) and two RRDBNet steps x4 that share weights. Read only."""
    return small.bundle(tmp_path_factory.mktemp("model"), small.rrdb())


@pytest.fixture(scope="session")
def swin_model_file(tmp_path_factory):
    """Path of a model: step 1 (24x32) and two SwinIR steps x4 that share weights. Read only."""
    return small.bundle(tmp_path_factory.mktemp("swin_model"), small.swinir())


@pytest.fixture(scope="module")
def models(tmp_path_factory, model_file, swin_model_file):
    """Models by name: RRDBNet, SwinIR, and RRDBNet with input noise in both steps and noise channels in one."""
    folder, source = tmp_path_factory.mktemp("noisy"), model_file.parent
    path, channels = folder / "noisy.safetensors", folder / "channels.safetensors"
    save_file(small.rrdb(noise_channels=5).state_dict(), channels)
    checkpoints = [str(source / "sr.safetensors"), str(channels)]
    build(source / "structure.safetensors", checkpoints, [0.05, 0.1], margin=0).save(path)
    return {"rrdb": model.load(model_file), "swinir": model.load(swin_model_file), "noisy": model.load(path)}
