"""The executor for accelerators: tiles in batches, while earlier batches are copied to the host and written.

A ``BatchRunner`` takes one stage's tiles to the device and back: gather into a batch, a recorded launch of the network, trim into
an output buffer, a copy to pinned memory during the next batch. All buffers are made once. The last stage's pixels go from
there to threads that compress and write; pixels of inner stages go to the cache of their ``TiledStage``.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from types import TracebackType

import torch
from torch import Tensor

from engine.device.queue import DeviceQueue, Event, OutOfDeviceMemory, device_queue, memory_errors
from engine.geometry import Box
from engine.io.zarr_store import Sink
from engine.kernels.trim import Trimmed
from engine.plan.cost import writer_bytes
from engine.plan.limits import IN_FLIGHT, writers
from engine.plan.plan import Plan, StagePlan, Tile
from engine.run.pipeline import BoxWritten, Pipeline
from engine.run.reduce import canvas_image
from engine.run.stage import Stage
from engine.run.tiles import TiledStage, output_dtype, trimmed

_MAX_TAIL_CHUNKS = 64
"""Chunks of a network's tail where memory is short. Beyond, most of a chunk is halo."""

Pending = list[Future[BoxWritten]]
"""Writes that still read a buffer."""


def run(pipeline: Pipeline, sink: Sink) -> Iterator[BoxWritten]:
    """Compute and write every missing box. Where the device's memory is exhausted, tiles become smaller."""
    queue = device_queue(pipeline.stages[0].device)
    while True:
        runners = [
            BatchRunner(queue, stage, cut, batch)
            for stage, cut, batch in zip(pipeline.stages, pipeline.cuts, pipeline.batches, strict=True)
        ]
        images = pipeline.tiles(runners)
        try:
            yield from run_batches(pipeline.plan, images[-1], runners, sink)
            return
        except OutOfDeviceMemory as error:
            pipeline.recut(error)


class OutputBuffer:
    """Pixels of one batch on the device, and on the host unless they are cross-faded on the device first."""

    def __init__(self, queue: DeviceQueue, batch: int, values: int, dtype: torch.dtype, *, on_host: bool) -> None:
        """``values``: elements of a tile's output."""
        self._device = torch.empty(batch * values, dtype=dtype, device=queue.device)
        self._host = queue.pinned(batch * values, dtype) if on_host else None
        self._nonfinite = torch.zeros(batch, 3, dtype=torch.int64, device=queue.device)
        self.nonfinite = queue.pinned(batch * 3, torch.int64).view(batch, 3)
        self._values = values
        self.tiles: Sequence[Tile] = ()
        self.ready: Event = queue.record_event()
        self.readers: Pending = []

    def on_device(self, k: int) -> Trimmed:
        """Output of tile ``k`` of the batch, on the device."""
        return Trimmed(self._part(self._device, k), None, self._nonfinite[k])

    def pixels(self, k: int) -> Tensor:
        """Output of tile ``k`` of the batch, on the host or to be cross-faded."""
        return self._part(self._device if self._host is None else self._host, k)

    def _part(self, values: Tensor, k: int) -> Tensor:
        height, width = self.tiles[k].output.shape
        return values[k * self._values :][: 3 * height * width].view(3, height, width)

    def copy_to_host(self, queue: DeviceQueue) -> None:
        """Start the copy of the whole batch; ``ready`` marks its end."""
        used = len(self.tiles) * self._values
        pixels = [] if self._host is None else [(self._device[:used], self._host[:used])]
        self.ready = queue.copy_to_host([*pixels, (self._nonfinite, self.nonfinite)])


