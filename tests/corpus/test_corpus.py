"""The committed corpus of corrupted files: each is refused with exit code 4 (3: too much memory), in one line, quickly."""

import importlib.util
from pathlib import Path

from support.sandbox import run

FOLDER = Path(__file__).parent
SPEC = importlib.util.spec_from_file_location("corpus_make", FOLDER / "make.py")
make = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(make)


def test_every_file_is_refused_in_one_line(tmp_path):
    files = sorted(path for path in make.FILES.iterdir() if path.suffix != ".param")
    assert len(files) >= 45
    failures = [
        (path.name, result.code, result.problem, round(result.seconds, 1), result.peak >> 20, result.output)
        for path, result in zip(files, run(map(make.command, files), tmp_path, seconds=30), strict=True)
        if result.code not in (3, 4) or result.problem or result.seconds > 10 or result.peak > 1 << 30
    ]
    assert failures == []
    assert not (tmp_path / "ran").exists()


def test_the_files_that_it_was_made_from_are_read(tmp_path):
    """A test of refusals alone would pass if everything was refused."""
    for result in run(map(make.command, make.seeds(tmp_path)), tmp_path):
        assert (result.code, result.problem) == (0, ""), result
