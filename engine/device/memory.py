"""Memory of the process on the host and on the device: free, in use, and at its peak."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

import psutil
import torch

from engine.container import free_memory
from engine.device.heap import malloc_trim
from engine.device.runtime import device_module, memory_module

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_SAMPLE_SECONDS = 0.002

_earlier_peak = 0
"""Peak of resident bytes before the last reset of the kernel's record."""


def resident() -> int:
    """Resident bytes of this process."""
    return int(psutil.Process().memory_info().rss)


def process_peak() -> int:
    """Peak of this process's resident bytes since its start, as far as the system keeps a record, else since import."""
    with suppress(OSError):
        return max(_earlier_peak, _peak())
    return max(_earlier_peak, resident())


class PeakMemory:
    """Measures the peak of host and device memory inside a ``with`` block.

    On Linux the host's peak is the kernel's own; elsewhere a thread samples the resident size. The device's peak is
    that of PyTorch's allocator, plus the process's memory outside PyTorch at the end, which only ever grows.

    Attributes:
        start: resident bytes before the block.
        device_start: device bytes before the block; 0 without an accelerator.
        host: peak of resident bytes, valid after the block.
        device: peak of device bytes, valid after the block; 0 without an accelerator.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.start = self.host = self.device = 0
        self.device_start = 0

    def __enter__(self) -> PeakMemory:
        malloc_trim()
        if (api := memory_module(self._device)) is not None:
            self.device_start = device_bytes(self._device)
            api.reset_peak_memory_stats(self._device)
        self.start = self.host = resident()
        if not _reset_peak():
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _earlier_peak  # noqa: PLW0603 (the kernel's record is one for the process, too)
        if self._thread is None:
            self.host = _peak()
        else:
            self._stop.set()
            self._thread.join()
            _earlier_peak = max(_earlier_peak, self.host)
        if (api := memory_module(self._device)) is not None:
            self.device = api.max_memory_reserved(self._device) + _bytes_outside_torch(self._device)

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            self.host = max(self.host, resident())


def _reset_peak() -> bool:
    """Reset the kernel's record of the peak; False where it keeps none (proc(5), clear_refs, value 5)."""
    global _earlier_peak  # noqa: PLW0603
    try:
        _earlier_peak = max(_earlier_peak, _peak())
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def _peak() -> int:
    """Peak of resident bytes since the last reset."""
    line = next(text for text in _STATUS.read_text().splitlines() if text.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def free_host() -> int:
    """Bytes of host memory for this process in all: the bytes it holds, and the bytes that machine and limits leave."""
    left, limited = int(psutil.virtual_memory().available), free_memory()
    return (left if limited is None else min(left, limited)) + resident()


def free_device(device: torch.device) -> int | None:
    """Bytes of device memory that this process can hold in all; None for a device without memory of its own."""
    api = memory_module(device)
    if api is None:
        return None
    held = device_bytes(device)
    return int(api.mem_get_info(device)[0]) + held


def device_bytes(device: torch.device) -> int:
    """Bytes of device memory that this process holds while no work runs; 0 for a device without memory of its own.

    Returns the cached blocks of PyTorch's allocator to the driver first.
    """
    api = memory_module(device)
    if api is None:
        return 0
    api.synchronize(device)
    api.empty_cache()
    return int(api.memory_reserved(device)) + _bytes_outside_torch(device)


def open_device(device: torch.device) -> None:
    """Make a tensor on a device, copy it to the host, and remember the memory that the process's context takes.

    Raises:
        RuntimeError, AssertionError: the device cannot be used.
    """
    before = _used_on_card(device)
    torch.empty(1, device=device).cpu()
    after = _used_on_card(device)
    if device in _contexts or (api := memory_module(device)) is None:
        return
    outside = _outside(device)
    own = 0 if before is None or after is None else after - before - int(api.memory_reserved(device))
    # Without NVML, or if the process opened the device before, nothing tells our context from other processes' memory.
    _contexts[device] = outside, min(outside, own if own >= _LEAST_CONTEXT else _USUAL_CONTEXT)


_LEAST_CONTEXT, _USUAL_CONTEXT = 64 << 20, 600 << 20
"""Bytes of a context with its libraries at least, and usually at most: 290 to 600 MiB by card and version of CUDA."""

_contexts: dict[torch.device, tuple[int, int]] = {}
"""Device -> bytes outside PyTorch's allocator, of all processes, when it was opened; and this process's part of them."""


def _bytes_outside_torch(device: torch.device) -> int:
    """Device bytes of this process outside PyTorch's allocator: context, kernel code and instantiated graphs.

    The process's total where NVML lists processes; it does not on Windows and in containers. Elsewhere the context when the
    device was opened, and what all processes have taken since.
    """
    api = memory_module(device)
    if hasattr(api, "list_gpu_processes"):
        with suppress(Exception):  # NVML may be missing or of another version, and raises errors of its own
            total = process_bytes(api.list_gpu_processes(device), os.getpid())
            if total is not None:
                return max(0, total - int(api.memory_reserved(device)))
    if device not in _contexts:
        open_device(device)
    at_start, own = _contexts[device]
    return max(0, _outside(device) - at_start + own)


def _outside(device: torch.device) -> int:
    """Bytes in use on the device, by all processes, outside this process's PyTorch."""
    api = memory_module(device)
    free, total = api.mem_get_info(device)
    return max(0, int(total) - int(free) - int(api.memory_reserved(device)))


def _used_on_card(device: torch.device) -> int | None:
    """Bytes in use on the device, by all processes, without opening it; None without NVML."""
    with suppress(Exception):
        return int(device_module(device).device_memory_used(device))
    return None


def process_bytes(listing: str, pid: int) -> int | None:
    """Bytes of a process in the output of ``torch.cuda.list_gpu_processes``; None if it is not listed."""
    match = re.search(rf"process +{pid} uses +([\d.]+) MB", listing)
    return int(float(match[1]) * (1 << 20)) if match else None


@contextmanager
def device_limit(device: torch.device, limit: int | None) -> Iterator[None]:
    """Limit the process to ``limit`` bytes of a device: PyTorch raises ``OutOfMemoryError`` beyond it.

    Does nothing if ``limit`` is None, or where PyTorch cannot limit the device.
    """
    api = memory_module(device)
    if limit is None or not hasattr(api, "set_per_process_memory_fraction"):
        yield
        return
    _, total = api.mem_get_info(device)
    for_torch = limit - _bytes_outside_torch(device)
    before = getattr(api, "get_per_process_memory_fraction", lambda _: 1.0)(device)  # newer than torch 2.6
    api.set_per_process_memory_fraction(min(before, max(0.0, for_torch / total)), device)
    try:
        yield
    finally:
        api.set_per_process_memory_fraction(before, device)
