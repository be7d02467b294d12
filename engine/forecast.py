"""The plan of a render on a GPU that is not there, with its memory and time: a forecast, never a measurement.

The networks are counted on the meta device and held against published ceilings. What a plan otherwise measures on the device,
halos and precisions, comes from the model file or from this CPU, and ``assumptions`` says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from engine.device.precision import Precision
from engine.errors import BudgetError, UsageError, option
from engine.geometry import UNBOUNDED
from engine.io.objects import Place
from engine.job import opened
from engine.measure import complete, measure
from engine.model.bundle import Model
from engine.plan.cost import Projection, check
from engine.plan.gpus import CONTEXT, Gpu
from engine.plan.layouts import EXECUTORS, candidates
from engine.plan.limits import saturating_pixels
from engine.plan.make import make_plan, project
from engine.plan.measured import BandCost, Fallback, Footprint, Measured, MissingMeasurement
from engine.plan.plan import Plan
from engine.plan.request import AUTO, Request
from engine.plan.roofline import Counts, Times
from engine.probe import count
from engine.probe.footprint import band_memory
from engine.run.stage import Stage, StageFactory

Log = Callable[[str], None]

_HALF: Precision = "fp16"
"""Half precision of every GPU of the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """A plan on a GPU, with what was counted for it."""

    gpu: Gpu
    plan: Plan
    measured: Measured
    """Measurements as they would be on the GPU: counted, published or taken from the CPU."""
    projection: Projection
    """Memory and time; the time is the roofline's."""
    counts: tuple[Counts, ...]
    """Operations of every stage's network, as the executor runs it."""
    times: Times
    """Seconds of all networks by the ceiling that binds."""
    work: float
    """LR pixels that the last network computes by those of its image."""
    assumptions: tuple[str, ...]
    """Values that a device would have to measure, and their source."""

    def to_json(self) -> dict[str, Any]:
        """The forecast for reports, without the plan."""
        return {
            "is_measured": False,
            "gpu": self.gpu.name,
            "device": self.projection.device,
            "seconds": self.times.total,
            "shares": self.times.shares,
            "work": self.work,
            "steps": [counts.to_json() for counts in self.counts],
            "assumptions": list(self.assumptions),
        }


def forecast(
    model: Model | Path | str | None,
    request: Request,
    gpu: Gpu,
    out: Place,
    log: Log = lambda _: None,
    *,
    checks_disk: bool = True,
    largest_memory: int | None = None,
) -> Forecast:
    """Plan a render as on a GPU, and project its memory and time.

    Args:
        model, request, out, log: as for ``engine.render``; ``request.vram`` limits the GPU's memory.
        gpu: the GPU.
        checks_disk: whether the store must fit the disk here.
        largest_memory: bytes of memory that are planned with where the default does not suffice; None: it is refused.

    Raises:
        UsageError: the request names a device, or contradicts itself or the model.
        BudgetError: the render does not fit the GPU, the memory or the disk.
    """
    if request.device is not None:
        raise UsageError(
            f"{option('device', request.device)}: a forecast for {option('gpu')} runs nothing on a device; leave it out"
        )
    model, picture = opened(model, request)
    factory = StageFactory(model, torch.device("cpu"))
    here = measure(model, request, factory, out=out, picture=picture, log=log)
    log(f"counting the networks for {gpu.name}; nothing runs on it")
    there, tiles, bands = _as_on(gpu, model, request, here)
    while True:
        try:
            plan = make_plan(request, there)
            projection = project(plan, there)
            check(plan, projection, there.budget if checks_disk else replace(there.budget, disk=projection.disk_needed))
            break
        except MissingMeasurement as missing:
            here = complete(here, missing, model, request, factory, picture=picture, log=log)
            stages = zip(there.stages, here.stages, strict=True)
            there = replace(there, stages=tuple(replace(s, profile=known.profile) for s, known in stages))
        except BudgetError:
            if request.memory is not None or largest_memory is None:
                raise
            there, largest_memory = replace(there, budget=replace(there.budget, host=largest_memory)), None
    counts = tuple((bands if plan.is_banded else tiles)[: len(plan.stages)])
    times = network_times(plan, projection, counts, gpu)
    step_1 = math.prod(plan.base) * there.base.seconds_per_pixel if there.base is not None else 0.0
    projection = replace(projection, seconds=times.total + step_1)
    last = plan.stages[-1]
    return Forecast(
        gpu=gpu,
        plan=plan,
        measured=there,
        projection=projection,
        counts=counts,
        times=times,
        work=projection.lr_pixels[-1] * last.scale**2 / last.grid.bounds.area,
        assumptions=_assumptions(gpu, model, request, plan, here),
    )


@dataclass(frozen=True, slots=True)
class _Counted:
    """A network as it would run on a GPU, whatever its weights."""

    tiles: Counts
    """Operations of tiles."""
    bands: Counts
    """Operations of bands; of tiles if bands are not considered."""
    footprint: Footprint
    """Cost of tiles."""
    cost: BandCost | None
    """Cost of bands."""
    fp32: Fallback | None
    """Memory in float32 beside half precision."""


