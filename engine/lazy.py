"""A render of what is looked at: shards are computed when a view wants them, with the bits of the whole render."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from engine.device.memory import device_limit
from engine.errors import BudgetError, UsageError
from engine.geometry import Box
from engine.io.zarr_store import ZarrSink
from engine.job import Job, Log
from engine.model.bundle import Model
from engine.plan.request import AUTO, Request

STRIP = 128
"""Low-resolution columns of a strip, or sides of a tile: a shard is 512 pixels wide after a network that enlarges 4 times."""

MAX_VIEW = 24_000_000
"""Pixels of the largest view that is computed: a screen of 4K at 60 %. A larger one is almost the whole render."""


def lazy_job(model: Model, request: Request, out: Path, log: Log | None = None, *, like: Job | None = None) -> Job:
    """Plan a render in parts that are small enough to wait for: narrow strips of bands, or tiles where bands cannot run.

    Args:
        model, out, log, like: as for ``Job.prepare``.
        request: its executor and its tile are chosen here unless they are given.

    Raises:
        EngineError: as ``Job.prepare``.
    """
    tile = request.tile or STRIP
    if request.executor == AUTO:
        with suppress(UsageError, BudgetError):
            return Job.prepare(model, replace(request, executor="bands", tile=tile), out, log, like=like)
        request = replace(request, executor="tiles")
    return Job.prepare(model, replace(request, tile=tile), out, log, like=like)


class LazyRender:
    """Computes missing shards one by one: those of the latest view, then the rest if all are wanted.

    A view that nobody looks at any more is forgotten. ``look`` and ``wants_all`` may be set by another thread.

    Args:
        job: planned render.
        sink: its store.

    Attributes:
        view: what is looked at, in pixels of the written image; None for nothing, or more than ``MAX_VIEW``.
        wants_all: whether the whole image is computed after what is looked at.
        missing: number of shards that are not computed yet.
        written: number of shards that were computed here.
    """

    def __init__(self, job: Job, sink: ZarrSink) -> None:
        self._job, self._sink, self._grid = job, sink, job.plan.grid()
        self._read = None if sink.complete else job.reader(sink)
        self._all = self._in_columns(self._grid.bounds, 0)
        self.view: Box | None = None
        self.wants_all = False
        self.written = 0
        self.missing = sum(1 for _ in sink.missing(self._all))
        self._finish()

    @property
    def has_shards(self) -> bool:
        """Whether a shard is computed, here or before."""
        return self.missing < len(self._grid)

    def look(self, box: Box | None) -> None:
        """Want the shards of a view, in pixels of the written image, and no others; None: nothing is looked at."""
        image = Box(0, 0, *self._job.plan.size)
        view = None if box is None else box.clip(image)
        self.view = view if view is not None and 0 < view.area <= MAX_VIEW else None

    @property
    def wanted(self) -> Box | None:
        """The shard to compute next; None where nothing is wanted or missing."""
        if self.missing == 0:
            return None
        view = self.view  # which another thread may change
        if view is not None:
            boxes = self._in_columns(view, view.x0 + view.x1)
            if (box := next(self._sink.missing(boxes), None)) is not None:
                return box
        return next(self._sink.missing(self._all), None) if self.wants_all else None

    def step(self) -> bool:
        """Compute and write the shard that is wanted; the last one completes the store. False: nothing is wanted."""
        box = self.wanted
        if box is None or self._read is None:
            return False
        with device_limit(self._job.device, self._job.request.vram):
            self._sink.write(box, self._read(box))
        self.missing -= 1
        self.written += 1
        self._finish()
        return True

    def close(self) -> None:
        """Let others write the store."""
        self._read = None
        self._sink.close()

    def _finish(self) -> None:
        if self.missing == 0 and not self._sink.complete:
            self._sink.finish()

    def _in_columns(self, view: Box, middle: int) -> list[Box]:
        """Shards of a view, column after column from half of ``middle`` outwards: a strip of bands goes on downwards."""
        boxes = [self._grid.box(*index) for index in self._grid.indices(view)]
        return sorted(boxes, key=lambda box: (abs(box.x0 + box.x1 - middle), box.x0, box.y0))
