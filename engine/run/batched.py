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
from itertools import islice
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from engine.device.queue import DeviceQueue, Event, OutOfDeviceMemory, device_queue, memory_errors
from engine.geometry import Box
from engine.io.sink import Sink
from engine.kernels.trim import Trimmed
from engine.plan.cost import writer_bytes
from engine.plan.limits import IN_FLIGHT, writers
from engine.plan.plan import Plan
from engine.plan.stage import StagePlan, Tile
from engine.run.finish import Finish
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
            yield from run_batches(pipeline.plan, images[-1], runners, sink, pipeline.finish)
            return
        except OutOfDeviceMemory as error:
            pipeline.recut(error)


class Finished(NamedTuple):
    """A valid tile."""

    tile: Tile
    pixels: Tensor
    """Its output, [3, h, w]."""
    half: Tensor | None
    """The same halved, where the device made it."""
    readers: Pending
    """Writes that still read the output."""


class OutputBuffer:
    """Pixels of one batch on the host, or on the device if they are cross-faded there first."""

    def __init__(self, queue: DeviceQueue, on_device: Trimmed, *, on_host: bool) -> None:
        """
        Args:
            queue: queue of the device.
            on_device: output of a batch (``_output_of_batch``), which buffers on the host may share.
            on_host: whether the pixels come to the host.
        """
        self.on_device = on_device

        def pinned(values: Tensor) -> Tensor:
            return queue.pinned(values.numel(), values.dtype).view(values.shape)

        self._result = Trimmed(
            pinned(on_device.pixels) if on_host else on_device.pixels,
            None if on_device.half is None else pinned(on_device.half),
            pinned(on_device.nonfinite),
        )
        self.tiles: Sequence[Tile] = ()
        self.ready: Event = queue.record_event()
        self.readers: Pending = []

    def result(self, k: int) -> Trimmed:
        """Output of tile ``k`` of the batch, on the host or to be cross-faded."""
        return _part(self._result, k, self.tiles[k])

    def copy_to_host(self, queue: DeviceQueue) -> None:
        """Start the copy of the whole batch; ``ready`` marks its end."""
        pairs = zip(self.on_device, self._result, strict=True)
        used = slice(len(self.tiles))
        copied = [(a[used], b[used]) for a, b in pairs if a is not None and b is not None and a is not b]
        self.ready = queue.copy_to_host(copied)


def _output_of_batch(device: torch.device, plan: StagePlan, batch: int) -> Trimmed:
    """Memory for the output of a batch, a row for each tile. A device also halves the image's pixels, for its pyramid."""
    output, dtype = plan.tile_at(0, 0).output, output_dtype(plan)
    has_half = dtype == torch.uint8 and device.type != "cpu"
    return Trimmed(
        torch.empty(batch, 3 * output.area, dtype=dtype, device=device),
        torch.empty(batch, 3 * output.cover(2).area, dtype=dtype, device=device) if has_half else None,
        torch.zeros(batch, 3, dtype=torch.int64, device=device),
    )


