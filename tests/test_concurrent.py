"""Two processes on one store, and a store that is deleted while a process renders into it."""

import os
import shutil
import signal

import pytest
from support.commands import finish, start, wait_for
from support.races import images, race, words


@pytest.fixture(scope="module")
def expected(tmp_path_factory, model_file):
    """Pixels of two seeds."""
    return images(tmp_path_factory.mktemp("expected"), model_file)


@pytest.fixture
def folder(tmp_path, model_file):
    shutil.copy(model_file, tmp_path / "model.safetensors")
    return tmp_path


def has_begun(folder):
    return any((folder / "out.zarr").glob("0/c/0/*/*"))


@pytest.mark.parametrize(
    ("name", "begun"),
    [("new, new", False), ("new, --overwrite", True), ("--overwrite, --overwrite", False), ("new, --resume", True)],
)
def test_two_processes_never_leave_a_complete_but_wrong_store(folder, expected, name, begun):
    """One of them finishes, the other one ends with one line; ``begun``: it starts while the first one writes."""

    def wait(process):
        if begun:
            wait_for(lambda: has_begun(folder), process)

    race(folder, name, wait, expected)


@pytest.mark.parametrize("executor", ["tiles", "bands"])
def test_a_store_deleted_while_it_is_rendered(folder, executor):
    process = start(folder, words("", executor))
    wait_for(lambda: has_begun(folder), process)
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    shutil.rmtree(folder / "out.zarr")
    process.send_signal(signal.SIGCONT)
    code, error = finish(process)
    assert code == 4
    assert len(error.splitlines()) == 1
    assert "removed, renamed or replaced while it was written" in error
    assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors"]
