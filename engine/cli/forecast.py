"""``engine plan --gpu``: the plan on a GPU that is not there, as a forecast."""

from __future__ import annotations

from pathlib import Path

from engine.cli import report
from engine.cli.progress import clock, log
from engine.device.heap import fix_malloc_thresholds
from engine.forecast import Forecast, forecast
from engine.io.objects import Place
from engine.model.bundle import load
from engine.plan.cost import readable
from engine.plan.gpus import CONTEXT, find_gpu
from engine.plan.halo import largest
from engine.plan.make import seam_errors
from engine.plan.request import Request

_BOUNDS = {"arithmetic": "arithmetic", "traffic": "memory traffic", "launches": "launches"}


def print_forecast(model: Path, store: Place, request: Request, gpu: str, *, as_json: bool, quiet: bool) -> None:
    """Plan a render as on a GPU of the table and print its memory and time; refuses what does not fit it."""
    card = find_gpu(gpu)
    fix_malloc_thresholds()
    result = forecast(load(model), request, card, store, log)
    if as_json:
        plan = report.plan_json(result.plan, result.projection, result.measured)
        report.print_json({**plan, "forecast": result.to_json()})
    elif not quiet:
        _print(result, model.stem, request)


def _print(result: Forecast, model: str, request: Request) -> None:
    gpu, plan, projection, budget = result.gpu, result.plan, result.projection, result.measured.budget
    picture = None if request.init is None else (request.init, plan.base)
    report.prose(f"{report.what(plan, result.measured, picture)}, by {model}")
    report.prose(
        f"forecast for {gpu.name}, not a measurement: device memory {report.part_of(projection.device, budget.device or 0)}, "
        f"networks about {_seconds(result.times.total)}"
    )
    report.prose(
        f"{plan.executor}, {plan.precision}, seam error {report.seam_text(largest(seam_errors(plan, result.measured)))}; "
        f"{_pieces(result)}"
    )
    last, counts = plan.stages[-1], result.counts[-1]
    report.prose(
        f"counted for {last.name}: {counts.flops_per_pixel / 1e6:.1f} MFLOP and {counts.bytes_per_pixel / 1e3:.0f} KB of "
        f"traffic a pixel of its input, {counts.launches} launches a {'band' if plan.is_banded else 'batch'}"
    )
    first, *rest = ((_BOUNDS[name], f"{share:.0%}") for name, share in result.times.shares.items())
    others = ", ".join(f"{name} {share}" for name, share in rest)
    report.prose(f"bound by {first[0]}: {first[1]} of the time; {others}")
    assumed = "; ".join(
        (
            f"{gpu.half:g} TFLOP/s in fp16, {gpu.bandwidth:g} GB/s and {gpu.memory:g} GiB as published, reached in full",
            f"a context of {readable(CONTEXT)}",
            *result.assumptions,
        )
    )
    report.prose(f"assumed: {assumed}")
    report.prose("not counted: caches, step 1, copies to the host, compression and the disk")


def _pieces(result: Forecast) -> str:
    """Tiles or strips of the last step."""
    plan, projection = result.plan, result.projection
    last, number = plan.stages[-1], projection.tasks[-1]
    if plan.is_banded:
        pieces = f"{number} strips" if number > 1 else "one strip"
    else:
        height, width = last.tile_shape
        batch = f" in batches of {projection.batches[-1]}" if max(projection.batches[-1:], default=1) > 1 else ""
        pieces = f"{number} tiles of {width}x{height}{batch}" if number > 1 else "one tile"
    return f"{last.name} in {pieces}, {result.work:.2f} times the work of the whole image"


def _seconds(seconds: float) -> str:
    """A time for people, with two digits where it is short."""
    return clock(seconds) if seconds >= 60 else f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
