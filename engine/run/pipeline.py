"""Chains of stages over a base image, and the state that an executor shares with the job.

An executor is a module with a function ``run(pipeline, sink) -> Iterator[BoxWritten]``: it computes every box that the sink
misses and writes it. ``engine.plan.layouts.EXECUTORS`` names the modules.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Protocol

import numpy as np

from engine.device.queue import DeviceQueue, OutOfDeviceMemory, device_queue
from engine.errors import BudgetError, option
from engine.geometry import Box
from engine.io.photo import Source
from engine.io.sink import Sink
from engine.plan import limits
from engine.plan.layouts import EXECUTORS
from engine.plan.plan import Plan
from engine.plan.stage import StagePlan
from engine.plan.strips import narrower
from engine.plan.tiles import smaller_tile
from engine.plan.writes import Writes
from engine.run.finish import EnlargedAlpha, Finish
from engine.run.periodic import base_of
from engine.run.reduce import ReducedRows
from engine.run.rows import BandedStage, Columns, RowSource, RowStreams, SourceRows
from engine.run.stage import Stage
from engine.run.tile_cache import Scratch, TileCache
from engine.run.tiles import OnPixels, TiledStage, TileRunner, one_by_one


@dataclass(frozen=True, slots=True)
class BoxWritten:
    """A box of the output that is now on disk."""

    box: Box
    """Pixels of the output."""
    compute_seconds: float
    """Time to pull the box through the stages."""
    write_seconds: float
    """Time to write it."""


def tile_chain(
    cuts: Sequence[StagePlan],
    stages: Sequence[Stage],
    base: Source,
    *,
    seed: int,
    scratch: Path,
    on_pixels: OnPixels = lambda position, lr_pixels: None,
    runners: Sequence[TileRunner] | None = None,
    cache_bytes: int | None = None,
    shares_tiles: bool = False,
) -> list[TiledStage]:
    """The chain of stages in tiles, first stage first; the last one is in canvas coordinates.

    Args:
        cuts: cut of every stage.
        stages: network of every stage.
        base: the base image.
        seed: seed of all noise.
        scratch: folder for tiles that exceed the caches.
        on_pixels: called after each tile.
        runners: how the tiles of every stage run; by default one by one.
        cache_bytes: size of every stage's cache; by default its share of the engine's limit.
        shares_tiles: write every tile of an inner stage to ``scratch``, where other parts of the render find it.
    """
    chain: list[TiledStage] = []
    limit = limits.cache_share(len(stages)) if cache_bytes is None else cache_bytes
    for cut, stage, run in zip(cuts, stages, runners or [one_by_one] * len(stages), strict=True):
        dtype = np.uint8 if cut.is_image else np.float32
        is_shared = shares_tiles and cut is not cuts[-1]
        cache = TileCache(limit, Scratch(scratch / str(cut.position + 1), cut.grid, dtype), shared=is_shared)
        source = chain[-1] if chain else base_of(cut, base)
        chain.append(TiledStage(cut, stage, source, cache, seed, on_pixels, run))
    return chain


def row_chain(
    cuts: Sequence[StagePlan],
    stages: Sequence[Stage],
    base: Source,
    columns: tuple[int, int],
    *,
    seed: int,
    streams: RowStreams | None = None,
    queue: DeviceQueue | None = None,
    on_pixels: OnPixels = lambda position, lr_pixels: None,
) -> RowSource:
    """The chain of stages in bands, for the half-open range ``columns`` of the last stage's output.

    Args:
        cuts: cut of every stage.
        stages: network of every stage.
        base: the base image.
        columns: columns of the canvas.
        seed: seed of all noise.
        streams: streams to reuse; by default new ones.
        queue: queue of the device; by default a new one.
        on_pixels: called after each band.
    """
    strip: list[Columns] = []
    for cut in reversed(cuts):
        strip.append(Columns(cut.input_columns(*columns), columns))
        columns = cut.source_columns(strip[-1].input)
    streams, queue = streams or RowStreams(), queue or device_queue(stages[0].device)
    rows: RowSource = SourceRows(base_of(cuts[0], base), columns)
    for cut, stage, part in zip(cuts, stages, reversed(strip), strict=True):
        stream = streams.of(cut.position, stage, part.input[1] - part.input[0], queue)
        rows = BandedStage(cut, stage, stream, queue, rows, part, seed, on_pixels)
    return rows


@dataclass(kw_only=True)
class Pipeline:
    """A plan with its networks and its base image."""

    plan: Plan
    stages: Sequence[Stage]
    """Network of every stage."""
    base: Source
    """The base image."""
    alpha: Source | None = None
    """Alpha of the picture that is the base image, float32 [1, h, w]; None if the store has none."""
    scratch: Path
    """Folder for tiles that exceed the caches."""
    batches: Sequence[int] = ()
    """Tiles of each stage that run at once."""
    may_recut: bool = False
    """Whether tiles may become smaller, or strips narrower, when a device's memory is exhausted."""
    shares_tiles: bool = False
    """Whether other parts of the render find the tiles of inner stages in ``scratch``."""
    on_pixels: OnPixels = lambda position, lr_pixels: None
    """Called with (position of the stage, LR pixels) after a network has run."""
    on_recut: Callable[[tuple[StagePlan, ...]], None] = lambda cuts: None
    """Called with the new ``cuts`` after a tile became smaller, or the strips narrower."""
    cuts: tuple[StagePlan, ...]
    """Cut of every stage as it really runs."""
    _chain: list[TiledStage] = field(default_factory=list, init=False)
    """The present chain in tiles. Earlier ones are dropped: their caches hold memory."""
    _streams: RowStreams = field(default_factory=RowStreams, init=False)
    _redone: int = field(default=0, init=False)
    """Tiles of earlier chains, and rows of shards, that were computed again."""

    def tiles(self, runners: Sequence[TileRunner] | None = None) -> list[TiledStage]:
        """The chain in tiles, first stage first."""
        self._redone = self.redone
        self._chain = tile_chain(
            self.cuts,
            self.stages,
            self.base,
            seed=self.plan.seed,
            scratch=self.scratch / self._cut_name,
            on_pixels=self.on_pixels,
            runners=runners,
            shares_tiles=self.shares_tiles,
        )
        return self._chain

    def rows(self, columns: tuple[int, int], in_fp32: Container[int] = ()) -> RowSource:
        """The chain in bands, reduced and finished where the plan says so.

        Args:
            columns: columns of the canvas.
            in_fp32: positions of stages that run in float32, whatever their precision.
        """
        reduction = self.plan.reduction
        stages = [(s.fp32_fallback if k in in_fp32 else None) or s for k, s in enumerate(self.stages)]
        rows = row_chain(
            self.cuts,
            stages,
            self.base,
            reduction.columns.read(*columns),
            seed=self.plan.seed,
            streams=self._streams,
            queue=self.queue,
            on_pixels=self.on_pixels,
        )
        return rows if self.plan.is_direct else ReducedRows(rows, reduction, columns, self.finish)

    @property
    def finish(self) -> Finish:
        """Makes the pixels of the store from float32, where the last stage does not."""
        alpha = None if self.alpha is None else EnlargedAlpha(self.alpha, self.plan)
        return Finish(self.plan.pixels, dither=self.plan.stages[-1].dither, alpha=alpha)

    @property
    def redone(self) -> int:
        """Tiles, or rows of shards, that half precision could not represent and float32 computed again."""
        return self._redone + sum(image.redone for image in self._chain)

    def count_redone(self) -> None:
        """Count a row of shards that was computed again."""
        self._redone += 1

    @property
    def writes(self) -> Writes:
        """Boxes that are written in one go, in the present cut."""
        return replace(self.plan, stages=self.cuts).writes()

    def recut(self, error: OutOfDeviceMemory) -> None:
        """Make the tile of the stage that ran out of memory smaller, or all strips of bands narrower.

        Another cut is another approximation of the whole image, within the same seam error.

        Raises:
            BudgetError: the tile was requested by the user, or is the smallest.
        """
        position = error.position or 0
        cuts = self._smaller_cuts(position) if self.may_recut else None
        if cuts is None:
            cut = self.cuts[position]
            parts = f"strips of {self.cuts[-1].tile} px" if self.plan.is_banded else f"tiles of {cut.core_text} px"
            name = self.cuts[-1].name if self.plan.is_banded else cut.name
            raise BudgetError(
                f"{name}: {parts} do not fit the device's memory ({error}); finished shards are kept; "
                f"free memory, raise {option('vram')}, or use a smaller {option('tile')}"
            ) from error
        self.cuts = cuts
        self._streams.clear()
        self.on_recut(cuts)

    def _smaller_cuts(self, position: int) -> tuple[StagePlan, ...] | None:
        if self.plan.is_banded:
            return narrower(self.plan, self.cuts)
        smaller = smaller_tile(self.cuts[position])
        return None if smaller is None else (*self.cuts[:position], smaller, *self.cuts[position + 1 :])

    @cached_property
    def queue(self) -> DeviceQueue:
        """Queue of the device, for the rows of bands that go there and back."""
        return device_queue(self.stages[0].device)

    @property
    def _cut_name(self) -> str:
        """Name of the folder of spilled tiles, which belong to one plan and one cut."""
        changed = [s.core_text for s in self.cuts] if self.cuts != self.plan.stages else []
        return "-".join([self.plan.digest[:16], *changed])


class Run(Protocol):
    """The function of an executor's module."""

    def __call__(self, pipeline: Pipeline, sink: Sink) -> Iterator[BoxWritten]: ...


def run_function(plan: Plan) -> Run:
    """The function that runs a plan."""
    run: Run = import_module(f"engine.run.{EXECUTORS[plan.executor].module}").run
    return run
