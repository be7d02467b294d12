"""Work queue of a device: asynchronous copies, events and captured launches.

``DeviceQueue`` runs everything in program order, which is correct on every device. ``CudaDeviceQueue`` adds CUDA's streams,
events and graphs. Code written against these methods runs on a CPU too, except for ``CudaDeviceQueue`` itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from engine.device.runtime import activate, captures, device_module, memory_module

WARM_UPS = 2
"""Runs before a capture: in the first, libraries choose algorithms and allocate workspaces."""


_DEVICE_OUT_OF_MEMORY = (
    "out of memory",  # the driver, from graphs and modules (torch.AcceleratorError); MPS
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "unable to find an engine",  # cuDNN, after its every algorithm ran out of memory
)
"""Texts of RuntimeErrors that mean an exhausted device: only PyTorch's own allocator has a class for it."""


class OutOfDeviceMemory(MemoryError):
    """An accelerator's memory, or the process's share of it, is used up."""

    position: int | None = None
    """Position of the stage that ran out of memory; None if unknown."""

    redo: Callable[[], None] | None = None
    """Repeats the one step that ran out of memory and keeps its result, once everything else has freed its memory."""


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn PyTorch's out-of-memory errors, on a device or on the host, into ``MemoryError`` of one line."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfDeviceMemory(str(error).splitlines()[0]) from error
    except RuntimeError as error:
        text = str(error)
        if "can't allocate memory" in text:  # the host's allocator has no class of its own
            raise MemoryError(text.splitlines()[0]) from error
        if any(words in text for words in _DEVICE_OUT_OF_MEMORY):
            raise OutOfDeviceMemory(text.splitlines()[0]) from error
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


class Download:
    """Tensors on their way to the host."""

    def __init__(self, tensors: Sequence[Tensor], ready: Event, sources: Sequence[Tensor] = ()) -> None:
        """``sources``: tensors of the device that must live until the copies have ended."""
        self._tensors, self._ready, self._sources = tensors, ready, sources

    def result(self) -> Sequence[Tensor]:
        """The tensors on the host, after waiting for them."""
        self._ready.synchronize()
        self._sources = ()
        return self._tensors


class Uploads:
    """Tensors of one kind on their way from the host to the device, one after the other."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def start(self, values: Tensor) -> Tensor:
        """Copy to the device, beside the work queued so far. Work that is queued later finds the values there."""
        return values.to(self.device)

    def read(self) -> None:
        """Mark that the last reader of the last tensor was queued: its memory may then be used again."""


class DeviceQueue:
    """Work queue that runs in program order."""

    is_asynchronous = False
    """Whether work runs while the host goes on, so that it pays to look at a result later."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def uploads(self, count: int, dtype: torch.dtype) -> Uploads:
        """Make the memory for uploads of up to ``count`` elements."""
        return Uploads(self.device)

    def download(self, tensors: Sequence[Tensor]) -> Download:
        """Start to copy new tensors to the host behind the work queued so far. Later work may run beside the copies."""
        return Download([tensor.cpu() for tensor in tensors], _CompletedEvent())

    def pinned(self, count: int, dtype: torch.dtype) -> Tensor:
        """Allocate ``count`` elements of page-locked host memory, which asynchronous copies need on CUDA."""
        return torch.empty(count, dtype=dtype)

    def record_event(self) -> Event:
        """Record an event after all work queued so far."""
        return _CompletedEvent()

    def wait(self, event: Event) -> None:
        """Let work that is queued later wait for an event; the host goes on."""

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


class _CudaUploads(Uploads):
    """Two buffers in turn, so that a copy waits for the readers of the last tensor but one, not for those of the last."""

    def __init__(self, queue: CudaDeviceQueue, count: int, dtype: torch.dtype) -> None:
        super().__init__(queue.device)
        self._queue = queue
        self._slots = [
            (queue.pinned(count, dtype), torch.empty(count, dtype=dtype, device=queue.device)) for _ in range(2)
        ]
        self._copied = [queue.record_event() for _ in self._slots]
        self._last_read: list[Any] = list(self._copied)
        self._next = 0

    def start(self, values: Tensor) -> Tensor:
        pinned, on_device = (buffer[: values.numel()].view(values.shape) for buffer in self._slots[self._next])
        self._copied[self._next].synchronize()
        pinned.copy_(values)
        self._copied[self._next] = self._queue.copy_to_device(pinned, on_device, self._last_read[self._next])
        return on_device

    def read(self) -> None:
        self._last_read[self._next] = self._queue.record_event()
        self._next = 1 - self._next


class CudaDeviceQueue(DeviceQueue):
    """Queue on CUDA's current stream, with a stream for copies in each direction and one for captures.

    All captured graphs allocate from one memory pool. They may share it because no two run at the same time and none
    leaves its result there: their outputs are allocated before the capture.
    """

    is_asynchronous = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._cuda = device_module(device)
        self._copy_stream = self._cuda.Stream(device)
        self._upload_stream = self._cuda.Stream(device)
        self._capture_stream = self._cuda.Stream(device)
        self._pool = self._cuda.graph_pool_handle()

    def _new_event(self) -> torch.cuda.Event:
        event: torch.cuda.Event = self._cuda.Event(blocking=True)  # a waiting thread leaves its core to the compressors
        return event

    def pinned(self, count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(count, dtype=dtype, pin_memory=True)

    def uploads(self, count: int, dtype: torch.dtype) -> Uploads:
        return _CudaUploads(self, count, dtype)

    def copy_to_device(self, pinned: Tensor, target: Tensor, readers: Any) -> Event:  # noqa: ANN401 (torch's event)
        """Queue a copy beside the work queued so far, but behind the event ``readers`` of the target's last readers.

        Returns:
            An event after the copy, for which work queued later waits.
        """
        event = self._new_event()
        with self._cuda.stream(self._upload_stream):
            self._upload_stream.wait_event(readers)
            target.copy_(pinned, non_blocking=True)
            event.record(self._upload_stream)
        self.wait(event)
        return event

    def download(self, tensors: Sequence[Tensor]) -> Download:
        on_host = [self.pinned(t.numel(), t.dtype).view(t.shape) for t in tensors]
        return Download(on_host, self.copy_to_host(list(zip(tensors, on_host, strict=True))), tensors)

    def record_event(self) -> Event:
        event = self._new_event()
        event.record(self._cuda.current_stream(self.device))
        return event

    def wait(self, event: Event) -> None:
        self._cuda.current_stream(self.device).wait_event(event)

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
    return CudaDeviceQueue(device) if captures(device) else DeviceQueue(device)
