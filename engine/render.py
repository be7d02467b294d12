"""The main job: from a model and a request to a store full of pixels.

Making a ``Job`` measures and plans, and renders nothing; ``Job.run`` renders. In between the plan can be printed, and refused.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.bands.stream import RowStream
from engine.budget import check, tiles
from engine.cache import Scratch, TileCache
from engine.errors import UsageError
from engine.executors import bands, serial
from engine.executors.serial import TileDone
from engine.lazy import StageImage
from engine.memory import release
from engine.model import Model
from engine.plan import BANDS
from engine.planner import Planner
from engine.probe.content import structure_sample
from engine.request import Request
from engine.rows import RowSource, SourceRows, StageRows
from engine.sinks import ZarrSink, stored_plan
from engine.sources import Source, TensorSource
from engine.version import __version__


class Job:
    """A planned render. ``plan`` and ``projection`` may be looked at before ``run``."""

    def __init__(self, model: Model, request: Request, out: Path, tell: Callable[[str], None] = lambda _: None) -> None:
        if not out.name or out.name == "..":
            raise UsageError(f"--out {out}: names no store; give it a name, for instance {out / 'out.zarr'}")
        self.out = out
        self._planner = planner = Planner(model, request, out, tell)
        self.model, self.device, self.stages = model, planner.device, planner.stages
        self.baseline, self.budget, self.precision_error = planner.baseline, planner.budget, planner.precision_error
        self.plan, self.projection = planner.choose()
        self._streams: dict[int, RowStream] = {}

    def check(self) -> None:
        """Raise BudgetError when the plan does not fit the budgets."""
        check(self.plan, self.projection, self.budget)

    def open_sink(self, resume: bool, overwrite: bool) -> ZarrSink:
        """Make the store, or open the one that is to be finished, adopting the tiles it was planned with."""
        stored = stored_plan(self.out) if resume else None
        if stored is None and not (resume and self.out.exists()):
            self.check()
            sink = ZarrSink.create(self.out, self.plan, self._provenance(), overwrite)
            shutil.rmtree(self._scratch_root, ignore_errors=True)
            return sink
        self.plan = self._planner.continued(stored or {}) or self.plan
        sink = ZarrSink.resume(self.out, self.plan)
        self.projection = self._planner.project(self.plan, list(sink.missing()))
        self.budget = replace(self.budget, disk=self.budget.disk + _size(self.out) + _size(self._scratch_root))
        self.check()
        return sink

    def run(
        self, sink: ZarrSink, on_tile: Callable[[int, int], None] = lambda stage, pixels: None
    ) -> Iterator[TileDone]:
        """Render what is missing; yields after each write. ``on_tile(stage, LR pixels)`` is called after a network."""
        if any(True for _ in sink.missing()):
            if self.plan.executor == BANDS:
                base = self._base()
                yield from bands.run(self.plan, lambda columns: self._rows(base, columns, on_tile), sink)
            else:
                yield from serial.run(self.plan, self._image(on_tile), sink)
        sink.finish()
        shutil.rmtree(self._scratch_root, ignore_errors=True)

    def _image(self, on_tile: Callable[[int, int], None]) -> Source:
        """The whole chain as one lazy image, in canvas coordinates."""
        image: Source = self._base()
        for index, stage in enumerate(self.stages):
            stage_plan, last = self.plan.stages[index], index == len(self.stages) - 1
            folder = self._scratch_root / self.plan.digest[:16] / str(index + 1)
            cache = TileCache(
                tiles.cache_share(len(self.stages)), Scratch(folder, stage_plan.grid, np.uint8 if last else np.float32)
            )
            image = StageImage(stage_plan, index, self.plan.seed, stage, image, cache, last, on_tile)
        return image

    def _rows(self, base: Source, columns: tuple[int, int], on_rows: Callable[[int, int], None]) -> RowSource:
        """The whole chain as a stream of rows of these columns of the canvas."""
        reads = self.plan.reads((columns[0] - self.plan.roi.x0, columns[1] - self.plan.roi.x0))
        wanted = [stage.inside(read) for stage, read in zip(self.plan.stages, reads, strict=True)]
        rows: RowSource = SourceRows(base, wanted[0])
        for index, stage in enumerate(self.stages):
            last = index == len(self.stages) - 1
            made = columns if last else wanted[index + 1]
            rows = StageRows(
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
            sample = structure_sample(self.model.structure, self.plan.seed, self.plan.base)
            release()  # step 1 leaves a heap of many small maps that no tile can use
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
