"""Runs a command many times, and fails another large allocation in each run: ``python allocations.py SPECIFICATION``.

The process needs ``faults.c`` in LD_PRELOAD. It imports the engine once and forks for every run. The specification, and the
results in one line for each run, are JSON.
"""

import ctypes
import importlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

from faults import MODULES, STREAMS

SECONDS = 120
"""Time after which a run has hung."""


def run(words, folder, bytes_, number=0, *, lasting=False):
    """Run a command in a folder in a forked process.

    Returns:
        Exit code (negative: the signal), stderr and the number of allocations that were counted, -1 if it is unknown.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        for stream, name in enumerate(STREAMS, 1):
            os.dup2(os.open(folder.parent / name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), stream)
        shim = ctypes.CDLL(None)
        shim.allocation_count.restype = ctypes.c_long
        from engine.cli.app import main

        signal.alarm(SECONDS)
        code = 99
        shim.allocation_arm(ctypes.c_size_t(bytes_), ctypes.c_long(number), int(lasting))
        try:
            main(words)
        except SystemExit as end:
            code = end.code
        finally:
            os.write(writer, str(shim.allocation_count()).encode())
            os._exit(code)
    os.close(writer)
    counted = os.read(reader, 100)
    os.close(reader)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), (folder.parent / "err.txt").read_text(), int(counted or -1)


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
