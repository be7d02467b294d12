"""Two processes on one store, and a store that is deleted while a process renders into it."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import zarr

from engine.io.zarr_store import stored_provenance

RENDER = "render model.safetensors --out out.zarr --size 512x384 --stages 2 --tile 8 --overlap 4 --precision fp32 -q"


@pytest.fixture(scope="module")
def expected(tmp_path_factory, model_file):
    """Pixels of two seeds."""
    folder = tmp_path_factory.mktemp("expected")
    shutil.copy(model_file, folder / "model.safetensors")
    pixels = []
    for seed in (0, 1):
        with start(folder, f"--seed {seed} --overwrite --executor tiles") as process:
            assert process.communicate()[0] is None
        assert process.returncode == 0
        pixels.append(zarr.open_array(folder / "out.zarr" / "0")[:])
    return pixels


@pytest.fixture
def folder(tmp_path, model_file):
    shutil.copy(model_file, tmp_path / "model.safetensors")
    return tmp_path


def start(folder, options):
    command = [sys.executable, "-m", "engine", *RENDER.split(), *options.split()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("first", "second", "begun"),
    [("", "", False), ("", "--overwrite", True), ("--overwrite", "--overwrite", False), ("", "--resume", True)],
)
def test_two_processes_never_leave_a_complete_but_wrong_store(folder, expected, first, second, begun):
    """One of them finishes, the other one ends with one line; ``begun``: it starts while the first one writes."""
    seeds = (0, 0) if "--resume" in second else (0, 1)
    processes = [start(folder, f"{first} --executor tiles")]
    if begun:
        wait_for(lambda: any((folder / "out.zarr").glob("0/c/0/*/*")))
    processes.append(start(folder, f"{second} --executor tiles --seed {seeds[1]}"))
    errors = [process.communicate()[1] for process in processes]
    codes = [process.returncode for process in processes]
    assert sorted(codes) in ([0, 4], [0, 0]), errors
    assert [len(error.splitlines()) for error in errors] == [code // 4 for code in codes]
    provenance = stored_provenance(folder / "out.zarr")
    assert provenance["complete"] is True
    seed = provenance["plan"]["seed"]
    assert seed in [s for s, code in zip(seeds, codes, strict=True) if code == 0]
    assert np.array_equal(zarr.open_array(folder / "out.zarr" / "0")[:], expected[seed])
    assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors", "out.zarr"]


@pytest.mark.parametrize("executor", ["tiles", "bands"])
def test_a_store_deleted_while_it_is_rendered(folder, executor):
    process = start(folder, f"--executor {executor}")
    wait_for(lambda: any((folder / "out.zarr").glob("0/c/0/*/*")))
    process.send_signal(signal.SIGSTOP)
    shutil.rmtree(folder / "out.zarr")
    process.send_signal(signal.SIGCONT)
    error = process.communicate()[1]
    assert process.returncode == 4
    assert len(error.splitlines()) == 1
    assert "removed, renamed or replaced while it was written" in error
    assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors"]
