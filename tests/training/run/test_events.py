"""The JSON-lines log of a run."""

import json

import pytest

from engine.errors import InputError
from engine.training.run.events import CheckpointSaved, IterationDone, JsonLines, Validated


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def iteration(number, total=25):
    return IterationDone(1, 3, number, total, {"rec": 0.5}, 0.1, 2.0)


def test_iterations_are_thinned_out(tmp_path):
    path = tmp_path / "log.jsonl"
    with JsonLines(path, append=False) as log:
        for number in range(1, 26):
            log.write(iteration(number))
        log.write(CheckpointSaved(1, 25, path))
    records = read(path)
    assert [r["iteration"] for r in records if r["event"] == "IterationDone"] == [10, 20, 25]
    assert records[0]["losses"] == {"rec": 0.5}
    assert records[-1] == {**records[-1], "event": "CheckpointSaved", "path": str(path)}


def test_append(tmp_path):
    path = tmp_path / "log.jsonl"
    for append in (False, True, True):
        with JsonLines(path, append=append) as log:
            log.write(iteration(25))
    assert len(read(path)) == 3
    with JsonLines(path, append=False):
        pass
    assert read(path) == []


def test_validation_keeps_its_name(tmp_path):
    path = tmp_path / "log.jsonl"
    with JsonLines(path, append=False) as log:
        log.write(Validated(3, True, {"now": 30.0}, {"now": 0.01}, path))
    assert read(path)[0]["event"] == "Reviewed"


def test_unwritable_folder(tmp_path):
    with pytest.raises(InputError, match="cannot be written"):
        JsonLines(tmp_path / "none" / "log.jsonl", append=False)
