"""Server of full_disk.py: runs a command with one change of the disk failed, for each number that it reads.

    python faults.py SPECIFICATION

The process needs ``faults.c`` in LD_PRELOAD. It imports the engine once and forks for every run. The specification and the
results, a line for each run, are JSON.
"""

import ctypes
import importlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

MODULES = (
    "engine.cli.render", "engine.cli.export", "engine.cli.model", "engine.cli.train", "engine.cli.info",
    "engine.exporters.tiff", "engine.exporters.preview", "engine.run.bands", "engine.run.serial",
)  # fmt: skip
STREAMS = "out.txt", "err.txt"


def forked(words, folder, counter, arm, seconds=0):
    """Run a command in a folder in a forked process.

    Args:
        words: words of the command.
        folder: working folder; its parent gets the files ``STREAMS``.
        counter: function of ``faults.c`` that returns a count.
        arm: function of the loaded library, called before the command.
        seconds: time after which the process is ended; 0 for no limit.

    Returns:
        Exit code (negative: the signal), stderr, and the count, -1 if it is unknown.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        for stream, name in enumerate(STREAMS, 1):
            os.dup2(os.open(folder.parent / name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), stream)
        shim = ctypes.CDLL(None)
        count = shim[counter]
        count.restype = ctypes.c_long
        from engine.cli.app import main

        signal.alarm(seconds)
        code = 99
        arm(shim)
        try:
            main(words)
        except SystemExit as end:
            code = end.code
        finally:
            os.write(writer, str(count()).encode())
            os._exit(code)
    os.close(writer)
    counted = os.read(reader, 100)
    os.close(reader)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), (folder.parent / "err.txt").read_text(), int(counted or -1)


def run(words, folder, number=0, *, lasting=False):
    """``forked``, with change ``number`` of the disk failed, and with ``lasting`` all later ones."""

    def arm(shim):
        shim.fault_arm(os.fsencode(folder), ctypes.c_long(number), int(lasting))

    return forked(words, folder, "fault_count", arm)


def main():
    spec = json.loads(sys.argv[1])
    for module in MODULES:
        importlib.import_module(module)
    work = Path(spec["folder"])
    for line in sys.stdin:
        number = int(line)
        folder = work / str(number) / "files"
        shutil.copytree(work / "template", folder, symlinks=True)
        code, err, counted = run(spec["words"], folder, number, lasting=spec["is_lasting"])
        result = {"number": number, "code": code, "err": err, "count": counted}
        if code:
            shutil.copytree(folder, work / str(number) / "failed", symlinks=True)
            result["again"], result["again_err"], _ = run(spec["again"], folder)
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
