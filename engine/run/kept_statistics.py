"""Frozen statistics beside an unfinished store: for a resumed render, for other parts and for other machines."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

from engine.io.files import replacing
from engine.io.objects import ObjectPath, Place
from engine.io.scratch import statistics_name, stored_scratch
from engine.plan.measured import Measured
from engine.plan.plan import Plan
from engine.run.stage import StageFactory
from engine.run.statistics import Statistics


def keep_statistics(store: Place, plan: Plan, factory: StageFactory) -> None:
    """Write the statistics of a plan beside its store."""
    folder = stored_scratch(store)
    for cut in plan.stages:
        file = folder / statistics_name(cut.statistics)
        if cut.statistics and not file.exists():
            factory.statistics[cut.statistics].save(file)
        if cut.statistics and isinstance(store, ObjectPath):
            (store / file.name).write_new(file.read_bytes())


def adopt_statistics(store: Place, stored: dict[str, Any], measured: Measured, factory: StageFactory) -> Measured:
    """The measurements with the statistics that the store was begun with: another machine records others, by rounding.

    Args:
        store: folder or URL of the store.
        stored: its plan.
        measured: measurements of this machine.
        factory: keeps the statistics.
    """
    stages, folder = list(measured.stages), stored_scratch(store)
    with suppress(KeyError, TypeError, AttributeError):
        for index, stage in enumerate(stored["stages"]):
            digest = str(stage.get("statistics", ""))
            if digest and digest not in factory.statistics:
                _fetch(store, digest)
                sites = factory.stages(measured.precisions)[index].sites
                kept = Statistics(sites, (0, 0), {}).load(folder / statistics_name(digest))
                if kept is None or factory.keep(kept) != digest:
                    continue  # the difference of the plans is reported
            if digest:
                stages[index] = replace(stages[index], statistics=digest)
    return replace(measured, stages=tuple(stages))


def _fetch(store: Place, digest: str) -> None:
    """Copy statistics that another machine wrote beside the store."""
    file = stored_scratch(store) / statistics_name(digest)
    if isinstance(store, ObjectPath) and not file.exists() and (stored := store / file.name).is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as part:
            part.write_bytes(stored.read_bytes())
