"""Files that appear whole or not at all."""

import errno
import os

import pytest

from engine.io.files import replacing


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("step", ["write", "fsync", "rename"])
def test_a_failure_names_the_file_and_not_its_temporary_name(tmp_path, monkeypatch, step):
    """Errors of a write and of fsync come without a name, the error of a rename with the temporary one."""
    path = tmp_path / "report.json"
    path.write_text("before")
    steps = {
        "write": ("pathlib.Path.write_text", full),
        "fsync": ("os.fsync", full),
        "rename": ("pathlib.Path.replace", lambda part, _: os.rename(part, part / "below")),
    }
    monkeypatch.setattr(*steps[step])
    with pytest.raises(OSError, match=r"report\.json'$") as caught, replacing(path) as part:
        part.write_text("after")
    assert caught.value.filename == str(path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("before", [None, "before"])
def test_a_folder_that_cannot_be_synchronised(tmp_path, monkeypatch, before):
    """The last step: a new file goes again, or the same command would refuse it; a replaced one is whole."""
    path = tmp_path / "out.png"
    if before is not None:
        path.write_text(before)
    monkeypatch.setattr("engine.io.files.sync_folder", full)
    with pytest.raises(OSError, match="No space left"), replacing(path) as part:
        part.write_text("after")
    assert [file.read_text() for file in tmp_path.iterdir()] == ([] if before is None else ["after"])
