"""The executors by name: how each one cuts an image, and which module runs it. Knows nothing of tensors.

To add an executor, write ``engine/run/<module>.py`` with a function ``run`` (see ``engine.run.pipeline``) and add one entry to
``EXECUTORS``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.errors import UsageError, option
from engine.geometry import UNBOUNDED, Box
from engine.plan import strips, tiles
from engine.plan.cost import Projection
from engine.plan.measured import Measured
from engine.plan.plan import Plan
from engine.plan.request import AUTO, Request
from engine.plan.sides import Sides
from engine.plan.stage import StagePlan


class Layout(Protocol):
    """A way to cut an image, with its cost."""

    in_bands: bool
    """Whether stages run in bands, whose cost must be measured."""

    def is_possible(self, measured: Measured) -> bool:
        """Whether the model can be rendered in this way."""
        ...

    def whole(
        self, stages: Sequence[StagePlan], measured: Measured, width: int, tile: Sides | None
    ) -> tuple[StagePlan, ...] | None:
        """The stages with the whole width in one piece; None if the layout knows no such cut, or if it does not fit."""
        ...

    def choose(
        self, stages: Sequence[StagePlan], measured: Measured, width: int, tile: Sides | None
    ) -> tuple[StagePlan, ...]:
        """The stages with their tiles or strips.

        Args:
            stages, measured: stages without a cut, and their costs.
            width: of the output, in pixels.
            tile: (rows, columns) of a requested tile, in LR pixels; strips have its columns.
        """
        ...

    def restore(
        self, stages: Sequence[StagePlan], measured: Measured, width: int, tiles: Sequence[Sides]
    ) -> tuple[StagePlan, ...]:
        """The stages with the tiles or strips of a stored plan."""
        ...

    def shard(self, last: StagePlan, width: int) -> tuple[Sides, Sides]:
        """(height, width) of (shard, chunk) of the store, in pixels."""
        ...

    def inner_edges(self, plan: Plan) -> list[bool]:
        """Whether a tile or strip of each stage has an edge inside the image."""
        ...

    def project(self, plan: Plan, measured: Measured, writes: Iterable[Box] | None) -> Projection:
        """Cost of a plan for these boxes of whole writes, or for all."""
        ...

    def shares(self, plan: Plan, measured: Measured, count: int) -> tuple[int, ...]:
        """Bounds of ``count`` ranges of the plan's writes with balanced work."""
        ...


@dataclass(frozen=True, slots=True)
class TileLayout:
    """Tiles with a halo on all sides."""

    batched: bool
    """Whether tiles run in batches."""
    in_bands = False

    def is_possible(self, measured: Measured) -> bool:
        return True

    def whole(
        self, stages: Sequence[StagePlan], measured: Measured, width: int, tile: Sides | None
    ) -> tuple[StagePlan, ...] | None:
        """One tile, for networks that see no smaller one as they see the image."""
        if all(stage.radius < UNBOUNDED for stage in measured.stages):
            return None
        if tile is None:
            return tiles.one_tile(stages, measured, batched=self.batched)
        requested = self.restore(stages, measured, width, [tile] * len(stages))
        return requested if all(map(tiles.is_whole, requested)) else None

    def choose(
        self, stages: Sequence[StagePlan], measured: Measured, width: int, tile: Sides | None
    ) -> tuple[StagePlan, ...]:
        if tile is None:
            return tiles.choose_tiles(stages, measured, batched=self.batched)
        return self.restore(stages, measured, width, [tile] * len(stages))

    def restore(
        self, stages: Sequence[StagePlan], measured: Measured, width: int, tiles: Sequence[Sides]
    ) -> tuple[StagePlan, ...]:
        return tuple(
            stage.with_core((rounded(rows, stage), rounded(columns, stage)))
            for stage, (rows, columns) in zip(stages, tiles, strict=True)
        )

    def shard(self, last: StagePlan, width: int) -> tuple[Sides, Sides]:
        return tiles.shard_of_tiles(last)

    def inner_edges(self, plan: Plan) -> list[bool]:
        return tiles.inner_edges(plan)

    def project(self, plan: Plan, measured: Measured, writes: Iterable[Box] | None) -> Projection:
        return tiles.project(plan, measured, writes, batched=self.batched)

    def shares(self, plan: Plan, measured: Measured, count: int) -> tuple[int, ...]:
        return tiles.shares(plan, count)


