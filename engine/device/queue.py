"""An accelerator's queue of work: copies beside it, points to wait for, launches that are recorded and repeated.

``DeviceQueue`` does everything in program order, which is right on every device; ``CudaDeviceQueue`` is what CUDA offers on
top. The tile loop of engine.run.batched is written against these few methods, so all of it but ``CudaDeviceQueue`` runs on a
CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

_cuda: Any = torch.cuda
"""Its classes have no types."""

WARM_UPS = 2
"""Runs before a launch is recorded: libraries choose their algorithms and make their workspaces in the first."""


class OutOfDeviceMemory(MemoryError):
    """An accelerator's memory, or the share of it that the run may take, is used up. ``position``: of the stage, if known."""

    position: int | None = None


@contextmanager
def memory_errors() -> Iterator[None]:
    """torch has a class for an accelerator's memory and only words for the host's: both become a MemoryError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfDeviceMemory(str(error).splitlines()[0]) from error
    except RuntimeError as error:
        if "can't allocate memory" in str(error):
            raise MemoryError(str(error).splitlines()[0]) from error
        raise


@contextmanager
def full_float32() -> Iterator[None]:
    """Inside, convolutions in float32 are in float32: PyTorch lets cuDNN round their factors to 10 bits, as half precision."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def finished(device: torch.device) -> None:
    """Wait until a device has done all that it was asked for."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


class Event(Protocol):
    """A point in the queue; ``synchronize`` waits until the device has reached it."""

    def synchronize(self) -> None: ...


class _Reached:
    def synchronize(self) -> None:
        pass


class DeviceQueue:
    """What is asked for is done when a call returns, or before anything that is asked for later."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def pinned(self, count: int, dtype: torch.dtype) -> Tensor:
        """``count`` elements of host memory, from which and to which the device copies by itself if it can."""
        return torch.empty(count, dtype=dtype)

    def record_event(self) -> Event:
        """The point in the queue after all that was asked for so far."""
        return _Reached()

    def copy_to_host(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Event:
        """Copy (from the device, to pinned memory) once what was asked for so far is done; returns the end of it."""
        for source, target in pairs:
            target.copy_(source)
        return _Reached()

    def warm_up(self, work: Callable[[], None]) -> None:
        """Run what is to be recorded, and give the memory it took back: all stages are warmed before the first is recorded."""
        work()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """``work``, which fills buffers that stay where they are, as something that is cheap to repeat."""
        return work

    @contextmanager
    def activate(self) -> Iterator[None]:
        """Inside, what is launched goes to this queue's device."""
        yield

    def release(self) -> None:
        """Give memory that is no longer used back to the system; recorded launches must have been dropped."""


class CudaDeviceQueue(DeviceQueue):
    """The default stream, one more for copies to the host, and CUDA graphs whose temporaries share one pool of memory.

    The graphs may share it because no two run at once and none leaves its result there: they write to buffers that were
    made before.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        with torch.cuda.device(device):
            self._copies = _cuda.Stream()
            self._recording = _cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()

    def pinned(self, count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(count, dtype=dtype, pin_memory=True)

    def record_event(self) -> Event:
        event: torch.cuda.Event = _cuda.Event(blocking=True)  # whoever waits leaves the core to those who compress
        event.record(torch.cuda.current_stream(self.device))
        return event

    def copy_to_host(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Event:
        event: torch.cuda.Event = _cuda.Event(blocking=True)
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copies):
            for source, target in pairs:
                target.copy_(source, non_blocking=True)
            event.record(self._copies)
        return event

    def warm_up(self, work: Callable[[], None]) -> None:
        # On the stream of the recording: libraries keep a workspace for each stream.
        self._recording.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._recording):
            for _ in range(WARM_UPS):
                work()
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._recording):
            work()
        return graph.replay

    @contextmanager
    def activate(self) -> Iterator[None]:
        with torch.cuda.device(self.device):
            yield

    def release(self) -> None:
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        # A pool whose last graph is gone may not be recorded into again.
        self._pool = torch.cuda.graph_pool_handle()


def device_queue(device: torch.device) -> DeviceQueue:
    """The queue of a device: MPS and XPU run in program order too."""
    return CudaDeviceQueue(device) if device.type == "cuda" else DeviceQueue(device)
