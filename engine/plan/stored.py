"""Cut of a stored plan, which a resumed render adopts, and the smaller cut with which an earlier run ended."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from engine.plan.layouts import EXECUTORS, candidates
from engine.plan.measured import Measured
from engine.plan.plan import Plan, executor_of
from engine.plan.request import Request
from engine.plan.sides import Sides, sides_of, stored_sides
from engine.plan.stage import StagePlan
from engine.plan.strips import narrower


@dataclass(frozen=True, slots=True)
class StoredCut:
    """Cut of a stored plan that a resumed render adopts."""

    executor: str
    tiles: tuple[Sides, ...]
    """(rows, columns) of every stage's tile, in LR pixels; strips have columns alone."""


def stored_cut(stored: dict[str, Any], request: Request, measured: Measured) -> StoredCut | None:
    """Cut of a stored plan, or None if this request cannot adopt it.

    A requested tile is kept, and a damaged stored plan is reported when both plans are compared.
    """
    try:
        tiles = tuple(sides_of(stage["core"]) for stage in stored["stages"])
    except (KeyError, TypeError, ValueError):
        return None
    name = executor_of(stored)
    if len(tiles) != len(measured.stages):
        return None
    if request.tile is not None or name not in candidates(request, measured.device):
        return None
    return StoredCut(name, tiles) if EXECUTORS[name].layout.is_possible(measured) else None


def recut(plan: Plan, tiles: Any) -> tuple[StagePlan, ...] | None:  # noqa: ANN401 (of a file)
    """The stages of a plan in the tiles or strips of a store whose device ran out of memory; None if they do not fit the plan.

    Args:
        plan: plan of the store.
        tiles: stored form of every stage's tile, in LR pixels.
    """
    if plan.is_banded:
        cuts: tuple[StagePlan, ...] | None = plan.stages
        while cuts is not None and [stored_sides(cut.core) for cut in cuts] != tiles:
            cuts = narrower(plan, cuts)
        return cuts
    with suppress(TypeError, ValueError):
        return tuple(_with_smaller_tile(stage, tile) for stage, tile in zip(plan.stages, tiles, strict=True))
    return None


def _with_smaller_tile(stage: StagePlan, stored: object) -> StagePlan:
    """A stage of the plan that continues with a smaller tile, after its device ran out of memory.

    Raises ValueError when it may not.
    """
    rows, columns = core = sides_of(stored)
    if rows > stage.core[0] or columns > stage.core[1] or min(core) < stage.blend or any(n % stage.align for n in core):
        raise ValueError(f"tiles of {rows} x {columns} in place of {stage.core}")
    return stage.with_core(core)
