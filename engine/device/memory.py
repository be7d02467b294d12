"""Measures memory: what is free, what the process holds, and the peak over a span of code."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch

from engine.device.heap import malloc_trim

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_SAMPLE_SECONDS = 0.002


def resident() -> int:
    """Resident bytes of this process."""
    return int(psutil.Process().memory_info().rss)


class PeakMemory:
    """Peak host and device memory inside a ``with`` block; ``host`` and ``device`` in bytes, valid after it; ``start`` and
    ``device_start`` are those before it.

    Linux keeps the peak itself and lets a process reset it; elsewhere a thread samples the resident size. On a device it
    is PyTorch's peak and what the process holds besides, which only ever grows.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.start = self.host = self.device = 0
        self.device_start = 0

    def __enter__(self) -> PeakMemory:
        malloc_trim()
        if (api := accelerator_module(self._device)) is not None:
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
        if self._thread is None:
            self.host = _peak()
        else:
            self._stop.set()
            self._thread.join()
        if (api := accelerator_module(self._device)) is not None:
            self.device = api.max_memory_reserved(self._device) + _bytes_outside_torch(self._device)

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


def accelerator_module(device: torch.device) -> Any:  # noqa: ANN401
    """torch's module for a device with memory of its own; None for a CPU, and for MPS, whose memory is the host's."""
    return torch.get_device_module(device) if device.type in ("cuda", "xpu") else None


def free_device(device: torch.device) -> int | None:
    """Bytes of an accelerator that this process may still take, plus what it holds now; None without memory of its own."""
    api = accelerator_module(device)
    if api is None:
        return None
    held = device_bytes(device)
    return int(api.mem_get_info(device)[0]) + held


def device_bytes(device: torch.device) -> int:
    """Bytes of an accelerator that this process holds when nothing runs; 0 without memory of its own. Memory that PyTorch
    keeps for later is given back first."""
    api = accelerator_module(device)
    if api is None:
        return 0
    api.synchronize(device)
    api.empty_cache()
    return int(api.memory_reserved(device)) + _bytes_outside_torch(device)


def _bytes_outside_torch(device: torch.device) -> int:
    """Device memory of this process that is not PyTorch's: the driver's context, code of kernels, recorded launches.

    By the process's total where NVML knows it. Otherwise all that is used on the device counts as ours, which is right when
    nobody else uses it, and too much when somebody does.
    """
    api = accelerator_module(device)
    free, total = api.mem_get_info(device)
    used = int(total - free)
    if device.type == "cuda":
        with suppress(Exception):  # NVML is another library, of every age and with errors of its own
            used = process_bytes(torch.cuda.list_gpu_processes(device), os.getpid()) or used
    return max(0, used - int(api.memory_reserved(device)))


def process_bytes(listed: str, process: int) -> int | None:
    """Bytes of a process in what ``torch.cuda.list_gpu_processes`` says; None where it is not listed."""
    found = re.search(rf"process +{process} uses +([\d.]+) MB", listed)
    return int(float(found[1]) * (1 << 20)) if found else None


@contextmanager
def device_limit(device: torch.device, limit: int | None) -> Iterator[None]:
    """Inside, PyTorch refuses to take more of a CUDA device than leaves the process within ``limit`` bytes: what does not
    fit is an error that can be acted upon, and not a broken promise."""
    if limit is None or device.type != "cuda":
        yield
        return
    _, total = torch.cuda.mem_get_info(device)
    room = limit - _bytes_outside_torch(device)
    before = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)(device)  # newer than torch 2.6
    torch.cuda.set_per_process_memory_fraction(min(before, max(0.0, room / total)), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)
