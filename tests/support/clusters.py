"""A Dask cluster of processes: a scheduler and workers that are killed, stopped or given a full disk on purpose."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from support.commands import ROOT, SECONDS, wait_for

PRELOAD = """
import ctypes, multiprocessing.sharedctypes as shared
def dask_setup(worker):
    count = worker.count_of_faults = shared.RawValue(ctypes.c_long, 0)
    ctypes.CDLL(None).fault_arm(
        ctypes.c_char(b"c"), {folder!r}.encode(), ctypes.c_size_t(0), ctypes.c_long({first}), 1, 28, ctypes.byref(count)
    )
"""
"""Preload of a worker: from its n-th change of a file below a folder on, the disk is full (tests/support/faults.c)."""


class Cluster:
    """A scheduler and workers as processes; ``prefix`` runs one on another host, as ``ip netns exec`` does.

    Args:
        folder: folder of logs.
        host: address of the scheduler.
        prefix: words before the command of the scheduler.
        ttl: seconds after which a silent worker counts as lost.
    """

    def __init__(self, folder, host="127.0.0.1", prefix=(), ttl=10):
        self.folder, self.prefix = folder, list(prefix)
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": f"{ttl}s",
        }
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.host, self.address = host, f"tcp://{host}:{self.port}"
        self.workers = []
        self.scheduler = None

    def __enter__(self):
        self.start_scheduler()
        return self

    def __exit__(self, *_):
        for process in (*self.workers, self.scheduler):
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait()

    def start_scheduler(self):
        words = f"distributed.cli.dask_scheduler --host {self.host} --port {self.port} --no-dashboard --no-show"
        self.scheduler = self._start(words.split(), self.prefix, "scheduler")

    def add(self, *options, prefix=(), shim=None, first=1, full=None):
        """Start a worker; ``full``: folder whose disk is full from the worker's change ``first`` on, by the library ``shim``."""
        words = f"distributed.cli.dask_worker {self.address} --nthreads 1 --no-nanny --no-dashboard".split()
        environment = {}
        name = f"worker-{len(self.workers)}"
        if full is not None:
            preload = self.folder / f"{name}.py"
            preload.write_text(PRELOAD.format(folder=str(full), first=first))
            words += ["--preload", str(preload)]
            environment["LD_PRELOAD"] = str(shim)
        words += ["--local-directory", str(self.folder / "dask"), "--name", name, *options]
        self.workers.append(self._start(words, prefix, name, environment))
        return self.workers[-1]

    def _start(self, words, prefix, name, environment=None):
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [*prefix, sys.executable, "-m", *words], cwd=self.folder, stdout=log, stderr=log,
                env={**self.environment, **(environment or {})},
            )  # fmt: skip

    def busy(self, store):
        """Workers that render a share of a store now."""
        return [process for process in self.workers if holds(process, store)]

    def wait(self, count):
        """Wait until ``count`` workers have come to the scheduler."""
        path = self.folder / "scheduler.log"
        wait_for(lambda: path.read_text().count("Register worker") >= count, self.scheduler, pause=0.1)
        assert self.scheduler.poll() is None, path.read_text()


def holds(process, store):
    """Whether a process that runs renders a share of a store: it has the file of a part's lock open."""
    proc = Path(f"/proc/{process.pid}")
    try:
        links = [os.readlink(link) for link in (proc / "fd").iterdir()]
        state = (proc / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "TZ" and any(f"{store.parent}/" in link and "/part-" in link for link in links)


def wait_until(condition, seconds=SECONDS):
    """Wait until the condition holds; returns its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "the condition never held"
        time.sleep(0.02)
    return value
