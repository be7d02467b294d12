"""The heap of glibc: its behaviour is fixed, so that memory can be predicted."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_M_ARENA_MAX, _M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -8, -3, -1


_MAPPED, _MAPPED_IN_NETWORK = 1 << 20, 16 << 20
"""Blocks from this size on are taken from the kernel and leave no holes in the heap. Inside a network the limit is
higher: RRDBNet on a 240 x 240 tile takes as long as with 32 MiB, but 1.1 to 1.25 times as long with 8 MiB (docs/log.md)."""


def fix_malloc_thresholds() -> None:
    """Make glibc's heap behave the same from the first tile to the last. Call this before the first measurement.

    All threads share one heap, since each further one would hold on to memory that the others need. The size from which
    memory is taken from the kernel directly is fixed, since it would grow while tiles run; smaller blocks stay in the
    heap until they are given back.
    """
    for parameter, value in ((_M_ARENA_MAX, 1), (_M_MMAP_THRESHOLD, _MAPPED), (_M_TRIM_THRESHOLD, 1 << 30)):
        _heap("mallopt", parameter, value)


@contextmanager
def malloc_for_network(trim: bool = True) -> Iterator[None]:
    """The heap while a network runs: it serves medium blocks itself, which a network frees and asks for again all the time.
    ``trim``: it starts without the freed pages of what ran before, which would add to the peak."""
    if trim:
        malloc_trim()
    _heap("mallopt", _M_MMAP_THRESHOLD, _MAPPED_IN_NETWORK)
    try:
        yield
    finally:
        _heap("mallopt", _M_MMAP_THRESHOLD, _MAPPED)


def malloc_trim() -> None:
    """Give freed heap pages back to the system."""
    _heap("malloc_trim", 0)


def _heap(function: str, *arguments: int) -> None:
    """Call a function of glibc's heap; nothing happens where there is another heap."""
    if sys.platform == "linux" and (call := getattr(ctypes.CDLL(None), function, None)) is not None:
        call(*arguments)
