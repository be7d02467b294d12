"""The executor of bands: strip after strip, rows of shards from top to bottom, each written while the next is computed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from engine.geometry import Box
from engine.io.zarr_store import Sink
from engine.plan.plan import Plan
from engine.run.rows import RowReader, RowSource
from engine.run.serial import BoxWritten


def run(plan: Plan, chain: Callable[[tuple[int, int]], RowSource], sink: Sink) -> Iterator[BoxWritten]:
    """Pull every missing row of shards out of ``chain(columns)`` (canvas coordinates) into ``sink`` (output coordinates).

    Rows that follow on each other come out of one stream; after a gap a new one starts above it.
    """
    taker: RowReader | None = None
    at = (0, 0)  # the column and the row that the stream has reached
    pending: Future[BoxWritten] | None = None
    with ThreadPoolExecutor(1, "write") as writer:
        for box in sink.missing():
            start = time.perf_counter()
            if taker is None or at != (box.x0, box.y0):
                canvas = box.shift(plan.roi.y0, plan.roi.x0)
                taker = None  # its rows are let go before the next ones are made
                taker = RowReader(chain((canvas.x0, canvas.x1)).rows(canvas.y0))
            rows = taker.take(box.height)
            at = (box.x0, box.y1)
            computed = time.perf_counter() - start
            done = pending.result() if pending is not None else None
            # Handed over before the caller learns of the one before, which is when it may stop.
            pending = writer.submit(_write, sink, box, rows, computed)
            if done is not None:
                yield done
        if pending is not None:
            yield pending.result()


def _write(sink: Sink, box: Box, rows: Tensor, compute_seconds: float) -> BoxWritten:
    start = time.perf_counter()
    sink.write(box, rows.numpy())
    return BoxWritten(box, compute_seconds, time.perf_counter() - start)
