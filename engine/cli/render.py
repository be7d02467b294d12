"""engine render and engine plan."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from engine.cli import report
from engine.cli.progress import clock, log, meter
from engine.device.heap import fix_malloc_thresholds
from engine.device.memory import PeakMemory
from engine.errors import Interrupted
from engine.io.zarr_store import ZarrSink
from engine.job import Job
from engine.model.bundle import load
from engine.plan.cost import readable
from engine.plan.request import Request


def render(
    model: Path,
    out: Path,
    request: Request,
    resume: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    report_path: Path | None,
) -> None:
    """Plan, print the plan, render with progress, print what was measured."""
    if report_path is not None:
        report.check_place("--report", report_path)
    fix_malloc_thresholds()
    job = Job(load(model), request, out, log)
    if dry_run:
        _show_plan(job, as_json)
        job.check()
        return
    sink = job.open_sink(resume, overwrite)
    if not as_json:
        report.print_plan(job.plan, job.projection, job.budget, job.precision_error)
    measured = _run(job, sink)
    result = report.run_report(job.plan, job.projection, job.budget, job.precision_error, measured)
    if report_path is not None:
        report_path.write_text(json.dumps(result, indent=2) + "\n")
    if as_json:
        report.print_json(result)
    else:
        _show_result(job, measured)


def _show_plan(job: Job, as_json: bool) -> None:
    if as_json:
        report.print_json(report.plan_json(job.plan, job.projection, job.budget, job.precision_error))
    else:
        report.print_plan(job.plan, job.projection, job.budget, job.precision_error)


def _run(job: Job, sink: ZarrSink) -> dict[str, Any]:
    total = sum(job.projection.pixels)
    writes = compute = write = 0.0
    start = time.perf_counter()
    with PeakMemory(job.device) as peak, meter("rendering", total) as bar, _interruptible() as stopping:
        for done in job.run(sink, lambda stage, pixels: bar.advance(pixels, f"stage {stage + 1}")):
            writes += 1
            compute += done.compute_seconds
            write += done.write_seconds
            if stopping and not sink.complete and any(True for _ in sink.missing()):
                raise Interrupted(f"{job.out}: stopped after a whole shard; the same command with --resume goes on")
    return {
        "seconds": time.perf_counter() - start,
        "compute_seconds": compute,
        "write_seconds": write,
        "writes": int(writes),
        "host_peak": peak.host,
        "working_peak": peak.host - job.baseline,
        "device_peak": peak.device,
        "tiles_redone_in_fp32": job.redone,
        "cores": [stage.core for stage in job.executed],
        "seam_error_levels": job.seam_error,
    }


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """The first Ctrl-C (or SIGTERM) asks to stop after the shard in hand; the second stops at once."""
    requests: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if requests:
            raise KeyboardInterrupt
        requests.append(number)
        log("stopping after this shard; once more to stop at once")

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _show_result(job: Job, measured: dict[str, Any]) -> None:
    height, width = job.plan.size
    seam = job.seam_error
    error = "exact" if seam == 0 else "not measured" if seam is None else f"at most {seam:.2f} levels where measured"
    report.line(f"{job.out}: {width}x{height}, complete, {clock(measured['seconds'])}, seam error {error}")
    if job.precision_error is not None:
        report.line(f"precision {job.plan.precision}: {report.precision_text(job.precision_error)}")
    report.line(
        f"peak memory {readable(measured['host_peak'])} measured, {readable(job.projection.host)} projected, "
        f"{readable(job.budget.host)} allowed"
    )
    if job.budget.device is not None:
        report.line(
            f"peak device memory {readable(measured['device_peak'])} measured, {readable(job.projection.device)} projected, "
            f"{readable(job.budget.device)} allowed"
        )
    if job.redone:
        report.line(f"tiles redone in fp32: {job.redone}")
    if job.executed != job.plan.stages:
        cores = ", ".join(f"{cut.name} {cut.core}" for cut in job.executed)
        report.line(f"out of device memory: tiles smaller than planned ({cores} px)")
