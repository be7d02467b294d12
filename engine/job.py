"""The main job: from a model and a request to a store full of pixels.

Making a ``Job`` measures and plans, and renders nothing; ``Job.run`` renders. In between the plan can be printed, and refused.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.bands.stream import RowStream
from engine.device.heap import malloc_trim
from engine.device.memory import device_limit
from engine.device.queue import OutOfDeviceMemory, device_queue
from engine.errors import BudgetError, UsageError
from engine.io.photo import Source, TensorSource
from engine.io.zarr_store import ZarrSink, stored_plan
from engine.measure import Planner
from engine.model.bundle import Model
from engine.plan import limits
from engine.plan.cost import check
from engine.plan.plan import BANDS, STREAM, largest_seam_error
from engine.plan.request import Request
from engine.run import bands, serial
from engine.run import batched as stream
from engine.run.base import base_image
from engine.run.rows import BandedStage, RowSource, SourceRows
from engine.run.serial import BoxWritten
from engine.run.tile_cache import Scratch, TileCache
from engine.run.tiles import Runner, TiledStage, one_by_one
from engine.version import __version__


class Job:
    """A planned render. ``plan`` and ``projection`` may be looked at before ``run``.

    ``executed``: the stages as they are really cut, which differs from the plan where a device ran out of memory.
    ``redone``: how many tiles half precision could not make, so that float32 did.
    """

    def __init__(self, model: Model, request: Request, out: Path, log: Callable[[str], None] = lambda _: None) -> None:
        if not out.name or out.name == "..":
            raise UsageError(f"--out {out}: names no store; give it a name, for instance {out / 'out.zarr'}")
        self.out = out
        self._planner = planner = Planner(model, request, out, log)
        self.model, self.device, self.stages = model, planner.device, planner.stages
        self.baseline, self.budget, self.precision_error = planner.baseline, planner.budget, planner.precision_error
        self.plan, self.projection = planner.choose()
        self.executed = self.plan.stages
        self.redone = 0
        self._streams: dict[int, RowStream] = {}
        self._log = log

    @property
    def seam_error(self) -> float | None:
        """That of the plan, or of the cut that took its place."""
        return largest_seam_error(self.executed)

    def check(self) -> None:
        """Raise BudgetError when the plan does not fit the budgets."""
        check(self.plan, self.projection, self.budget)

    def open_sink(self, resume: bool, overwrite: bool) -> ZarrSink:
        """Make the store, or open the one that is to be finished, adopting the tiles it was planned with."""
        stored = stored_plan(self.out) if resume else None
        if stored is None and not (resume and self.out.exists()):
            self.check()
            sink = ZarrSink.create(self.out, self.plan, self._provenance(), overwrite=overwrite)
            shutil.rmtree(self._scratch_root, ignore_errors=True)
            return sink
        self.plan = self._planner.continued(stored or {}) or self.plan
        self.executed = self.plan.stages
        sink = ZarrSink.resume(self.out, self.plan)
        self._adopt_cut(sink)
        self.projection = self._planner.project(self.plan, list(sink.missing()))
        self.budget = replace(self.budget, disk=self.budget.disk + _size(self.out) + _size(self._scratch_root))
        self.check()
        return sink

    def run(
        self, sink: ZarrSink, on_tile: Callable[[int, int], None] = lambda stage, pixels: None
    ) -> Iterator[BoxWritten]:
        """Render what is missing; yields after each write. ``on_tile(stage, LR pixels)`` is called after a network."""
        with device_limit(self.device, self._planner.request.vram):
            if any(True for _ in sink.missing()):
                base = self._base()
                if self.plan.executor == BANDS:
                    yield from bands.run(self.plan, lambda columns: self._rows(base, columns, on_tile), sink)
                elif self.plan.executor == STREAM:
                    yield from self._streamed(base, sink, on_tile)
                else:
                    images = self._images(base, on_tile, [one_by_one] * len(self.stages))
                    yield from self._counted(images, serial.run(self.plan, images[-1], sink))
        sink.finish()
        shutil.rmtree(self._scratch_root, ignore_errors=True)

    def _streamed(self, base: Source, sink: ZarrSink, on_tile: Callable[[int, int], None]) -> Iterator[BoxWritten]:
        """In smaller tiles where the device's memory does not suffice for those of the plan."""
        queue = device_queue(self.device)
        while True:
            runners = [
                stream.BatchRunner(queue, stage, cut, index, batch, index == len(self.stages) - 1)
                for index, (stage, cut, batch) in enumerate(
                    zip(self.stages, self.executed, self.projection.batches, strict=True)
                )
            ]
            try:
                images = self._images(base, on_tile, runners)
                yield from self._counted(images, stream.run(self.plan, images[-1], runners, sink))
                return
            except OutOfDeviceMemory as error:
                self._cut_smaller(error, sink)

    def _counted(self, images: Sequence[TiledStage], run: Iterator[BoxWritten]) -> Iterator[BoxWritten]:
        try:
            yield from run
        finally:
            self.redone += sum(image.redone for image in images)

    def _cut_smaller(self, error: OutOfDeviceMemory, sink: ZarrSink) -> None:
        """Another cut is another approximation of the whole image, within the same seam error: the store tells of it."""
        position = error.position or 0
        stage = self.executed[position]
        smaller = self._planner.smaller(self.executed, position)
        if smaller is None:
            raise BudgetError(
                f"{stage.name}: tiles of {stage.core} px do not fit the device's memory ({error}); what is finished is "
                "kept; free some of it, raise --vram, or render with a smaller --tile"
            ) from error
        self.executed = smaller
        sink.note({"cores": [s.core for s in smaller], "seam_error_levels": self.seam_error})
        self._log(f"{stage.name}: out of device memory; going on with tiles of {smaller[position].core} px")

    def _adopt_cut(self, sink: ZarrSink) -> None:
        """The cut that an earlier run ended with."""
        cores = sink.provenance.get("cores", [])
        if len(cores) == len(self.executed):
            self.executed = self._planner.recut(self.executed, cores)

    def _images(self, base: Source, on_tile: Callable[[int, int], None], runners: Sequence[Runner]) -> list[TiledStage]:
        """The whole chain as lazy images, first stage first; the last one is in canvas coordinates."""
        images: list[TiledStage] = []
        for index, (stage, cut, run) in enumerate(zip(self.stages, self.executed, runners, strict=True)):
            last = index == len(self.stages) - 1
            folder = self._scratch_root / self._cut_name / str(index + 1)
            scratch = Scratch(folder, cut.grid, np.uint8 if last else np.float32)
            cache = TileCache(limits.cache_share(len(self.stages)), scratch)
            below = images[-1] if images else base
            images.append(TiledStage(cut, index, self.plan.seed, stage, below, cache, last, on_tile, run))
        return images

    @property
    def _cut_name(self) -> str:
        """Of the folder that holds spilled tiles: those of another plan, or of another cut, are not these."""
        changed = [str(s.core) for s in self.executed] if self.executed != self.plan.stages else []
        return "-".join([self.plan.digest[:16], *changed])

    def _rows(self, base: Source, columns: tuple[int, int], on_rows: Callable[[int, int], None]) -> RowSource:
        """The whole chain as a stream of rows of these columns of the canvas."""
        reads = self.plan.reads((columns[0] - self.plan.roi.x0, columns[1] - self.plan.roi.x0))
        wanted = [stage.inside(read) for stage, read in zip(self.plan.stages, reads, strict=True)]
        rows: RowSource = SourceRows(base, wanted[0])
        for index, stage in enumerate(self.stages):
            last = index == len(self.stages) - 1
            made = columns if last else wanted[index + 1]
            rows = BandedStage(
                self.plan.stages[index], index, self.plan.seed, stage, self._stream(index, reads[index]), rows, made,
                reads[index], last, on_rows,
            )  # fmt: skip
        return rows

    def _stream(self, index: int, read: tuple[int, int]) -> RowStream:
        """A stage's stream for so many columns; strips of one width take turns with it."""
        width = read[1] - read[0]
        if index not in self._streams or self._streams[index].plan.width != width:
            self._streams.pop(index, None)  # before the next one is made
            self._streams[index] = RowStream(self.stages[index].stream_plan(width), self.device)
        return self._streams[index]

    def _base(self) -> Source:
        picture = self._planner.picture
        if picture is None:
            assert self.model.structure is not None
            sample = base_image(self.model.structure, self.plan.seed, self.plan.base)
            malloc_trim()  # step 1 leaves a heap of many small maps that no tile can use
            return TensorSource(sample)
        return picture if picture.size == self.plan.base else picture.resampled(self.plan.base)

    @property
    def _scratch_root(self) -> Path:
        return self.out.with_name(self.out.name + ".scratch")

    def _provenance(self) -> dict[str, Any]:
        return {
            "engine": __version__,
            "model": self.model.path.name,
            "licences": self.model.manifest.licences,
            "seam_error_levels": self.plan.seam_error,
            "precision_error_levels": asdict(self.precision_error) if self.precision_error else None,
            "profiles": [p.to_json() if p else None for p in self._planner.profiles[: len(self.stages)]],
        }


def _size(folder: Path) -> int:
    """Bytes of all files below: what an interrupted render has written need not be free once more."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