def _as_on(
    gpu: Gpu, model: Model, request: Request, here: Measured
) -> tuple[Measured, Sequence[Counts], Sequence[Counts]]:
    """Measurements as they would be on the GPU, and the counts of every stage in tiles and in bands."""
    precisions = _precisions(request, here)
    saturating = saturating_pixels(gpu.multiprocessors, gpu.cache << 20)
    in_bands = any(EXECUTORS[name].layout.in_bands for name in candidates(request, "cuda"))
    networks: list[_Counted] = []
    known: dict[object, _Counted] = {}
    weights: dict[object, int] = {}  # steps that share weights and precision share a network
    for index, precision in enumerate(precisions):
        stage = count.meta_stage(model, index, precision, gpu)
        weights[model.stages[index].weights, precision] = _weights(stage)
        form = precision, type(stage.network), *((k, t.shape) for k, t in stage.network.state_dict().items())
        if form not in known:
            tiles = count.tile_counts(stage, gpu)
            # As found here: a count on the meta device checks no pixels.
            can_stream = in_bands and here.stages[index].radius < UNBOUNDED
            cost, bands = _bands(stage, gpu, request) if can_stream else (None, tiles)
            seconds = tiles.times(gpu, saturating).total / saturating
            known[form] = _Counted(
                tiles=tiles,
                bands=bands,
                footprint=replace(count.tile_bytes(stage, gpu), seconds_per_pixel=seconds),
                cost=cost,
                fp32=None if precision == "fp32" else count.fallback(model, index, in_bands=cost is not None),
            )
        networks.append(known[form])
    there = replace(
        here,
        stages=tuple(
            replace(stage, tiles=network.footprint, bands=network.cost, on_device=True, fp32=network.fp32)
            for stage, network in zip(here.stages, networks, strict=True)
        ),
        device_baseline=CONTEXT + sum(weights.values()),
        budget=replace(here.budget, device=min(request.vram or gpu.memory_bytes, gpu.memory_bytes)),
        precisions=precisions,
        device="cuda",
        backend=f"cuda, a forecast for {gpu.name}",
        saturating=saturating,
    )
    return there, [network.tiles for network in networks], [network.bands for network in networks]


def _bands(stage: Stage, gpu: Gpu, request: Request) -> tuple[BandCost | None, Counts]:
    """Cost and operations of bands; no cost when the network cannot be streamed and bands are not requested by name."""
    try:
        with count.as_on(gpu):
            cost = band_memory(stage)
    except UsageError:
        if request.executor != AUTO:
            raise
        return None, count.tile_counts(stage, gpu)
    counts = count.band_counts(stage, count.WIDTH, gpu)
    return replace(cost, seconds_per_pixel=counts.times(gpu, counts.pixels).total / counts.pixels), counts


def _precisions(request: Request, here: Measured) -> tuple[str, ...]:
    """fp16 from the stage on where this CPU accepts bf16; everywhere if it measured none."""
    if request.precision != AUTO:
        return here.precisions
    if here.precision_error is None:
        return (_HALF,) * len(here.precisions)
    return tuple("fp32" if name == "fp32" else _HALF for name in here.precisions)


def _weights(stage: Stage) -> int:
    return sum(t.numel() * t.itemsize for t in (*stage.network.parameters(), *stage.network.buffers()))


def network_times(plan: Plan, projection: Projection, counts: Sequence[Counts], gpu: Gpu) -> Times:
    """Seconds of all networks, in batches or bands of the plan's size."""
    inputs = plan.input_columns(next(plan.column_strips())) if plan.is_banded else ()
    parts = []
    for index, (stage, counted, pixels) in enumerate(zip(plan.stages, counts, projection.lr_pixels, strict=True)):
        if plan.is_banded:
            size = stage.band * (inputs[index][1] - inputs[index][0])
        else:
            batch = projection.batches[index] if projection.batches else 1
            size = batch * math.prod(stage.tile_shape)
        parts.append(counted.times(gpu, size).scaled(pixels / size))
    return Times.sum(parts)


def _assumptions(gpu: Gpu, model: Model, request: Request, plan: Plan, here: Measured) -> tuple[str, ...]:
    """Values that a device would have to measure, and their source."""
    found = []
    if plan.needs_halos and request.halo_policy.needs_profile:
        is_stored = all(stage.profile is not None for stage in model.stages)
        found.append("halos as the model file holds them" if is_stored else "halos as measured on this CPU")
    if request.precision == AUTO:
        measured = here.precision_error is not None
        found.append(f"{_HALF} where this CPU measured bf16 as tolerable" if measured else f"{_HALF} as tolerable")
    if not gpu.runs_kernels:
        found.append("PyTorch's operations in place of the engine's kernels, for which the GPU is too old")
    return tuple(found)
