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
from engine.plan.plan import Plan
from engine.plan.request import AUTO, Request

STRIP = 128
"""Low-resolution columns of a strip, or sides of a tile: a shard is 512 pixels wide after a network that enlarges 4 times."""

CROP = 192, 288
"""(rows, columns) of a crop that shows a noise gain: as wide as the panel of the page."""

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


def louder_job(job: Job, gains: tuple[float, ...] | None) -> Job:
    """A render of ``lazy_job`` with other noise channels, cut in the same way, at once: nothing is measured.

    Halos and precision are those of ``job``. Its errors are those of other weights, so this one states none.

    Args:
        job: render without a noise gain.
        gains: factors, as ``Request.noise_gain``; None: ``job`` itself.

    Raises:
        EngineError: as ``Job.prepare``.
    """
    if gains is None:
        return job
    request = replace(job.request, noise_gain=gains)
    if job.plan.needs_halos and request.halo_policy.needs_profile:
        request = replace(request, overlap=str(max(stage.halo for stage in job.plan.stages)))
    return Job.prepare(job.model, request, job.out, job.log, like=job)


def crop_about(plan: Plan, x: int, y: int) -> Box:
    """A part of the image of at most ``CROP`` pixels about a place: moved into one strip, or one shard of tiles, if it fits."""
    (rows, columns), (height, width) = CROP, plan.size
    cell = (height, plan.strip) if plan.is_banded else plan.shard
    y0, y1 = _about(y, rows, cell[0], height)
    x0, x1 = _about(x, columns, cell[1], width)
    return Box(y0, x0, y1, x1)


def _about(middle: int, length: int, cell: int, end: int) -> tuple[int, int]:
    """At most ``length`` pixels about ``middle`` of ``end``, within one cell if it has as many."""
    first = min(middle, end - 1) // cell * cell
    last = min(end, first + cell)
    if last - first < length:
        first, last = 0, end
    start = max(first, min(middle - length // 2, last - length))
    return start, min(start + length, last)


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
        self._is_closed = False
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
        if box is None or self._is_closed:
            return False
        if self._read is None:
            self._read = self._job.reader(self._sink)
        with device_limit(self._job.device, self._job.request.vram):
            self._sink.write(box, self._read(box))
        self.missing -= 1
        self.written += 1
        self._finish()
        return True

    def rest(self) -> None:
        """Free the memory of the networks until the next ``step``, which starts the streams of bands again."""
        self._read = None

    def close(self) -> None:
        """Let others write the store."""
        self._read, self._is_closed = None, True
        self._sink.close()

    def _finish(self) -> None:
        if self.missing == 0 and not self._sink.complete:
            self._sink.finish()

    def _in_columns(self, view: Box, middle: int) -> list[Box]:
        """Shards of a view, column after column from half of ``middle`` outwards: a strip of bands goes on downwards."""
        boxes = [self._grid.box(*index) for index in self._grid.indices(view)]
        return sorted(boxes, key=lambda box: (abs(box.x0 + box.x1 - middle), box.x0, box.y0))
