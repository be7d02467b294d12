"""The executor for accelerators: the tiles of ``serial``, many at once, while the ones before are copied and written.

A ``BatchRunner`` takes one stage's tiles to the device and back: gather into a batch, a recorded launch of the network, trim into
a slot, a copy to pinned memory beside the next batch. All its buffers are made once. The last stage's pixels go from there
to threads that compress and write; those of inner stages go to the cache of their ``TiledStage``.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from types import TracebackType

import torch
from torch import Tensor

from engine.device.queue import DeviceQueue, Event, OutOfDeviceMemory, memory_errors
from engine.geometry import Box
from engine.io.zarr_store import Sink
from engine.kernels.trim import Trimmed
from engine.plan.limits import IN_FLIGHT, WRITERS
from engine.plan.plan import Plan, StagePlan, Tile
from engine.run.serial import BoxWritten
from engine.run.stage import Stage
from engine.run.tiles import TiledStage, made_dtype, trimmed

_MOST_PIECES = 64
"""Of a network's tail, where memory ran out. Beyond, a strip's halo is most of it."""


class OutputBuffer:
    """Room for the pixels of one batch, on the device and on the host. ``readers``: writes that still need them."""

    def __init__(self, queue: DeviceQueue, batch: int, values: int, dtype: torch.dtype) -> None:
        self._device = torch.empty(batch * values, dtype=dtype, device=queue.device)
        self._host = queue.pinned(batch * values, dtype)
        self._faults = torch.zeros(batch, 3, dtype=torch.int64, device=queue.device)
        self.nonfinite = queue.pinned(batch * 3, torch.int64).view(batch, 3)
        self._values = values
        self.tiles: Sequence[Tile] = ()
        self.ready: Event = queue.record_event()
        self.readers: list[Future[BoxWritten]] = []

    def on_device(self, k: int) -> Trimmed:
        return Trimmed(self._part(self._device, k), None, self._faults[k])

    def on_host(self, k: int) -> Tensor:
        return self._part(self._host, k)

    def _part(self, values: Tensor, k: int) -> Tensor:
        height, width = self.tiles[k].made.shape
        return values[k * self._values :][: 3 * height * width].view(3, height, width)

    def copy_to_host(self, queue: DeviceQueue) -> None:
        used = len(self.tiles) * self._values
        self.ready = queue.copy_to_host([(self._device[:used], self._host[:used]), (self._faults, self.nonfinite)])


class BatchRunner:
    """One stage's way through the device, ``batch`` tiles at a time: a ``Runner`` (engine.run.tiles).

    ``last``: its pixels are written from where they are, so they have ``IN_FLIGHT`` slots more.
    """

    def __init__(
        self, queue: DeviceQueue, stage: Stage, plan: StagePlan, position: int, batch: int, last: bool
    ) -> None:
        self.queue = queue
        self.batch = batch
        self._stage = stage
        self._plan = plan
        self._position = position
        self._last = last
        self._count = IN_FLIGHT + 1 if last else 1
        self._slots: deque[OutputBuffer] = deque()
        self._input = self._output = self._blocks = self._staging = torch.empty(0)
        self._uploaded: Event = queue.record_event()
        self._replay: Callable[[], None] | None = None

    def __call__(self, image: TiledStage, tiles: Iterable[Tile]) -> Iterator[tuple[Tile, Tensor]]:
        return ((tile, pixels.clone()) for tile, pixels, _ in self.stream(image, tiles))

    def stream(
        self, image: TiledStage, tiles: Iterable[Tile]
    ) -> Iterator[tuple[Tile, Tensor, list[Future[BoxWritten]]]]:
        """Yields each tile with its accepted pixels, which stay as they are until the next is asked for, or for as long as
        a Future in the list that comes with them is not done.
        """
        running: OutputBuffer | None = None
        tiles = iter(tiles)
        while batch := list(islice(tiles, self.batch)):
            if running is not None and self._count == 1:
                yield from self._finish(image, running)
                running = None
            buffer = self._start(image, batch)
            if running is not None:
                yield from self._finish(image, running)
            running = buffer
        if running is not None:
            yield from self._finish(image, running)

    def make(self) -> None:
        """Make the buffers and run once: the network's memory is then known to suffice."""
        height, width = self._plan.tile_shape
        made, dtype = self._plan.tile(0, 0).made.area, made_dtype(self._plan, self._last)
        scale, device = self._plan.scale, self.queue.device
        with self._tagged():
            self._staging = self.queue.pinned(self.batch * 3 * height * width, torch.float32).view(self.batch, -1)
            self._blocks = torch.empty(self._staging.shape, device=device)
            self._input = torch.zeros(self.batch, self._stage.inputs, height, width, device=device)
            self._input = self._input.contiguous(memory_format=torch.channels_last)
            self._output = torch.empty(self.batch, 3, height * scale, width * scale, device=device)
            slots = (OutputBuffer(self.queue, self.batch, 3 * made, dtype) for _ in range(self._count))
            self._slots = deque(slots)
            self.queue.warm_up(self._work)

    def capture(self) -> None:
        with self._tagged():
            self._replay = self.queue.capture(self._work)

    def release(self) -> None:
        """Let go of all buffers; ``make`` and ``capture`` bring them back."""
        self._replay = None
        self._slots.clear()
        self._input = self._output = self._blocks = self._staging = torch.empty(0)

    def shrink(self) -> bool:
        """Take less memory from the next ``make`` on, for the same pixels; False when there is no way left."""
        if self.batch > 1:
            self.batch //= 2
        elif self._stage.pieces < _MOST_PIECES:
            self._stage.pieces *= 2
        else:
            return False
        return True

    @property
    def pixels(self) -> int:
        """LR pixels of a batch."""
        height, width = self._plan.tile_shape
        return self.batch * height * width

    def _work(self) -> None:
        self._stage.fill(self._output, self._input)

    def _start(self, image: TiledStage, tiles: Sequence[Tile]) -> OutputBuffer:
        assert self._replay is not None
        buffer = self._slots[0]
        self._slots.rotate(-1)
        for reader in buffer.readers:
            reader.result()
        buffer.readers = []
        buffer.tiles = tiles
        with self._tagged():
            for k, tile in enumerate(tiles):
                block = image.block(tile)
                if k == 0:
                    self._uploaded.synchronize()  # the copies of the batch before have left the staging memory
                image.place(self._upload(k, block), tile, out=self._input[k : k + 1])
            self._input[len(tiles) :] = self._input[:1]  # what comes of the rest is dropped
            self._uploaded = self.queue.record_event()
            self._replay()
            for k, tile in enumerate(tiles):
                trimmed(self._plan, tile, self._output[k : k + 1], self._last, buffer.on_device(k))
            buffer.copy_to_host(self.queue)
        return buffer

    def _upload(self, k: int, block: Tensor) -> Tensor:
        staged, on_device = self._staging[k, : block.numel()], self._blocks[k, : block.numel()]
        staged.view(block.shape).copy_(block)
        on_device.copy_(staged, non_blocking=True)
        return on_device.view(block.shape)

    def _finish(
        self, image: TiledStage, buffer: OutputBuffer
    ) -> Iterator[tuple[Tile, Tensor, list[Future[BoxWritten]]]]:
        buffer.ready.synchronize()
        for k, tile in enumerate(buffer.tiles):
            with self._tagged():
                pixels = image.accept(tile, buffer.on_host(k), buffer.nonfinite[k])
            yield tile, pixels, buffer.readers

    @contextmanager
    def _tagged(self) -> Iterator[None]:
        """On this lane's device; memory that runs out is remembered to be this stage's, unless one below said so before."""
        try:
            with self.queue.activate(), memory_errors():
                yield
        except OutOfDeviceMemory as error:
            if error.position is None:
                error.position = self._position
            raise


