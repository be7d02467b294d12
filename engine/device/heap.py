"""Settings of glibc's heap that keep a process's memory predictable. On other systems they do nothing."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_M_ARENA_MAX, _M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -8, -3, -1
"""Parameters of mallopt(3)."""

_MMAP_THRESHOLD, MMAP_THRESHOLD_IN_NETWORK = 1 << 20, 16 << 20
"""Bytes from which a block is mapped on its own, so that freeing it leaves no hole in the heap.

Inside a network the threshold is higher: RRDBNet on a 240 x 240 tile takes as long as with 32 MiB, but 1.1 to 1.25 times as
long with 8 MiB (docs/log.md).
"""

MMAP_THRESHOLD_IN_STEPS = 5 << 20
"""The same in bands whose operations run one after another: their largest temporaries would leave more holes than planned.

Results of packed convolutions, up to 4 MiB, stay in the heap.
"""

_TRIM_THRESHOLD = 1 << 30


def fix_malloc_thresholds() -> None:
    """Make the heap behave alike from the first tile to the last; call this before the first measurement.

    All threads share one arena, since further ones would hold freed memory that the others need. The mmap threshold is
    fixed, since glibc raises it while blocks are freed. Smaller blocks stay in the heap until ``malloc_trim``.
    """
    parameters = (
        (_M_ARENA_MAX, 1),
        (_M_MMAP_THRESHOLD, _MMAP_THRESHOLD),
        (_M_TRIM_THRESHOLD, _TRIM_THRESHOLD),
    )
    for parameter, value in parameters:
        _call_glibc("mallopt", parameter, value)


@contextmanager
def malloc_for_network(trim: bool = True, threshold: int = MMAP_THRESHOLD_IN_NETWORK) -> Iterator[None]:
    """Raise the mmap threshold while a network runs: it frees and allocates medium-sized blocks all the time.

    Args:
        trim: return freed pages to the system first; otherwise they add to the peak.
        threshold: bytes from which a block is mapped on its own.
    """
    if trim:
        malloc_trim()
    raise_mmap_threshold(threshold)
    try:
        yield
    finally:
        _call_glibc("mallopt", _M_MMAP_THRESHOLD, _MMAP_THRESHOLD)


def raise_mmap_threshold(threshold: int = MMAP_THRESHOLD_IN_NETWORK) -> None:
    """Raise the mmap threshold as within ``malloc_for_network``, until that ends on any thread."""
    _call_glibc("mallopt", _M_MMAP_THRESHOLD, threshold)


def malloc_trim() -> None:
    """Return freed pages of the heap to the system (malloc_trim(3))."""
    _call_glibc("malloc_trim", 0)


def _call_glibc(function: str, *arguments: int) -> None:
    if sys.platform == "linux" and (call := getattr(ctypes.CDLL(None), function, None)) is not None:
        call(*arguments)
