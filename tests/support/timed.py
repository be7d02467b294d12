"""A command with its time, memory and the moment of every line that it prints.

As a script it is a small parent of the command: the peak that the kernel reports for a child of the large test process
would begin with the test process's own.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_SAMPLE_SECONDS = 0.005


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out_lines: list[tuple[float, str]]
    """CPU seconds and text of every line on stdout."""
    err_lines: list[tuple[float, str]]
    """CPU seconds and text of every line on stderr."""
    wall: float
    cpu: float
    peak: int
    """Peak of resident bytes, as the kernel counts it."""

    @property
    def out(self) -> str:
        """Text on stdout."""
        return "".join(text for _, text in self.out_lines)

    @property
    def err(self) -> str:
        """Text on stderr."""
        return "".join(text for _, text in self.err_lines)


def run(words, cwd, env, interrupt=None) -> Done:
    """Run a command; ``interrupt``: send SIGINT when a line on stderr matches this pattern."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        script = [sys.executable, "-I", "-S", __file__, str(report), interrupt or "", *map(str, words)]
        subprocess.run(script, cwd=cwd, env=env, check=True)
        return Done(**json.loads(report.read_text()))


def _cpu_seconds(pid):
    with suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _watch_peak(pid, peaks, ended):
    """Sample the kernel's own record, which the engine resets before it measures."""
    while not ended.wait(_SAMPLE_SECONDS):
        with suppress(OSError):
            found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
            if found:
                peaks[0] = max(peaks[0], int(found[1]) * 1024)


def _read(process, stream, lines, interrupt=""):
    for line in stream:
        lines.append((_cpu_seconds(process.pid), line))
        if interrupt and re.search(interrupt, line):
            process.send_signal(signal.SIGINT)


def _main(report, interrupt, *command):
    start, out, err, peaks, ended = time.perf_counter(), [], [], [0], threading.Event()
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    threads = [
        threading.Thread(target=_watch_peak, args=(process.pid, peaks, ended)),
        threading.Thread(target=_read, args=(process, process.stdout, out)),
    ]
    for thread in threads:
        thread.start()
    _read(process, process.stderr, err, interrupt)
    _, status, usage = os.wait4(process.pid, 0)
    ended.set()
    for thread in threads:
        thread.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    result = {
        "code": process.returncode, "out_lines": out, "err_lines": err, "wall": time.perf_counter() - start,
        "cpu": usage.ru_utime + usage.ru_stime, "peak": max(peaks[0], usage.ru_maxrss * 1024),
    }  # fmt: skip
    Path(report).write_text(json.dumps(result))


if __name__ == "__main__":
    _main(*sys.argv[1:])
