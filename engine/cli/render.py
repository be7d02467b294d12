"""``engine render`` and ``engine plan``."""

from __future__ import annotations

import json
import signal
from pathlib import Path

from engine.cli import report
from engine.cli.progress import clock, log, meter
from engine.device.heap import fix_malloc_thresholds
from engine.interrupt import deferred_interrupt
from engine.job import Job, Progress, RenderResult
from engine.model.bundle import load
from engine.plan.cost import readable
from engine.plan.request import Request

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def render(
    model: Path,
    out: Path,
    request: Request,
    *,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    as_json: bool = False,
    report_path: Path | None = None,
) -> None:
    """Plan, print the plan, render with progress, print measurements. ``dry_run``: stop after the plan."""
    if report_path is not None:
        report.check_place("report", report_path)
    fix_malloc_thresholds()
    job = Job.prepare(load(model), request, out, log)
    if dry_run:
        if as_json:
            report.print_json(report.plan_json(job.plan, job.projection, job.measured))
        else:
            report.print_plan(job.plan, job.projection, job.measured)
        job.check()
        return
    sink = job.open_sink(resume=resume, overwrite=overwrite)
    if not as_json:
        report.print_plan(job.plan, job.projection, job.measured)
    with meter("rendering", sum(job.projection.lr_pixels)) as bar, deferred_interrupt(_SIGNALS, _say_stopping) as stop:
        done = 0

        def advance(progress: Progress) -> None:
            nonlocal done
            bar.advance(progress.done - done, f"step {progress.step}")
            done = progress.done

        result = job.render(sink, on_progress=advance, cancelled=stop.is_set)
    account = report.run_report(result, job.measured)
    if report_path is not None:
        report_path.write_text(json.dumps(account, indent=2) + "\n")
    if as_json:
        report.print_json(account)
    else:
        _print_result(job, result)


def _say_stopping() -> None:
    log("stopping after this shard; press Ctrl-C again to stop at once")


def _print_result(job: Job, result: RenderResult) -> None:
    measured, budget = result.measurements, job.measured.budget
    height, width = result.plan.size
    seam = report.seam_text(measured.seam_error_levels)
    report.line(f"{result.path}: {width}x{height}, complete, {clock(measured.seconds)}, seam error {seam}")
    if job.measured.precision_error is not None:
        report.line(f"precision {result.plan.precision}: {report.precision_text(job.measured.precision_error)}")
    report.line(
        f"peak memory {readable(measured.host_peak)} measured, {readable(result.projection.host)} projected, "
        f"{readable(budget.host)} allowed"
    )
    if budget.device is not None:
        report.line(
            f"peak device memory {readable(measured.device_peak)} measured, {readable(result.projection.device)} "
            f"projected, {readable(budget.device)} allowed"
        )
    if measured.tiles_redone_in_fp32:
        report.line(f"tiles redone in fp32: {measured.tiles_redone_in_fp32}")
    if job.cuts != result.plan.stages:
        tiles = ", ".join(f"{cut.name} {cut.tile}" for cut in job.cuts)
        report.line(f"out of device memory: tiles smaller than planned ({tiles} px)")
