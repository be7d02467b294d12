"""Commands in processes that are forked from a server which has imported the engine: their own, and quick to start.

As a script it is the server: it reads requests and writes answers, a line of JSON for each.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

MODULES = (
    "engine.cli.render", "engine.cli.export", "engine.cli.model", "engine.cli.train", "engine.cli.info", "engine.cli.check",
    "engine.exporters.tiff", "engine.exporters.preview", "engine.run.bands", "engine.run.serial", "engine.run.batched",
)  # fmt: skip
"""What the commands import."""


class Server:
    """Starts commands. To be used as a context."""

    def __enter__(self):
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def start(self, folder, words):
        """Start a command line in ``folder``."""
        error = tempfile.NamedTemporaryFile("r", errors="replace")  # noqa: SIM115 (closed with the process)
        pid = self.ask({"words": words.split(), "folder": str(folder), "error": error.name})
        return Forked(self, pid, error)

    def ask(self, request):
        """Answer of the server."""
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


class Forked:
    """A running command, with the part of Popen's interface that is needed."""

    def __init__(self, server, pid, error):
        self._server, self.pid, self._error = server, pid, error

    def poll(self):
        """Zero as soon as the process has ended, else None."""
        with suppress(OSError, IndexError):
            if Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                return None
        return 0

    def send_signal(self, number):
        os.kill(self.pid, number)  # its entry stays until it is waited for

    def finish(self):
        """Wait for the end; returns exit code and standard error."""
        code = self._server.ask({"wait": self.pid})
        with self._error as file:
            return code, file.read()


def _serve():
    for module in MODULES:
        importlib.import_module(module)
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        answer = _wait(request["wait"]) if "wait" in request else _fork(**request)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _wait(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _fork(words, folder, error):
    if child := os.fork():
        return child
    from engine.cli.app import main

    os.chdir(folder)
    for stream, path in enumerate((os.devnull, os.devnull, error)):
        os.dup2(os.open(path, os.O_RDWR), stream)
    code = 99
    try:
        main(words)
    except SystemExit as end:
        code = end.code
    finally:
        os._exit(code or 0)


if __name__ == "__main__":
    _serve()