class BatchRunner:
    """Runs one stage's tiles on the device, ``batch`` at a time: a ``TileRunner`` (engine.run.tiles)."""

    def __init__(self, queue: DeviceQueue, stage: Stage, plan: StagePlan, batch: int) -> None:
        self.queue = queue
        self.batch = batch
        self.tail_chunks = stage.default_chunks
        self._stage = stage
        self._plan = plan
        # The last stage's pixels are written from their buffers, so it has ``IN_FLIGHT`` more.
        self._count = IN_FLIGHT + 1 if plan.is_image else 1
        self._buffers: deque[OutputBuffer] = deque()
        self._input = self._output = self._blocks = self._staging = torch.empty(0)
        self._uploaded: Event = queue.record_event()
        self._replay: Callable[[], None] | None = None

    def __call__(self, image: TiledStage, tiles: Iterable[Tile]) -> Iterator[tuple[Tile, Tensor]]:
        return ((tile, pixels.clone()) for tile, pixels, _ in self.stream(image, tiles))

    def stream(self, image: TiledStage, tiles: Iterable[Tile]) -> Iterator[tuple[Tile, Tensor, Pending]]:
        """Yield each tile with its valid output and the list of its readers.

        The output stays unchanged until the next tile is requested, or as long as a Future in the list is not done.
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

    def allocate(self) -> None:
        """Make the buffers and run once, which shows that the network's memory suffices."""
        height, width = self._plan.tile_shape
        values, dtype = 3 * self._plan.tile_at(0, 0).output.area, output_dtype(self._plan)
        scale, device = self._plan.scale, self.queue.device
        with self._on_device():
            self._staging = self.queue.pinned(self.batch * 3 * height * width, torch.float32).view(self.batch, -1)
            self._blocks = torch.empty(self._staging.shape, device=device)
            self._input = torch.zeros(self.batch, self._stage.inputs, height, width, device=device)
            self._input = self._input.contiguous(memory_format=torch.channels_last)
            self._output = torch.empty(self.batch, 3, height * scale, width * scale, device=device)
            buffer = partial(OutputBuffer, self.queue, self.batch, values, dtype, on_host=not self._plan.blend)
            self._buffers = deque(buffer() for _ in range(self._count))
            self.queue.warm_up(self._work)

    def capture(self) -> None:
        """Record the launch of the network."""
        with self._on_device():
            self._replay = self.queue.capture(self._work)

    def release(self) -> None:
        """Free all buffers; ``allocate`` and ``capture`` bring them back."""
        self._replay = None
        self._buffers.clear()
        self._input = self._output = self._blocks = self._staging = torch.empty(0)

    def shrink(self) -> bool:
        """Take less memory from the next ``allocate`` on, for the same pixels; False when nothing is left to shrink."""
        if self.batch > 1:
            self.batch //= 2
        elif self.tail_chunks < _MAX_TAIL_CHUNKS:
            self.tail_chunks *= 2
        else:
            return False
        return True

    @property
    def lr_pixels(self) -> int:
        """LR pixels of a batch."""
        height, width = self._plan.tile_shape
        return self.batch * height * width

    def _work(self) -> None:
        self._stage.fill(self._output, self._input, self.tail_chunks)

    def _start(self, image: TiledStage, tiles: Sequence[Tile]) -> OutputBuffer:
        assert self._replay is not None
        buffer = self._buffers[0]
        self._buffers.rotate(-1)
        for reader in buffer.readers:
            reader.result()
        buffer.readers = []
        buffer.tiles = tiles
        with self._on_device():
            for k, tile in enumerate(tiles):
                pixels = image.read_input(tile)
                if k == 0:
                    self._uploaded.synchronize()  # the copies of the batch before have left the staging memory
                image.gather_input(self._upload(k, pixels), tile, out=self._input[k : k + 1])
            self._input[len(tiles) :] = self._input[:1]  # the output of these is dropped
            self._uploaded = self.queue.record_event()
            self._replay()
            for k, tile in enumerate(tiles):
                trimmed(self._plan, tile, self._output[k : k + 1], buffer.on_device(k))
            buffer.copy_to_host(self.queue)
        return buffer

    def _upload(self, k: int, pixels: Tensor) -> Tensor:
        staged, on_device = self._staging[k, : pixels.numel()], self._blocks[k, : pixels.numel()]
        staged.view(pixels.shape).copy_(pixels)
        on_device.copy_(staged, non_blocking=True)
        return on_device.view(pixels.shape)

    def _finish(self, image: TiledStage, buffer: OutputBuffer) -> Iterator[tuple[Tile, Tensor, Pending]]:
        buffer.ready.synchronize()
        for k, tile in enumerate(buffer.tiles):
            with self._on_device():
                pixels = image.validate(tile, buffer.pixels(k), buffer.nonfinite[k], self.tail_chunks)
            yield tile, pixels, buffer.readers

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Activate the device, and mark an exhausted memory as this stage's unless a stage below did so."""
        try:
            with self.queue.activate(), memory_errors():
                yield
        except OutOfDeviceMemory as error:
            if error.position is None:
                error.position = self._plan.position
            raise


