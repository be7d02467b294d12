"""Runs a command many times, and fails another large allocation in each run: ``python allocations.py SPECIFICATION``.

The process needs ``faults.c`` in LD_PRELOAD. It imports the engine once and forks for every run. The specification, and the
results in one line for each run, are JSON.
"""

import ctypes
import importlib
import json
import shutil
import sys
from pathlib import Path

from faults import MODULES, forked

SECONDS = 120
"""Time after which a run has hung."""


def run(words, folder, bytes_, number=0, *, lasting=False):
    """``forked``, with allocation ``number`` of at least ``bytes_`` failed, and with ``lasting`` all later ones."""

    def arm(shim):
        shim.allocation_arm(ctypes.c_size_t(bytes_), ctypes.c_long(number), int(lasting))

    return forked(words, folder, "allocation_count", arm, SECONDS)


def numbers(last, step):
    """Allocations to fail: none, then each one, or with gaps that grow by ``step``; ``last``: counted in the first run."""
    yield 0
    number = 1
    while number <= last[0]:
        yield number
        number += max(1, int((number - 1) * step))


def main():
    spec = json.loads(sys.argv[1])
    for module in MODULES:
        importlib.import_module(module)
    work, last = Path(spec["work"]), [1]
    for number in numbers(last, spec["step"]):
        folder = work / str(number) / "files"
        shutil.copytree(spec["template"], folder, symlinks=True)
        code, err, counted = run(spec["words"], folder, spec["bytes"], number, lasting=spec["is_lasting"])
        last[0] = last[0] if number else counted
        result = {"number": number, "code": code, "err": err, "count": counted}
        if code:
            shutil.copytree(folder, work / str(number) / "failed", symlinks=True)
            result["again"], result["again_err"], _ = run(spec["again"], folder, spec["bytes"])
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
