"""``engine plan --workers``: what a render takes on many workers, as a forecast."""

from __future__ import annotations

from pathlib import Path

from engine.cli import report
from engine.cli.progress import log
from engine.device.heap import fix_malloc_thresholds
from engine.errors import counted
from engine.fleet import STORED, Fleet, plan_fleet
from engine.plan.cost import readable
from engine.plan.gpus import find_gpu
from engine.plan.request import Request

_UNITS = ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"))


def print_fleet(
    model: Path, store: Path, request: Request, workers: int, gpu: str | None, *, as_json: bool, quiet: bool
) -> None:
    """Plan a render by workers and print its shares, its store and its hours."""
    card = None if gpu is None else find_gpu(gpu)
    fix_malloc_thresholds()
    fleet = plan_fleet(model, request, workers, store, card, log)
    if as_json:
        plan = report.plan_json(fleet.plan, fleet.projection, fleet.measured)
        report.print_json({**plan, "fleet": fleet.to_json()})
    elif not quiet:
        _print(fleet, model.stem, request)


def _print(fleet: Fleet, model: str, request: Request) -> None:
    plan, projection = fleet.plan, fleet.projection
    picture = None if request.init is None else (request.init, plan.base)
    report.prose(f"{report.what(plan, fleet.measured, picture)}, by {model}")
    height, width = plan.shard
    report.prose(
        f"{counted(fleet.workers, 'worker')}, a forecast: {fleet.shards:,} shards of {width}x{height}, "
        f"{plan.executor}, {plan.precision}"
    )
    device = f", device memory {readable(projection.device)}" if fleet.measured.budget.device is not None else ""
    largest = max(projection.host_parts, key=lambda name: projection.host_parts[name])
    report.prose(
        f"each worker: memory {readable(projection.host)} (largest part: {largest}, "
        f"{readable(projection.host_parts[largest])}){device}, at most {max(fleet.seconds) / 3600:.3g} hours "
        f"({fleet.device})"
    )
    report.prose(
        f"all workers: {sum(fleet.seconds) / 3600:,.3g} hours, of which {_repeated(fleet) / 3600:,.3g} repeat work "
        f"(warm-up of shares, step 1); the slowest takes {fleet.imbalance:.3f} times the mean"
    )
    report.prose(
        f"store: {_size(fleet.raw)} of pixels with the pyramid, about {_size(fleet.stored)} compressed ({STORED:g} of the "
        "pixels, as a render of 2048x1536 by the default model)"
    )
    report.prose(
        f"object store: {fleet.objects:,} requests to put, {fleet.reads:,} to get and about {_size(fleet.read_back)} of egress "
        "for the pyramid"
    )
    report.prose("not counted: failures, compression and transfers (docs/scale.md simulates them)")


def _repeated(fleet: Fleet) -> float:
    """Seconds of all workers beyond those of one run."""
    return sum(fleet.seconds) * fleet.overhead / (1 + fleet.overhead)


def _size(size: float) -> str:
    """Bytes of an object store for people: "3.30 TB"."""
    unit, name = next((entry for entry in _UNITS if size >= entry[0]), _UNITS[-1])
    return f"{size / unit:.2f} {name}"
