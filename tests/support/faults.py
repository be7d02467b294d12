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
import sys
from pathlib import Path

MODULES = (
    "engine.cli.render", "engine.cli.export", "engine.cli.model", "engine.cli.train", "engine.cli.info",
    "engine.exporters.tiff", "engine.exporters.preview", "engine.run.bands", "engine.run.serial",
)  # fmt: skip
STREAMS = "out.txt", "err.txt"


def run(words, folder, number=0, *, lasting=False):
    """Run a command in a folder in a forked process.

    Returns:
        Exit code, stderr and the number of changes that were counted.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        for stream, name in enumerate(STREAMS, 1):
            os.dup2(os.open(folder.parent / name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), stream)
        shim = ctypes.CDLL(None)
        shim.fault_count.restype = ctypes.c_long
        from engine.cli.app import main

        code = 99
        shim.fault_arm(os.fsencode(folder), ctypes.c_long(number), int(lasting))
        try:
            main(words)
        except SystemExit as end:
            code = end.code
        finally:
            os.write(writer, str(shim.fault_count()).encode())
            os._exit(code)
    os.close(writer)
    counted = os.read(reader, 100)
    os.close(reader)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), (folder.parent / "err.txt").read_text(), int(counted or -1)


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
