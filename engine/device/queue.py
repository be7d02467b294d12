"""Work queue of a device: asynchronous copies, events and captured launches.

``DeviceQueue`` runs everything in program order, which is correct on every device. ``CudaDeviceQueue`` adds CUDA's streams,
events and graphs. Code written against these methods runs on a CPU too, except for ``CudaDeviceQueue`` itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, cast

import torch
from torch import Tensor

from engine.device.runtime import activate, device_module, memory_module

WARM_UPS = 2
"""Runs before a capture: in the first, libraries choose algorithms and allocate workspaces."""


class OutOfDeviceMemory(MemoryError):
    """An accelerator's memory, or the process's share of it, is used up."""

    position: int | None = None
    """Position of the stage that ran out of memory; None if unknown."""


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn PyTorch's out-of-memory errors, on a device or on the host, into ``MemoryError`` of one line."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfDeviceMemory(str(error).splitlines()[0]) from error
    except RuntimeError as error:
        if "can't allocate memory" in str(error):  # the host's allocator has no class of its own
            raise MemoryError(str(error).splitlines()[0]) from error
        raise


@contextmanager
def full_float32() -> Iterator[None]:
    """Disable TF32 in cuDNN: by default it rounds the factors of float32 convolutions to 10 bits."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def synchronize(device: torch.device) -> None:
    """Wait until all work queued on the device is done."""
    if memory_module(device) is not None:
        device_module(device).synchronize(device)  # not the current device, which may be another one
    elif device.type != "cpu":
        device_module(device).synchronize()  # torch.mps has one device and takes no argument


class Event(Protocol):
    """A point in a queue."""

    def synchronize(self) -> None:
        """Wait until the device has reached this point."""


class _CompletedEvent:
    """Event of a queue that runs in program order."""

    def synchronize(self) -> None:
        pass


class DeviceQueue:
    """Work queue that runs in program order."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def pinned(self, count: int, dtype: torch.dtype) -> Tensor:
        """Allocate ``count`` elements of page-locked host memory, which asynchronous copies need on CUDA."""
        return torch.empty(count, dtype=dtype)

    def record_event(self) -> Event:
        """Record an event after all work queued so far."""
        return _CompletedEvent()

    def copy_to_host(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Event:
        """Queue copies of (device tensor, pinned tensor) behind the work queued so far.

        Returns:
            An event after the last copy. Work queued later may run beside the copies.
        """
        for source, target in pairs:
            target.copy_(source)
        return _CompletedEvent()

    def warm_up(self, work: Callable[[], None]) -> None:
        """Run ``work`` before its capture and return its temporary memory.

        All stages are warmed up before the first capture, which keeps its memory.
        """
        work()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Capture the launches of ``work`` and return a function that replays them on the same memory."""
        return work

    @contextmanager
    def activate(self) -> Iterator[None]:
        """Make this queue's device the current one."""
        yield

    def release(self) -> None:
        """Return unused memory to the system; drop all captures first."""


class CudaDeviceQueue(DeviceQueue):
    """Queue on CUDA's current stream, with a second stream for copies to the host and one for captures.

    All captured graphs allocate from one memory pool. They may share it because no two run at the same time and none
    leaves its result there: their outputs are allocated before the capture.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._cuda = device_module(device)
        self._copy_stream = self._cuda.Stream(device)
        self._capture_stream = self._cuda.Stream(device)
        self._pool = self._cuda.graph_pool_handle()

    def _new_event(self) -> torch.cuda.Event:
        event: torch.cuda.Event = self._cuda.Event(blocking=True)  # a waiting thread leaves its core to the compressors
        return event

    def pinned(self, count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(count, dtype=dtype, pin_memory=True)

    def record_event(self) -> Event:
        event = self._new_event()
        event.record(self._cuda.current_stream(self.device))
        return event

    def copy_to_host(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Event:
        event = self._new_event()
        self._copy_stream.wait_stream(self._cuda.current_stream(self.device))
        with self._cuda.stream(self._copy_stream):
            for source, target in pairs:
                target.copy_(source, non_blocking=True)
            event.record(self._copy_stream)
        return event

    def warm_up(self, work: Callable[[], None]) -> None:
        # On the stream of the capture: libraries keep one workspace per stream.
        self._capture_stream.wait_stream(self._cuda.current_stream(self.device))
        with self._cuda.stream(self._capture_stream):
            for _ in range(WARM_UPS):
                work()
        self._cuda.synchronize(self.device)
        self._cuda.empty_cache()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = self._cuda.CUDAGraph()
        with self._cuda.graph(graph, pool=self._pool, stream=self._capture_stream):
            work()
        return cast(Callable[[], None], graph.replay)

    @contextmanager
    def activate(self) -> Iterator[None]:
        with activate(self.device):
            yield

    def release(self) -> None:
        self._cuda.synchronize(self.device)
        self._cuda.empty_cache()
        # CUDA graphs cannot be captured into a pool whose last graph was deleted.
        self._pool = self._cuda.graph_pool_handle()


def device_queue(device: torch.device) -> DeviceQueue:
    """The queue for a device: CUDA's own, or one in program order for CPU, MPS and XPU."""
    return CudaDeviceQueue(device) if hasattr(device_module(device), "CUDAGraph") else DeviceQueue(device)
