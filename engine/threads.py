"""Number and waiting of OpenMP threads, which the library reads when torch is loaded."""

from __future__ import annotations

import os

from engine.container import cpu_count

SPIN_COUNT = 3000
"""Rounds that an idle OpenMP thread spins before it sleeps, about 0.1 ms. GNU OpenMP's default of 300,000 costs nothing on
an idle machine; with another process on the cores it makes bands 15 to 25 times slower (docs/log.md)."""


def limit_spinning() -> None:
    """Limit the spinning of OpenMP threads, unless the user has set it. Without effect once torch is loaded."""
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)


def limit_threads() -> None:
    """Limit the threads to the processors that this process may use, unless the user has set their number.

    OpenMP and libvips know of no quota: with more threads than it pays for, all of them are stopped most of the time.
    """
    count = cpu_count()
    if count < (os.cpu_count() or 1):
        for name in ("OMP_NUM_THREADS", "VIPS_CONCURRENCY"):
            os.environ.setdefault(name, str(count))
