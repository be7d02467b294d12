"""The executor of bands: strip after strip, rows of shards from top to bottom. A row is written while the next is computed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from engine.geometry import Box
from engine.io.zarr_store import Sink
from engine.run.pipeline import BoxWritten, Pipeline
from engine.run.rows import RowReader


def run(pipeline: Pipeline, sink: Sink) -> Iterator[BoxWritten]:
    """Compute and write every missing row of shards.

    Consecutive rows come from one stream; after a gap a new stream starts above the next row.
    """
    roi = pipeline.plan.roi
    reader: RowReader | None = None
    at = (0, 0)  # the column and the row that the stream has reached
    pending: Future[BoxWritten] | None = None
    with ThreadPoolExecutor(1, "write") as writer:
        for box in sink.missing():
            start = time.perf_counter()
            if reader is None or at != (box.x0, box.y0):
                canvas = box.shift(roi.y0, roi.x0)
                reader = None  # its rows are freed before the next ones are made
                reader = RowReader(pipeline.rows((canvas.x0, canvas.x1)).rows(canvas.y0))
            rows = reader.take(box.height)
            at = (box.x0, box.y1)
            computed = time.perf_counter() - start
            written = pending.result() if pending is not None else None
            # Submitted before the caller learns of the row before, which is when it may stop.
            pending = writer.submit(_write, sink, box, rows, computed)
            if written is not None:
                yield written
        if pending is not None:
            yield pending.result()


def _write(sink: Sink, box: Box, rows: Tensor, compute_seconds: float) -> BoxWritten:
    start = time.perf_counter()
    sink.write(box, rows.numpy())
    return BoxWritten(box, compute_seconds, time.perf_counter() - start)