def _part(batch: Trimmed, k: int, tile: Tile) -> Trimmed:
    """Output of tile ``k`` of a batch."""
    (height, width), (half_height, half_width) = tile.output.shape, (-(-side // 2) for side in tile.output.shape)
    return Trimmed(
        batch.pixels[k, : 3 * height * width].view(3, height, width),
        None if batch.half is None else batch.half[k, : 3 * half_height * half_width].view(3, half_height, half_width),
        batch.nonfinite[k],
    )


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
        self._copied: Event = queue.record_event()
        """The last batch has left the device."""
        self._replay: Callable[[], None] | None = None

    def __call__(self, image: TiledStage, tiles: Iterable[Tile]) -> Iterator[tuple[Tile, Tensor]]:
        return ((finished.tile, finished.pixels.clone()) for finished in self.stream(image, tiles))

    def stream(self, image: TiledStage, tiles: Iterable[Tile]) -> Iterator[Finished]:
        """Yield each tile with its valid output.

        The output stays unchanged until the next tile is requested, or as long as one of its readers is not done.
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
        scale, device, blend = self._plan.scale, self.queue.device, self._plan.blend
        with self._on_device():
            self._staging = self.queue.pinned(self.batch * 3 * height * width, torch.float32).view(self.batch, -1)
            self._blocks = torch.empty(self._staging.shape, device=device)
            self._input = torch.zeros(self.batch, self._stage.inputs, height, width, device=device)
            self._input = self._input.contiguous(memory_format=torch.channels_last)
            self._output = torch.empty(self.batch, 3, height * scale, width * scale, device=device)
            # Pixels leave the device during the next batch; those that are cross-faded stay.
            outputs = [_output_of_batch(device, self._plan, self.batch) for _ in range(self._count if blend else 1)]
            buffers = (
                OutputBuffer(self.queue, outputs[k % len(outputs)], on_host=not blend) for k in range(self._count)
            )
            self._buffers = deque(buffers)
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
            self.queue.wait(self._copied)
            for k, tile in enumerate(tiles):
                trimmed(self._plan, tile, self._output[k : k + 1], _part(buffer.on_device, k, tile))
            buffer.copy_to_host(self.queue)
            self._copied = buffer.ready
        return buffer

    def _upload(self, k: int, pixels: Tensor) -> Tensor:
        staged, on_device = self._staging[k, : pixels.numel()], self._blocks[k, : pixels.numel()]
        staged.view(pixels.shape).copy_(pixels)
        on_device.copy_(staged, non_blocking=True)
        return on_device.view(pixels.shape)

    def _finish(self, image: TiledStage, buffer: OutputBuffer) -> Iterator[Finished]:
        buffer.ready.synchronize()
        for k, tile in enumerate(buffer.tiles):
            with self._on_device():
                pixels, half, _ = image.validate(tile, buffer.result(k), self.tail_chunks)
            yield Finished(tile, pixels, half, buffer.readers)

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

    def submit(self, box: Box, pixels: Tensor, half: Tensor | None = None) -> Future[BoxWritten]:
        """Write ``pixels``, which must stay unchanged until the result is there, as must their ``half``."""
        now = time.perf_counter()
        future = self._pool.submit(self._write, box, pixels, half, now - self._since)
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

    def _write(self, box: Box, pixels: Tensor, half: Tensor | None, compute_seconds: float) -> BoxWritten:
        start = time.perf_counter()
        self._sink.write(box, pixels.numpy(), None if half is None else half.numpy())
        return BoxWritten(box, compute_seconds, time.perf_counter() - start)


def run_batches(
    plan: Plan, image: TiledStage, runners: Sequence[BatchRunner], sink: Sink, finish: Finish
) -> Iterator[BoxWritten]:
    """Compute and write every missing box of one cut.

    Where memory is exhausted, batches become smaller and tails run in more chunks, which changes no pixel. Finished shards
    stay.

    Args:
        plan: the plan.
        image: last stage of the chain, in canvas coordinates.
        runners: runners of all stages, first stage first.
        sink: store, in output coordinates.
        finish: makes the pixels of the store from float32, where the last stage does not.

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
            yield from _render(plan, image, runners[-1], sink, finish)
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


def _last_pixels(image: TiledStage, runner: BatchRunner, tiles: Iterator[Tile]) -> Iterator[Finished]:
    """As ``BatchRunner.stream``; cross-faded pixels lie in no output buffer."""
    if image.plan.blend:
        return (Finished(tile, pixels, None, []) for tile, pixels in image.compute_cells(list(tiles)))
    return runner.stream(image, tiles)


def _render(plan: Plan, image: TiledStage, runner: BatchRunner, sink: Sink, finish: Finish) -> Iterator[BoxWritten]:
    with Writers(sink, writers(writer_bytes(plan.shard, plan.pixels))) as pool:
        try:
            if image.plan.is_image and plan.is_whole and image.plan.core == plan.stages[-1].core:  # a write is one tile
                indices = (index for box in sink.missing() for index in image.plan.grid.indices(box))
                tiles = (image.plan.tile_at(*index) for index in indices)
                for tile, pixels, half, readers in _last_pixels(image, runner, tiles):
                    readers.append(pool.submit(tile.cell, pixels, half))
                    yield from pool.finished(runner.batch * (IN_FLIGHT + 1))
            else:
                reduced = canvas_image(plan, image, finish)
                for box in sink.missing():
                    pool.submit(box, reduced.read(box.shift(plan.roi.y0, plan.roi.x0)))
                    yield from pool.finished(IN_FLIGHT)
        except OutOfDeviceMemory:
            yield from pool.finished(0)  # boxes that were submitted before are whole
            raise
        yield from pool.finished(0)
