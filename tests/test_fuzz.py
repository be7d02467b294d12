"""A short run of the fuzzer, with fixed seeds; ``make fuzz`` goes on."""

import importlib.util
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("fuzz", Path(__file__).parent / "fuzz.py")
fuzz = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(fuzz)


@pytest.mark.slow
def test_mutants_are_read_or_refused_in_one_line():
    failures, read = [], 0
    for seed in range(4):
        wrong, good = fuzz.batch(seed)
        failures += wrong
        read += good
    assert failures == []
    assert 0 < read < 4 * fuzz.BATCH
