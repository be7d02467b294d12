"""Commands of the engine in processes of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS = 600
"""Longest time that a command or a condition may take."""


def start(folder, words, **options):
    """Start a command line in ``folder`` on one thread; ``options`` are those of Popen."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    # Under nohup the engine ignores SIGHUP, as it should; these tests may run under it.
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "preexec_fn": _default_hangup, **options}
    command = [sys.executable, "-m", "engine", *words.split()]
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


def _default_hangup():
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def finish(process):
    """Wait for the end; returns exit code and standard error."""
    _, error = process.communicate(timeout=SECONDS)
    return process.returncode, (error or b"").decode(errors="replace")


def wait_for(condition, process, pause=0.002):
    """Wait until the condition holds or the process has ended."""
    end = time.monotonic() + SECONDS
    while not condition() and process.poll() is None:
        assert time.monotonic() < end, "the condition never held"
        time.sleep(pause)


def catches(process, number):
    """Whether the process handles a signal: from the engine's first line on. What comes before is Python's own start."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return False
    caught = next((int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt")), 0)
    return bool(caught >> (number - 1) & 1)
