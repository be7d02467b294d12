"""Commands in processes that are forked from a server which has imported the engine: their own, and quick to start.

As a script it is the server: it reads requests and writes answers, a line of JSON for each.
"""

import ctypes
import importlib
import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

MODULES = (
    "engine.cli.render", "engine.cli.upscale", "engine.cli.export", "engine.cli.model", "engine.cli.train",
    "engine.cli.info", "engine.cli.check",
    "engine.exporters.tiff", "engine.exporters.preview", "engine.run.bands", "engine.run.serial", "engine.run.batched",
)  # fmt: skip
"""What the commands import."""
SECONDS = 600
"""Time after which a command has hung. A time in which the server is stopped as well does not count."""


class Server:
    """Starts commands. To be used as a context.

    Args:
        shim: library made of faults.c, for commands with faults.
    """

    def __init__(self, shim=None):
        self._preload = {} if shim is None else {"LD_PRELOAD": str(shim)}

    def __enter__(self):
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
        environment |= self._preload
        command = [sys.executable, __file__]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def start(self, folder, words, fault=None):
        """Start a command line in ``folder``; ``fault``: arguments of ``_arm`` by name."""
        error = tempfile.NamedTemporaryFile("r", errors="replace")  # noqa: SIM115 (closed with the process)
        pid = self.ask({"words": words.split(), "folder": str(folder), "stderr": error.name, "fault": fault})
        return Forked(self, pid, error)

    def ask(self, request):
        """Answer of the server."""
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


class Forked:
    """A running command, with the part of Popen's interface that is needed.

    Attributes:
        calls: after ``finish``, the number of calls of the fault's kind.
    """

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
        code, self.calls = self._server.ask({"wait": self.pid})
        with self._error as file:
            return code, file.read()


def _serve():
    for module in MODULES:
        importlib.import_module(module)
    import torch

    torch.set_num_threads(1)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    counters = {}
    for line in sys.stdin:
        request = json.loads(line)
        if pid := request.get("wait"):
            answer = _wait(pid), int.from_bytes(counters.pop(pid)[:], sys.byteorder)
        else:
            counter = mmap.mmap(-1, ctypes.sizeof(ctypes.c_long))  # shared, and so readable after any end
            answer = _fork(counter, **request)
            counters[answer] = counter
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _wait(pid):
    """Exit code of a process; one that takes too long is killed."""
    for _ in range(SECONDS):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        signal.sigtimedwait({signal.SIGCHLD}, 1)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _arm(counter, folder, *, kind, error, least, number, is_lasting, cache):
    """Let a call of this process fail.

    Args:
        counter: shared memory of a C long, for the number of calls.
        folder: folder of the files whose calls are counted.
        kind, error, least: as ``faults.Kind``.
        number: number of the call, from 1 on; 0: none fails.
        is_lasting: whether all later calls fail as well.
        cache: folder for the engine's cache.
    """
    os.environ["XDG_CACHE_HOME"] = cache
    place = ctypes.addressof(ctypes.c_long.from_buffer(counter))
    ctypes.CDLL(None).fault_arm(
        ctypes.c_char(kind[0].encode()), os.fsencode(folder), ctypes.c_size_t(least), ctypes.c_long(number),
        int(is_lasting), error, ctypes.c_void_p(place),
    )  # fmt: skip


def _fork(counter, words, folder, stderr, fault):
    if child := os.fork():
        return child
    from engine.cli.app import main

    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    os.chdir(folder)
    for stream, path in enumerate((os.devnull, os.devnull, stderr)):
        os.dup2(os.open(path, os.O_RDWR), stream)
    code = 99
    if fault:
        _arm(counter, folder, **fault)
    try:
        main(words)
    except SystemExit as end:
        code = end.code
    finally:
        os._exit(code or 0)


if __name__ == "__main__":
    _serve()