class Writers:
    """Threads that write boxes. An error in one of them is raised from the next call."""

    def __init__(self, sink: Sink, threads: int) -> None:
        self._sink = sink
        self._pool = ThreadPoolExecutor(threads, "write")
        self._pending: deque[Future[BoxWritten]] = deque()
        self._since = time.perf_counter()

    def __enter__(self) -> Writers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=error is not None)

    def submit(self, box: Box, pixels: Tensor) -> Future[BoxWritten]:
        """Write ``pixels``, which must stay unchanged until the result is there."""
        now = time.perf_counter()
        future = self._pool.submit(self._write, box, pixels, now - self._since)
        self._since = now
        self._pending.append(future)
        return future

    def finished(self, max_pending: int) -> Iterator[BoxWritten]:
        """Finished writes, in the order of ``submit``, after waiting until at most ``max_pending`` are left."""
        for future in self._pending:
            if future.done():
                future.result()
        while self._pending and (len(self._pending) > max_pending or self._pending[0].done()):
            yield self._pending.popleft().result()

    def _write(self, box: Box, pixels: Tensor, compute_seconds: float) -> BoxWritten:
        start = time.perf_counter()
        self._sink.write(box, pixels.numpy())
        return BoxWritten(box, compute_seconds, time.perf_counter() - start)


def run_batches(plan: Plan, image: TiledStage, runners: Sequence[BatchRunner], sink: Sink) -> Iterator[BoxWritten]:
    """Compute and write every missing box of one cut.

    Where memory is exhausted, batches become smaller and tails run in more chunks, which changes no pixel. Finished shards
    stay.

    Args:
        plan: the plan.
        image: last stage of the chain, in canvas coordinates.
        runners: runners of all stages, first stage first.
        sink: store, in output coordinates.

    Raises:
        OutOfDeviceMemory: nothing is left to shrink; it carries the stage's position.
    """
    redo: Callable[[], None] | None = None
    while True:
        try:
            if redo is not None:
                redo()  # beside nothing else: the batches are not there yet
                redo = None
            _prepare(runners)
            yield from _render(plan, image, runners[-1], sink)
            return
        except OutOfDeviceMemory as error:
            first = runners[error.position or 0]
            if any(runner.shrink() for runner in (first, *runners)):
                redo = None
            elif error.redo is None or redo is not None:
                raise  # also a tile that did not fit alone
            else:
                redo = error.redo
        finally:
            for runner in runners:
                runner.release()
            runners[0].queue.release()


def _prepare(runners: Sequence[BatchRunner]) -> None:
    """Warm up every runner before the first is captured: a capture's memory is not free for another warm-up."""
    for runner in runners:
        runner.allocate()
    for runner in sorted(runners, key=lambda runner: -runner.lr_pixels):
        runner.capture()


def _last_pixels(
    image: TiledStage, runner: BatchRunner, tiles: Iterator[Tile]
) -> Iterator[tuple[Tile, Tensor, Pending]]:
    """As ``BatchRunner.stream``; cross-faded pixels lie in no output buffer."""
    if image.plan.blend:
        return ((tile, pixels, []) for tile, pixels in image.compute_cells(list(tiles)))
    return runner.stream(image, tiles)


def _render(plan: Plan, image: TiledStage, runner: BatchRunner, sink: Sink) -> Iterator[BoxWritten]:
    with Writers(sink, writers(writer_bytes(plan.shard))) as pool:
        try:
            if image.plan.is_image and plan.is_whole and image.plan.core == plan.stages[-1].core:  # a write is one tile
                indices = (index for box in sink.missing() for index in image.plan.grid.indices(box))
                tiles = (image.plan.tile_at(*index) for index in indices)
                for tile, pixels, readers in _last_pixels(image, runner, tiles):
                    readers.append(pool.submit(tile.cell, pixels))
                    yield from pool.finished(runner.batch * (IN_FLIGHT + 1))
            else:
                reduced = canvas_image(plan, image)
                for box in sink.missing():
                    pool.submit(box, reduced.read(box.shift(plan.roi.y0, plan.roi.x0)))
                    yield from pool.finished(IN_FLIGHT)
        except OutOfDeviceMemory:
            yield from pool.finished(0)  # boxes that were submitted before are whole
            raise
        yield from pool.finished(0)
