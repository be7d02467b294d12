"""Runs of the command line on files that may be hostile: each in a process of its own, with limits of time and memory.

``run`` starts this file as a server that imports the engine once and forks for each run, as importing takes seconds. The
words ``picture FILE`` are no command of the engine: they decode a picture in every way in which it decodes one.
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
        """Problem of a run on an input that may be refused: a traceback, a crash, a long line; or ""."""
        if self.code not in (0, 1, 2, 3, 4):
            return f"ended with {self.code}: {self.error[-300:]}"
        if "Traceback" in self.output:
            return f"traceback: {self.error[-2000:]}"
        if self.code and (self.error.count("\n") != 1 or len(self.error) > 310):
            return f"not one line: {self.error[:1000]!r}"
        if "\x1b" in self.output:
            return f"escape sequence: {self.output[:1000]!r}"
        return ""


def run(commands, folder, folders=None, *, addresses=ADDRESSES, seconds=SECONDS):
    """Run command lines, each a list of words, in ``folder``, or each in its own of ``folders``."""
    commands = [list(map(str, words)) for words in commands]
    folders = [str(name) for name in folders or [folder] * len(commands)]
    request = json.dumps({"commands": commands, "folders": folders, "addresses": addresses, "seconds": seconds})
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

    import engine.cli.info  # what most runs import
    import engine.model.bundle  # noqa: F401
    from engine.cli.app import main

    def command(words):
        if words[0] == "picture":
            _decode(Path(words[1]))
        else:
            main(words)

    torch.set_num_threads(1)
    results = [
        _fork(command, words, folder, request["addresses"], request["seconds"])
        for words, folder in zip(request["commands"], request["folders"], strict=True)
    ]
    sys.stdout.write(json.dumps(results))


def _decode(path):
    from engine.errors import EngineError
    from engine.geometry import Box
    from engine.io.photo import PictureSource, open_photo, resampled_photo

    try:
        source = PictureSource(path)
        source.sample(64)
        for top in range(0, min(source.size[0], 256), 64):
            source.read(Box(top, 0, min(top + 64, source.size[0]), min(source.size[1], 256)))
        resampled_photo(open_photo(path, 1), (16, 16))
    except EngineError as error:
        sys.stderr.write(f"engine: {error.for_command_line()}\n")
        raise SystemExit(error.exit_code) from None


def _fork(command, words, folder, addresses, seconds):
    with tempfile.TemporaryFile("w+b") as out, tempfile.TemporaryFile("w+b") as error:
        start = time.monotonic()
        if not (child := os.fork()):
            os.chdir(folder)
            os.dup2(out.fileno(), 1)
            os.dup2(error.fileno(), 2)
            limit = _addresses() + addresses
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            code = 99
            try:
                command(words)
                code = 0
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
