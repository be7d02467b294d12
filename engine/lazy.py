"""A render of what is looked at: shards are computed when a view wants them, with the bits of the whole render."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

from engine.device.memory import device_limit
from engine.errors import BudgetError, EngineError, UsageError
from engine.geometry import Box
from engine.io.zarr_store import ZarrSink
from engine.job import Job, Log
from engine.model.bundle import Model
from engine.plan.request import AUTO, Request

STRIP = 128
"""Low-resolution columns of a strip, or sides of a tile: a shard is 512 pixels wide after a network that enlarges 4 times."""


def lazy_job(model: Model, request: Request, out: Path, log: Log | None = None) -> Job:
    """Plan a render in parts that are small enough to wait for: narrow strips of bands, or tiles where bands cannot run.

    Args:
        model, out, log: as for ``Job.prepare``.
        request: its executor and its tile are chosen here unless they are given.

    Raises:
        EngineError: as ``Job.prepare``.
    """
    tile = request.tile or STRIP
    if request.executor == AUTO:
        with suppress(UsageError, BudgetError):
            return Job.prepare(model, replace(request, executor="bands", tile=tile), out, log)
        request = replace(request, executor="tiles")
    return Job.prepare(model, replace(request, tile=tile), out, log)


class LazyRender:
    """Computes the missing shards of the latest view, in a thread; shards of earlier views are dropped.

    Args:
        job: planned render.
        sink: its store, which is closed at the end.
        on_error: called with the message of an error, after which nothing more is computed.
    """

    def __init__(self, job: Job, sink: ZarrSink, on_error: Callable[[str], None]) -> None:
        self._job, self._sink, self._on_error = job, sink, on_error
        self._view: Box | None = None
        self._is_closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="lazy render", daemon=True)
        self._thread.start()

    def look(self, box: Box | None) -> None:
        """Compute what a view of this box misses, in pixels of the written image; None: nothing."""
        with self._changed:
            self._view = box
            self._changed.notify_all()

    def close(self) -> None:
        """End after the shard that is being computed."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        job, sink = self._job, self._sink
        try:
            with closing(sink), device_limit(job.device, job.request.vram):
                if sink.complete:
                    return
                read = job.reader(sink)
                while (box := self._next()) is not None:
                    sink.write(box, read(box))
        except (EngineError, OSError, MemoryError) as error:
            self._on_error(str(error) or "the memory is exhausted")

    def _next(self) -> Box | None:
        """The next shard to compute, once there is one; None at the end."""
        with self._changed:
            while not self._is_closed:
                if (box := self._wanted()) is not None:
                    return box
                self._changed.wait()
        return None

    def _wanted(self) -> Box | None:
        """The first missing shard of the view, column after column from the middle: a strip of bands goes on downwards."""
        if self._view is None:
            return None
        grid, middle = self._job.plan.grid(), self._view.x0 + self._view.x1
        boxes = (grid.box(*index) for index in grid.indices(self._view))
        ordered = sorted(boxes, key=lambda box: (abs(box.x0 + box.x1 - middle), box.x0, box.y0))
        return next(self._sink.missing(ordered), None)
