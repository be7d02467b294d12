"""A render by many workers, a part each, before any of them is there: its shares, its store and its hours. A forecast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from engine.errors import BudgetError, UsageError, option
from engine.forecast import Forecast, forecast, network_times
from engine.io.objects import Place
from engine.job import Job
from engine.model.bundle import Model, load
from engine.plan.cost import Projection, check, store_bytes
from engine.plan.gpus import Gpu
from engine.plan.make import project
from engine.plan.measured import Measured
from engine.plan.parts import MAX_PARTS, Shares
from engine.plan.plan import Plan
from engine.plan.request import Request

Log = Callable[[str], None]

STORED = 0.79
"""Bytes of a store by those of its pixels: a render of 2048x1536 by the default model (benchmarks/results/store_bytes.csv)."""

_LARGEST_MEMORY = 1 << 40
"""Memory of a worker that is tried where the default does not suffice and none was given, in bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """Forecast of a render by workers. Seconds are those of the networks; None where nothing is known of the device."""

    plan: Plan
    measured: Measured
    projection: Projection
    """Cost of the largest share: its memory is that of every worker."""
    workers: int
    device: str
    """Device that the hours are forecast for, in words."""
    shares: Shares
    shards: int
    """Shards of the full image."""
    objects: int
    """Shards of all levels, and the metadata."""
    reads: int
    """Shards that are read back to make the levels of the pyramid above them."""
    raw: int
    """Bytes of the pixels of all levels."""
    seconds: tuple[float, ...]
    """Time of every worker."""
    overhead: float
    """Time of the networks of all workers beyond that of one run, as a share of it."""

    @property
    def stored(self) -> int:
        """Estimated bytes of the store."""
        return int(self.raw * STORED)

    @property
    def read_back(self) -> int:
        """Estimated bytes that leave an object store: all levels but the last are read once."""
        height, width = self.plan.pyramid[-1]
        return int((self.raw - height * width * self.plan.pixels.bytes) * STORED)

    @property
    def imbalance(self) -> float:
        """Time of the slowest worker by the mean."""
        return max(self.seconds) * len(self.seconds) / sum(self.seconds)

    def to_json(self) -> dict[str, Any]:
        """The forecast for reports, without the plan."""
        return {
            "is_measured": False,
            "workers": self.workers,
            "device": self.device,
            "shards": self.shards,
            "objects": self.objects,
            "bytes": {"raw": self.raw, "stored": self.stored, "ratio": STORED},
            "memory": {"host": self.projection.host, "device": self.projection.device},
            "seconds": {"slowest": max(self.seconds), "mean": sum(self.seconds) / len(self.seconds)},
            "imbalance": self.imbalance,
            "overhead": self.overhead,
            "requests": {"put": self.objects, "get": self.reads},
            "egress": self.read_back,
        }


def plan_fleet(
    model: Model | Path | str | None,
    request: Request,
    workers: int,
    out: Place,
    gpu: Gpu | None = None,
    log: Log = lambda _: None,
) -> Fleet:
    """Plan a render in parts on workers like this machine, or with a GPU that is not there.

    A worker has as much memory as its part needs, unless the request limits it; the disk here does not count.

    Raises:
        UsageError: the number of workers is out of range, or the request contradicts itself or the model.
        BudgetError: a part does not fit the requested memory.
    """
    if not 1 <= workers <= MAX_PARTS:
        raise UsageError(f"{option('workers', workers)}: must be from 1 to {MAX_PARTS}")
    model = model if isinstance(model, Model) else load(model) if model else None
    try:
        there = _planned(model, request, out, gpu, log)
    except BudgetError:
        if request.memory is not None:
            raise
        there = _planned(model, replace(request, memory=_LARGEST_MEMORY), out, gpu, log)
    plan, measured, device = there.plan, there.measured, there.device
    shares = Shares.of(plan, measured, workers)
    writes = [shares.writes(plan, part) for part in shares.parts]
    projections = [project(plan, measured, w.rectangles) for w in writes if w]
    seconds = tuple(there.seconds(projection) for projection in projections)
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    shards = [len(plan.grid(level)) for level in range(len(plan.pyramid))]
    return Fleet(
        plan=plan,
        measured=measured,
        projection=replace(projections[slowest], seconds=seconds[slowest]),
        workers=workers,
        device=device,
        shares=shares,
        shards=shards[0],
        objects=sum(shards) + len(shards) + 1,
        reads=sum(shards[:-1]),
        raw=store_bytes(plan),
        seconds=seconds,
        overhead=shares.overhead(plan, measured),
    )


@dataclass(frozen=True, slots=True)
class _Planned:
    plan: Plan
    measured: Measured
    device: str
    seconds: Callable[[Projection], float]
    """Time of a part by its projection."""


def _planned(model: Model | None, request: Request, out: Place, gpu: Gpu | None, log: Log) -> _Planned:
    if gpu is None:
        return _on_this_machine(model, request, out, log)
    result: Forecast = forecast(
        model, request, gpu, out, log, checks_disk=False, largest_memory=_LARGEST_MEMORY
    )  # counts the networks once for both memories
    step_1 = result.projection.seconds - result.times.total

    def seconds(projection: Projection) -> float:
        return network_times(result.plan, projection, result.counts, gpu).total + step_1

    return _Planned(result.plan, result.measured, f"{gpu.name}, by published figures", seconds)


def _on_this_machine(model: Model | None, request: Request, out: Place, log: Log) -> _Planned:
    job = Job.prepare(model, replace(request, device=request.device or "cpu"), out, log)
    check(job.plan, job.projection, replace(job.measured.budget, disk=job.projection.disk_needed))
    device = str(job.factory.device)
    name = f"{torch.get_num_threads()} threads of this CPU" if device == "cpu" else device
    return _Planned(job.plan, job.measured, f"{name}, as measured", lambda projection: projection.seconds)