class Writers:
    """Threads that write what is handed over. What goes wrong in one is raised from the next call, whichever it is."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._pool = ThreadPoolExecutor(WRITERS, "write")
        self._pending: deque[Future[BoxWritten]] = deque()
        self._since = time.perf_counter()

    def __enter__(self) -> Writers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=error is not None)

    def submit(self, box: Box, pixels: Tensor) -> Future[BoxWritten]:
        """``pixels`` must stay as they are until the result is there."""
        now = time.perf_counter()
        future = self._pool.submit(self._write, box, pixels, now - self._since)
        self._since = now
        self._pending.append(future)
        return future

    def done(self, waiting: int) -> Iterator[BoxWritten]:
        """What has been written, in the order of ``submit``, after waiting until at most ``waiting`` are left to do."""
        for future in self._pending:
            if future.done():
                future.result()
        while self._pending and (len(self._pending) > waiting or self._pending[0].done()):
            yield self._pending.popleft().result()

    def _write(self, box: Box, pixels: Tensor, compute_seconds: float) -> BoxWritten:
        start = time.perf_counter()
        self._sink.write(box, pixels.numpy())
        return BoxWritten(box, compute_seconds, time.perf_counter() - start)


def run(plan: Plan, image: TiledStage, runners: Sequence[BatchRunner], sink: Sink) -> Iterator[BoxWritten]:
    """Pull every missing box out of ``image`` (canvas coordinates) into ``sink`` (output coordinates). ``runners``: the
    runners of all stages, first stage first.

    Where memory runs out, batches become smaller and tails run in more pieces, which changes no pixel; what is written
    stays. Raises OutOfDeviceMemory, with the stage's position, when that does not help either.
    """
    while True:
        try:
            _prepare(runners)
            yield from _render(plan, image, runners[-1], sink)
            return
        except OutOfDeviceMemory as error:
            first = runners[error.position or 0]
            if not any(runner.shrink() for runner in (first, *runners)):
                raise
        finally:
            for runner in runners:
                runner.release()
            runners[0].queue.release()


def _prepare(runners: Sequence[BatchRunner]) -> None:
    """Every lane is warmed up before one is recorded: a recording's memory is not free for the others' warming up."""
    for runner in runners:
        runner.make()
    for runner in sorted(runners, key=lambda runner: -runner.pixels):
        runner.capture()


def _last_pixels(
    image: TiledStage, runner: BatchRunner, tiles: Iterator[Tile]
) -> Iterator[tuple[Tile, Tensor, list[Future[BoxWritten]]]]:
    """As ``BatchRunner.stream``; what is blended is no slot's."""
    if image.plan.blend:
        return ((tile, pixels, []) for tile, pixels in image.cells(list(tiles)))
    return runner.stream(image, tiles)


def _render(plan: Plan, image: TiledStage, runner: BatchRunner, sink: Sink) -> Iterator[BoxWritten]:
    with Writers(sink) as writers:
        try:
            if plan.is_whole and image.plan.core == plan.stages[-1].core:  # what is written in one go is one tile
                tiles = (image.plan.tile(*index) for box in sink.missing() for index in image.plan.grid.indices(box))
                for tile, pixels, readers in _last_pixels(image, runner, tiles):
                    readers.append(writers.submit(tile.write, pixels))
                    yield from writers.done(runner.batch * (IN_FLIGHT + 1))
            else:
                for box in sink.missing():
                    writers.submit(box, image.read(box.shift(plan.roi.y0, plan.roi.x0)))
                    yield from writers.done(IN_FLIGHT)
        except OutOfDeviceMemory:
            yield from writers.done(0)  # what was handed over before is whole
            raise
        yield from writers.done(0)