@dataclass(frozen=True, slots=True)
class BandLayout:
    """Strips that run from top to bottom in bands of rows."""

    in_bands = True

    def is_possible(self, measured: Measured) -> bool:
        return strips.streamable(measured)

    def whole(
        self, stages: Sequence[StagePlan], measured: Measured, width: int, tile: Sides | None
    ) -> tuple[StagePlan, ...] | None:
        columns = strips.all_columns(stages, measured, width)
        if tile is not None:
            return strips.with_strips(stages, measured, columns) if rounded(tile[1], stages[-1]) >= columns else None
        return strips.one_strip(stages, measured, width)

    def choose(
        self, stages: Sequence[StagePlan], measured: Measured, width: int, tile: Sides | None
    ) -> tuple[StagePlan, ...]:
        if tile is None:
            return strips.choose_strips(stages, measured, width)
        return self.restore(stages, measured, width, [tile])

    def restore(
        self, stages: Sequence[StagePlan], measured: Measured, width: int, tiles: Sequence[Sides]
    ) -> tuple[StagePlan, ...]:
        tile = min(rounded(tiles[-1][1], stages[-1]), strips.all_columns(stages, measured, width))
        return strips.with_strips(stages, measured, tile)

    def shard(self, last: StagePlan, width: int) -> tuple[Sides, Sides]:
        shard, chunk = strips.shard_of_strips(last, width)
        return (shard, shard), (chunk, chunk)

    def inner_edges(self, plan: Plan) -> list[bool]:
        return strips.inner_edges(plan)

    def project(self, plan: Plan, measured: Measured, writes: Iterable[Box] | None) -> Projection:
        return strips.project(plan, measured, writes)

    def shares(self, plan: Plan, measured: Measured, count: int) -> tuple[int, ...]:
        return strips.shares(plan, measured, count)


@dataclass(frozen=True, slots=True)
class Executor:
    """One way to run a plan."""

    layout: Layout
    """Cut of the image."""
    module: str
    """Module of ``engine.run`` whose function ``run`` executes a plan."""
    is_automatic: Callable[[Request, str], bool]
    """Whether it is a candidate of the automatic choice, for a request and a type of device."""
    on_cpu: str | None = None
    """Executor that takes its place on a CPU that was not requested by name."""


EXECUTORS: dict[str, Executor] = {
    # Bands are exact and take a fraction of the memory. On a CPU they are as fast as tiles; on a GPU they compute less in the
    # same memory, and no speed was measured. A requested tile or cross-fade means tiles.
    "bands": Executor(BandLayout(), "bands", lambda request, device: not (request.tile or request.blend)),
    "batched": Executor(TileLayout(batched=True), "batched", lambda request, device: device != "cpu", on_cpu="tiles"),
    "tiles": Executor(TileLayout(batched=False), "serial", lambda request, device: device == "cpu"),
}
"""Executors by name, the preferred one first."""


def candidates(request: Request, device: str) -> tuple[str, ...]:
    """Names of the executors that a request allows on a type of device, the preferred one first.

    Raises UsageError when the requested executor is unknown or cannot cross-fade.
    """
    if request.executor == AUTO:
        return tuple(name for name, executor in EXECUTORS.items() if executor.is_automatic(request, device))
    chosen = EXECUTORS.get(request.executor)
    if chosen is None:
        names = ", ".join(sorted(EXECUTORS))
        raise UsageError(f"{option('executor', request.executor)}: unknown executor; use {AUTO} or one of {names}")
    if request.blend and chosen.layout.in_bands:
        raise UsageError(
            f"{option('blend', request.blend)}: {request.executor} have no tiles to cross-fade; "
            f"use {option('executor', 'tiles')}, or leave out {option('blend')}"
        )
    if isinstance(request.tile, tuple) and chosen.layout.in_bands:
        width, height = request.tile
        raise UsageError(
            f"{option('tile', f'{width}x{height}')}: strips of {request.executor} have a width alone; "
            f"use {option('tile', width)}, or {option('executor', 'tiles')}"
        )
    replacement = chosen.on_cpu
    if replacement is not None and device == "cpu" and request.device is None:
        return (replacement,)
    return (request.executor,)


def rounded(tile: int, stage: StagePlan) -> int:
    """A requested side rounded up to the stage's window, and to an even output, so that the pyramid halves it."""
    step = stage.align if stage.align * stage.scale % 2 == 0 else 2 * stage.align
    return -(-tile // step) * step
