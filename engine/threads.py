"""Waiting of OpenMP threads, which the library reads when torch is loaded."""

from __future__ import annotations

import os

SPIN_COUNT = 3000
"""Rounds that an idle OpenMP thread spins before it sleeps, about 0.1 ms. GNU OpenMP's default of 300,000 costs nothing on
an idle machine; with another process on the cores it makes bands 15 to 25 times slower (docs/log.md)."""


def limit_spinning() -> None:
    """Limit the spinning of OpenMP threads, unless the user has set it. Without effect once torch is loaded."""
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
