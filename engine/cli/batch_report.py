"""Plan and results of a batch, for people and for machines."""

from __future__ import annotations

import math
from typing import Any

from engine.cli import report
from engine.cli.batch import Batch, Item, State
from engine.cli.progress import clock, warn
from engine.cli.render import name_of
from engine.cli.tables import print_table
from engine.device.memory import process_peak
from engine.errors import counted
from engine.plan.cost import readable
from engine.plan.halo import largest
from engine.plan.make import seam_errors


def print_plan(batch: Batch, dpi: float | None) -> None:
    """Print megapixels, memory, disk, time and size on paper."""
    waiting = batch.in_state("waiting")
    number = counted(len(waiting), "picture")
    if others := _counts(batch, "done before", "failed"):
        number += f" of {len(batch.items)} ({others})"
    if batch.sample is None or batch.largest is None:
        report.prose(f"{number} to enlarge")
        return
    before, after = _pixels(waiting)
    name = name_of(batch.models)
    report.prose(f"{number}: {report.megapixels(before)} become {report.megapixels(after)}, by {name}")
    plan, measured, projection = batch.sample.plan, batch.sample.measured, batch.sample.projection
    (height, width), (rows, columns), budget = batch.largest.native, plan.size, measured.budget
    report.prose(
        f"the largest: {batch.largest.pair.source.name}, {width}x{height} to {columns}x{rows}, {plan.executor}, "
        f"{plan.precision}, seam error {report.seam_text(largest(seam_errors(plan, measured)))}"
    )
    device = "" if budget.device is None else f", device memory {report.part_of(projection.device, budget.device)}"
    disk = sum(math.prod(item.size) * item.pixels.bytes for item in waiting if item.size)
    report.prose(
        f"memory {report.part_of(projection.host, budget.host)}{device}, disk at most {readable(disk)}, "
        f"time about {clock(batch.seconds)}"
    )
    report.print_on_paper(plan.size, dpi)
    if disk > budget.disk:
        warn(f"the results take up to {readable(disk)}, and {readable(budget.disk)} of the disk are free")


def plan_json(batch: Batch) -> dict[str, Any]:
    """The plan for machines: what is to be done with each picture, and the cost."""
    before, after = _pixels(batch.in_state("waiting"))
    sample = batch.sample
    plan = None if sample is None else report.plan_json(sample.plan, sample.projection, sample.measured)
    return {
        "pictures": [item.to_json() for item in batch.items],
        "pixels": before,
        "result_pixels": after,
        "seconds": batch.seconds,
        "largest": plan,
    }


def print_results(batch: Batch, seconds: float, *, quiet: bool) -> None:
    """Print a table of the pictures that were dealt with, and their numbers; with ``quiet`` the numbers alone."""
    if (handled := batch.in_state("written", "done before", "failed")) and not quiet:
        print_table(("picture", "result", "size", "time", "outcome"), map(_row, handled))
    peak = process_peak()
    memory = readable(peak) if batch.sample is None else report.part_of(peak, batch.sample.measured.budget.host)
    counts = _counts(batch, "written", "done before", "failed") or "none done"
    number = counted(len(batch.items), "picture")
    report.line(f"{number}: {counts}, in {clock(seconds)}, peak memory {memory}")


def results_json(batch: Batch, seconds: float) -> dict[str, Any]:
    """The results for machines."""
    pictures = [item.to_json() for item in batch.items]
    return {"pictures": pictures, "seconds": round(seconds, 2), "host_peak": process_peak()}


def _pixels(items: list[Item]) -> tuple[int, int]:
    """Pixels of pictures, and of their results."""
    before = sum(height * width for height, width in (item.native for item in items))
    return before, sum(height * width for height, width in (item.size for item in items if item.size is not None))


def _counts(batch: Batch, *states: State) -> str:
    """Numbers of pictures by their state, without states that none is in."""
    return ", ".join(f"{len(found)} {state}" for state in states if (found := batch.in_state(state)))


def _row(item: Item) -> tuple[str, ...]:
    """A line of the table of results."""
    source = str(item.pair.source)
    if item.state == "failed" or item.size is None:
        return source, "-", "-", "-", f"failed: {item.message}"
    height, width = item.size
    seconds = "-" if item.state == "done before" else f"{item.seconds:.1f} s"
    return source, str(item.output.path), f"{width}x{height}", seconds, item.state
