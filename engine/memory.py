"""Measures memory: what is free, what the process holds, and the peak over a span of code."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import psutil
import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_SAMPLE_SECONDS = 0.002
_M_ARENA_MAX, _M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -8, -3, -1

_MAPPED, _MAPPED_IN_NETWORK = 1 << 20, 16 << 20
"""Blocks from this size on are taken from the kernel and leave no holes in the heap. Inside a network the limit is
higher: RRDBNet on a 240 x 240 tile takes as long as with 32 MiB, but 1.1 to 1.25 times as long with 8 MiB (docs/log.md)."""


def resident() -> int:
    """Resident bytes of this process."""
    return int(psutil.Process().memory_info().rss)


def steady_heap() -> None:
    """Make glibc's heap behave the same from the first tile to the last. Call this before the first measurement.

    All threads share one heap, since each further one would hold on to memory that the others need. The size from which
    memory is taken from the kernel directly is fixed, since it would grow while tiles run; smaller blocks stay in the
    heap until they are given back.
    """
    for parameter, value in ((_M_ARENA_MAX, 1), (_M_MMAP_THRESHOLD, _MAPPED), (_M_TRIM_THRESHOLD, 1 << 30)):
        _heap("mallopt", parameter, value)


@contextmanager
def network_heap() -> Iterator[None]:
    """The heap while a network runs: it starts without the freed pages of what ran before, which would add to the peak,
    and serves medium blocks itself, which a network frees and asks for again all the time."""
    release()
    _heap("mallopt", _M_MMAP_THRESHOLD, _MAPPED_IN_NETWORK)
    try:
        yield
    finally:
        _heap("mallopt", _M_MMAP_THRESHOLD, _MAPPED)


def release() -> None:
    """Give freed heap pages back to the system."""
    _heap("malloc_trim", 0)


def _heap(function: str, *arguments: int) -> None:
    """Call a function of glibc's heap; nothing happens where there is another heap."""
    if sys.platform == "linux" and (call := getattr(ctypes.CDLL(None), function, None)) is not None:
        call(*arguments)


class PeakMemory:
    """Peak host and device memory inside a ``with`` block; ``host`` and ``device`` in bytes, valid after it.

    Linux keeps the peak itself and lets a process reset it; elsewhere a thread samples the resident size.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.start = self.host = self.device = 0

    def __enter__(self) -> PeakMemory:
        release()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self.start = self.host = resident()
        if not _reset_peak():
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            self.host = _peak()
        else:
            self._stop.set()
            self._thread.join()
        if self._device.type == "cuda":
            self.device = torch.cuda.max_memory_reserved(self._device)

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            self.host = max(self.host, resident())


def _reset_peak() -> bool:
    """Ask the kernel to forget the peak so far (proc(5), clear_refs, value 5)."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _peak() -> int:
    line = next(text for text in _STATUS.read_text().splitlines() if text.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def free_host() -> int:
    """Bytes that this process may still take, plus what it holds now."""
    return int(psutil.virtual_memory().available) + resident()


def free_device(device: torch.device) -> int | None:
    """Free bytes of an accelerator, or None for a CPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return int(free)
