"""Threads that compute a chain of links for several bands at the same time.

A link computes bands in their order, and a band passes the links in theirs. So while a link computes one band, the links behind
it compute earlier ones: a wavefront. Each operation runs on a single thread. Threads meet once for each link and band, not
for each operation, and a thread whose core is taken by another process delays no other one for long.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch


class Wavefront:
    """Runs a task for each link and band, in order along both, on the threads of a pool."""

    def __init__(self, links: int, run: Callable[[int, int], None], workers: int) -> None:
        """``run``: computes a link, the first argument, for a band, the second; ``workers``: threads."""
        self._run = run
        self._pool = _pool(workers, torch.get_num_threads())
        self._changed = threading.Condition()
        self._done = [0] * links  # bands that each link has computed
        self._is_running = [False] * links
        self._submitted = 0
        self._error: BaseException | None = None

    @property
    def submitted(self) -> int:
        """Bands submitted so far."""
        return self._submitted

    @property
    def complete(self) -> int:
        """Bands that all links have computed."""
        return self._done[-1]

    def submit(self) -> None:
        """Let the next band pass the links."""
        with self._changed:
            self._submitted += 1
            self._start_if_ready(0)

    def wait(self, bands: int) -> None:
        """Wait for the completion of the first ``bands`` bands. Raises the error of a task."""
        with self._changed:
            self._changed.wait_for(lambda: self.complete >= bands or self._error is not None)
            if self._error is not None:
                raise self._error

    def restart(self) -> None:
        """Wait for running tasks, drop waiting ones, and count bands from 0 again."""
        with self._changed:
            self._submitted = 0  # no task is ready from now on
            self._changed.wait_for(lambda: not any(self._is_running))
            self._done = [0] * len(self._done)
            self._error = None

    def _start_if_ready(self, link: int) -> None:
        band = self._done[link]
        ready = min(self._submitted, self._done[link - 1] if link else self._submitted)
        if band < ready and not self._is_running[link] and self._error is None:
            self._is_running[link] = True
            self._pool.submit(self._work, link, band)

    def _work(self, link: int, band: int) -> None:
        try:
            self._run(link, band)
        except BaseException as error:  # noqa: BLE001  wait() raises it
            with self._changed:
                self._error = error
        with self._changed:
            self._is_running[link] = False
            self._done[link] += 1
            for following in (link + 1, link):
                if following < len(self._done):
                    self._start_if_ready(following)
            self._changed.notify_all()


@cache
def _pool(workers: int, threads: int) -> ThreadPoolExecutor:
    """Pool that all streams share; each worker has an equal share of PyTorch's ``threads``."""
    share = max(1, threads // workers)
    pool = ThreadPoolExecutor(workers, "band")
    started = threading.Barrier(workers + 1)

    def start() -> None:
        torch.get_num_threads()  # the first call on a thread sets the number of the process
        torch.set_num_threads(share)
        started.wait()

    for _ in range(workers):
        pool.submit(start)
    started.wait()
    torch.set_num_threads(threads)  # for threads that start later
    return pool


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads
