"""The executor of bands: strip after strip, rows of shards from top to bottom. A row is written while the next is computed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain

from engine.device.queue import OutOfDeviceMemory, memory_errors
from engine.geometry import Box
from engine.io.halving import half_of
from engine.io.sink import Sink
from engine.plan.cost import writer_bytes
from engine.plan.limits import writers
from engine.run.pipeline import BoxWritten, Pipeline
from engine.run.rows import NonFiniteRows, RowBlock, RowReader


def run(pipeline: Pipeline, sink: Sink) -> Iterator[BoxWritten]:
    """Compute and write every missing row of shards. Where the device's memory is exhausted, strips become narrower."""
    while True:
        try:
            yield from _render(pipeline, sink)
            return
        except OutOfDeviceMemory as error:
            pipeline.recut(error)
        pipeline.queue.release()  # here: the error holds the streams


def _render(pipeline: Pipeline, sink: Sink) -> Iterator[BoxWritten]:
    """Compute and write every missing row of shards of one cut."""
    rows = RowsOfShards(pipeline)
    pending: Future[BoxWritten] | None = None
    with _RowWriter(pipeline, sink) as writer:
        try:
            for box, end in _runs(sink.missing(pipeline.writes)):
                start = time.perf_counter()
                pixels = rows.read(box, end)
                computed = time.perf_counter() - start
                written = pending.result() if pending is not None else None
                # Submitted before the caller learns of the row before, which is when it may stop.
                pending = writer.submit(box, pixels, computed)
                if written is not None:
                    yield written
        except OutOfDeviceMemory:
            if pending is not None:
                yield pending.result()  # a row that was submitted before is whole
            raise
        if pending is not None:
            yield pending.result()


def _runs(boxes: Iterable[Box]) -> Iterator[tuple[Box, int]]:
    """Each box with the last row of those that follow it without a gap: a stream computes nothing below it."""
    run: list[Box] = []
    for box in chain(boxes, [None]):
        if run and (box is None or (box.x0, box.y0) != (run[-1].x0, run[-1].y1)):
            yield from ((each, run[-1].y1) for each in run)
            run = []
        if box is not None:
            run.append(box)


class RowsOfShards:
    """Pixels of rows of shards. Consecutive ones come from one stream; after a gap a new stream starts above the next."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._reader: RowReader | None = None
        self._at = (0, 0)  # the column and the row that the stream has reached

    def read(self, box: Box, end: int) -> RowBlock:
        """Pixels of ``box``: where half precision overflows, those of float32 in the whole box.

        A box is computed in half precision first, whatever the box above needed. So its pixels do not depend on the row
        in which a render was resumed.

        Args:
            box: a row of shards.
            end: end of the boxes that are read after it without a gap.

        Raises:
            NonFiniteRows: float32 gives NaN or infinite values too, or the network cannot be made in float32.
        """
        in_fp32: set[int] = set()
        while (pixels := self._attempt(box, end, in_fp32)) is None:
            pass
        if in_fp32:
            self._reader = None
            for position in in_fp32:
                self._pipeline.stages[position].release_fp32()  # no projection has its weights
            self._pipeline.count_redone()
        return pixels

    def _attempt(self, box: Box, end: int, in_fp32: set[int]) -> RowBlock | None:
        """Pixels of ``box``; None if a stage, now added to ``in_fp32``, must compute them in float32."""
        try:
            with self._pipeline.queue.activate(), memory_errors():
                if self._reader is None or self._at != (box.x0, box.y0):
                    self._reader = None  # its rows are freed before the next ones are made
                    self._reader = self._rows_from(box, box.y1 if in_fp32 else end, in_fp32)
                pixels = self._reader.take(box.height)
        except NonFiniteRows as error:
            if error.position in in_fp32 or self._pipeline.stages[error.position].fp32_fallback is None:
                raise
            in_fp32.add(error.position)
            self._reader = None
            return None
        self._at = (box.x0, box.y1)
        return pixels

    def _rows_from(self, box: Box, end: int, in_fp32: set[int]) -> RowReader:
        roi = self._pipeline.plan.roi
        canvas = box.shift(roi.y0, roi.x0)
        return RowReader(self._pipeline.rows((canvas.x0, canvas.x1), in_fp32).rows(canvas.y0, end + roi.y0))


class _RowWriter:
    """Writes a row of shards while the next one is computed.

    Beside a CPU, whose cores have work, one thread writes. Beside an accelerator several write the shards of a row.
    """

    def __init__(self, pipeline: Pipeline, sink: Sink) -> None:
        plan = pipeline.plan
        is_beside_device = pipeline.queue.device.type != "cpu"
        self._sink, self._grid = sink, plan.grid()
        self._rows = ThreadPoolExecutor(1, "write")
        self._shards = (
            ThreadPoolExecutor(writers(writer_bytes(plan.shard, plan.pixels)), "shard") if is_beside_device else None
        )

    def __enter__(self) -> _RowWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in (self._rows, self._shards):
            if pool is not None:
                pool.shutdown()

    def submit(self, box: Box, rows: RowBlock, compute_seconds: float) -> Future[BoxWritten]:
        """Write ``rows``, which must stay unchanged until the result is there."""
        return self._rows.submit(self._write, box, rows, compute_seconds)

    def _write(self, box: Box, rows: RowBlock, compute_seconds: float) -> BoxWritten:
        start = time.perf_counter()
        pixels, half = rows.pixels.numpy(), None if rows.half is None else rows.half.numpy()
        if self._shards is None:
            self._sink.write(box, pixels, half)
        else:
            parts = [self._grid.box(*index) for index in self._grid.indices(box)]
            inside = [pixels[(slice(None), *part.relative_to(box).slices)] for part in parts]
            list(self._shards.map(self._sink.write, parts, inside, [half_of(half, part, box) for part in parts]))
        return BoxWritten(box, compute_seconds, time.perf_counter() - start)
