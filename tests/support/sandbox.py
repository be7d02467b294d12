"""Runs of the command line on files that may be hostile: each in a process of its own, with limits of time and memory.

``run`` starts this file as a server that imports the engine once and forks for each run, as importing takes seconds.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

SECONDS = 60
"""Limit of a run; it is killed beyond."""

ADDRESSES = 1 << 30
"""Bytes of address space that a run may take in addition to the libraries'."""


@dataclass(frozen=True)
class Run:
    """A finished run."""

    words: list
    """Words of the command line."""
    code: int
    """Exit code, or minus the number of the signal that ended it."""
    output: str
    """Standard output, then standard error."""
    error: str
    """Standard error."""
    seconds: float
    peak: int
    """Peak of resident bytes, with the libraries."""

    @property
    def problem(self):
        """What is wrong with a run on an input that may be refused or not: a traceback, a crash, a long line; or ""."""
        if self.code not in (0, 1, 2, 3, 4):
            return f"ended with {self.code}: {self.error[-300:]}"
        if "Traceback" in self.output:
            return f"traceback: {self.error[-2000:]}"
        if self.code and (self.error.count("\n") != 1 or len(self.error) > 310):
            return f"not one line: {self.error[:1000]!r}"
        if "\x1b" in self.output:
            return f"escape sequence: {self.output[:1000]!r}"
        return ""


def run(commands, folder, *, addresses=ADDRESSES, seconds=SECONDS):
    """Run command lines, each a list of words, in ``folder``."""
    request = json.dumps(
        {"commands": [list(map(str, words)) for words in commands], "addresses": addresses, "seconds": seconds}
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", "TERM": "dumb"}
    server = subprocess.run(
        [sys.executable, __file__],
        input=request,
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        check=False,
    )
    assert server.returncode == 0, server.stderr
    return [Run(**fields) for fields in json.loads(server.stdout)]


def _serve():
    request = json.loads(sys.stdin.read())
    import torch

    from engine.cli.app import main
    from engine.model import bundle  # noqa: F401 (what every command on a model imports)

    torch.set_num_threads(1)
    results = [_fork(main, words, request["addresses"], request["seconds"]) for words in request["commands"]]
    sys.stdout.write(json.dumps(results))


def _fork(main, words, addresses, seconds):
    with tempfile.TemporaryFile("w+b") as out, tempfile.TemporaryFile("w+b") as error:
        start = time.monotonic()
        if not (child := os.fork()):
            os.dup2(out.fileno(), 1)
            os.dup2(error.fileno(), 2)
            limit = _addresses() + addresses
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            code = 99
            try:
                main(words)
            except SystemExit as end:
                code = int(end.code or 0)
            except BaseException:
                import traceback

                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        while True:
            ended, status, usage = os.wait4(child, os.WNOHANG)
            if ended:
                break
            if time.monotonic() - start > seconds:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.01)
        texts = []
        for file in (out, error):
            file.seek(0)
            texts.append(file.read(1 << 20).decode("utf-8", "replace"))
        return {
            "words": words,
            "code": os.waitstatus_to_exitcode(status),
            "output": "".join(texts),
            "error": texts[1],
            "seconds": time.monotonic() - start,
            "peak": usage.ru_maxrss * 1024,
        }


def _addresses():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmSize:")[1].split()[0]) * 1024


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    _serve()
