"""``engine render`` and ``engine plan``: into a store, or through a working store into a picture."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from engine.causes import naming
from engine.cli import report
from engine.cli.export import write_picture
from engine.cli.outputs import check_inputs_stay, check_place
from engine.cli.progress import clock, log, meter, warn
from engine.device.choose import choose_device
from engine.device.heap import fix_malloc_thresholds
from engine.errors import Interrupted, ResumeError, UsageError, option
from engine.exporters import ExportResult, check_target, names_picture
from engine.geometry import Box
from engine.interrupt import deferred_interrupt
from engine.io.files import write_text
from engine.io.zarr_store import COMMAND, ZarrSink, check_absent, remove_store, stored_provenance
from engine.job import Job, Progress, RenderResult
from engine.model.bundle import DEFAULT, load
from engine.plan.cost import readable
from engine.plan.request import Request
from engine.preview import contact_sheet as write_contact_sheet

PICTURE = "picture"
"""Entry of a working store's provenance: the name of its picture, and whether an existing one may be replaced."""

SHEET_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
"""Formats of a contact sheet."""

_SHOWN = 2000
"""Longer side of the picture that is suggested for looking at a store, in pixels."""


@dataclass(frozen=True, slots=True)
class Output:
    """Place of a render's result."""

    path: Path
    """Store, or picture, that the user named."""

    @property
    def is_picture(self) -> bool:
        """Whether the name is a picture's."""
        return names_picture(self.path)

    @property
    def store(self) -> Path:
        """Store that the render writes: a working store beside a picture, under a name that nobody chooses."""
        return self.path.with_name(self.path.name + ".work.zarr") if self.is_picture else self.path

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Refuse an output that exists, before any work.

        Raises:
            ResumeError: the store exists, or the working store belongs to something else.
            InputError: the picture exists or cannot be made.
        """
        if not self.is_picture:
            if not (resume or overwrite):
                check_absent(self.path)
            return
        note: dict[str, Any] = (stored_provenance(self.store) or {}).get(PICTURE) or {}
        is_ours = note.get("name") == self.path.name
        may_replace = overwrite or (resume and is_ours and bool(note.get("overwrite")))
        check_target(self.path, overwrite=may_replace)
        if not self.store.exists():
            return
        if not is_ours:
            raise ResumeError(f"{self.store}: in the way, and not from a render of {self.path.name}; move it")
        if not (resume or overwrite):
            raise ResumeError(
                f"{self.path}: an unfinished render is in {self.store.name}; give {option('resume', True)} to finish it, "
                f"or {option('overwrite', True)} to begin again"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of the command that decide no pixel."""

    resume: bool = False
    overwrite: bool = False
    accept_backend: bool = False
    keep_store: bool = False
    dry_run: bool = False
    as_json: bool = False
    report: Path | None = None
    quiet: bool = False
    verbose: bool = False


def render(model: Path, output: Output, request: Request, options: Options) -> None:
    """Plan, print the plan, render with progress, write the picture, print the result. ``dry_run``: stop after the plan."""
    if options.report is not None:
        check_place("report", options.report)
        inputs = [model, request.init, output.path, output.store]
        check_inputs_stay("report", options.report, inputs)
        if options.report.resolve().is_relative_to(output.store.resolve()):
            raise UsageError(f"{option('report', options.report)}: lies in the store; name a file outside it")
    check_inputs_stay("out", output.path, [model, request.init])
    fix_malloc_thresholds()
    start = time.perf_counter()
    with _interrupts("interrupted before the render began; nothing was written"):
        if request.vram is not None and choose_device(request.device).type == "cpu":
            warn("--vram: there is no GPU to limit; --memory limits the memory of a CPU")
        job = Job.prepare(load(model), request, output.store, log)
        if not (options.dry_run or not output.is_picture):
            check_target(output.path, size=job.plan.size, overwrite=True)
        if options.dry_run:
            _print_plan(job, model.stem, options)
            job.check()
            return
        notes: dict[str, Any] = {COMMAND: resume_words(model, request)}
        if output.is_picture:
            notes[PICTURE] = {"name": output.path.name, "overwrite": options.overwrite}
        sink = job.open_sink(
            resume=options.resume, overwrite=options.overwrite, accept_backend=options.accept_backend, notes=notes
        )
    if not options.as_json:
        _print_plan(job, model.stem, options)
    with _interrupts("interrupted; continue with --resume"):
        result = _run(job, sink)
        picture = None
        if output.is_picture:
            picture = write_picture(output.store, output.path, overwrite=True)
            if options.keep_store:
                sink.note({PICTURE: {"name": output.path.name, "overwrite": False}})
            else:
                _remove_working_store(output.store)
    account = {
        "path": str(output.path),
        "store": None if output.is_picture and not options.keep_store else str(output.store),
        "picture": {**asdict(picture), "path": str(picture.path)} if picture else None,
        **report.run_report(result, job.measured),
    }
    if options.report is not None:
        write_text(options.report, json.dumps(account, indent=2) + "\n")
    if options.as_json:
        report.print_json(account)
    else:
        _print_result(job, result, output, picture, time.perf_counter() - start, options)


def contact_sheet(model: Path, out: Path, request: Request, count: int, *, overwrite: bool, quiet: bool) -> None:
    """Write a contact sheet of many seeds, and say how to render one of them."""
    if out.suffix.lower() not in SHEET_SUFFIXES:
        raise UsageError(f"{option('out', out)}: a contact sheet is a picture; use {', '.join(SHEET_SUFFIXES)}")
    check_target(out, overwrite=overwrite)
    check_inputs_stay("out", out, [model, request.init])
    with _interrupts("interrupted; nothing was written"), meter("seeds", count) as bar:
        seeds = write_contact_sheet(
            load(model), request, out, count, on_seed=lambda seed: bar.advance(1, f"seed {seed}"), log=log
        )
    report.line(f"{out}: seeds {seeds[0]} to {seeds[-1]}, row by row")
    if not quiet:
        words = [*resume_words(model, replace(request, seed=seeds[-1])), "--out", f"seed-{seeds[-1]}.png"]
        report.line(f"render one of them: {shlex.join(words)}")


def resume_words(model: Path, request: Request) -> list[str]:
    """Words of the command that continues a store of this render, without its output.

    Paths are absolute: the command may be needed in another folder.
    """
    words = ["engine", "render"]
    if model != DEFAULT:
        words.append(str(model.absolute() if model.exists() else model))
    for field in fields(Request):
        value = getattr(request, field.name)
        if value == field.default:
            continue
        words.append(f"--{field.name.replace('_', '-')}")
        if isinstance(value, tuple):  # a size or a tile
            words.append(f"{value[0]}x{value[1]}")
        elif isinstance(value, Box):
            words.append(f"{value.x0},{value.y0},{value.width},{value.height}")
        elif isinstance(value, Path):
            words.append(str(value.absolute()))
        elif value is not True:
            words.append(f"{value}B" if field.name in ("memory", "vram") else str(value))
    return words


def _run(job: Job, sink: ZarrSink) -> RenderResult:
    """Render with progress, which begins with what earlier runs wrote."""
    height, width = job.plan.size
    before = 1 - sum(box.area for box in sink.missing()) / (height * width)
    bar = meter("rendering", 1.0, done=before, forecast=job.projection.seconds)
    with bar as running, deferred_interrupt(_say_stopping) as stop:
        share = 0.0

        def advance(progress: Progress) -> None:
            nonlocal share
            running.advance((progress.share - share) * (1 - before), f"step {progress.step}")
            share = progress.share

        with naming(job.out):
            return job.render(sink, on_progress=advance, cancelled=stop.is_set)


@contextmanager
def _interrupts(message: str) -> Iterator[None]:
    """Turn Ctrl-C into one line that is true at this point."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(message) from error


def _say_stopping() -> None:
    log("stopping after this shard; press Ctrl-C again to stop at once")


def _print_plan(job: Job, model: str, options: Options) -> None:
    if options.as_json:
        report.print_json(report.plan_json(job.plan, job.projection, job.measured))
    elif not options.quiet:
        picture = (job.request.init, job.picture.size) if job.request.init and job.picture else None
        report.print_plan(job.plan, job.projection, job.measured, model=model, picture=picture, verbose=options.verbose)


def _remove_working_store(store: Path) -> None:
    """Remove the store of a picture that is written: a failure takes nothing from the picture."""
    try:
        remove_store(store)
    except OSError as error:
        left = error.filename or store
        warn(f"{left}: the picture is written, but this store cannot be removed ({error.strerror}); remove it")


def _print_result(
    job: Job,
    result: RenderResult,
    output: Output,
    picture: ExportResult | None,
    seconds: float,
    options: Options,
) -> None:
    measured, budget = result.measurements, job.measured.budget
    height, width = result.plan.size
    size = f"{width}x{height}" + (f", {report.file_size(picture.bytes)}" if picture else "")
    report.line(
        f"{output.path}: {size}, in {clock(seconds if picture else measured.seconds)}, "
        f"seam error {report.seam_text(measured.seam_error_levels)}, peak memory "
        f"{report.part_of(measured.host_peak, budget.host)}"
    )
    if job.cuts != result.plan.stages:
        tiles = ", ".join(f"{cut.name} {cut.core_text}" for cut in job.cuts)
        change = "strips narrower" if result.plan.is_banded else "tiles smaller"
        warn(f"out of device memory: {change} than planned ({tiles} px)")
    if options.verbose:
        if job.measured.precision_error is not None:
            report.line(f"precision {result.plan.precision}: {report.precision_text(job.measured.precision_error)}")
        report.line(f"memory planned {readable(result.projection.host)}, measured {readable(measured.host_peak)}")
        if budget.device is not None:
            report.line(
                f"device memory planned {report.device_text(result.projection)}, measured "
                f"{readable(measured.device_peak)}, of {readable(budget.device)}"
            )
        if measured.tiles_redone_in_fp32:
            parts = "rows of shards" if result.plan.is_banded else "tiles"
            report.line(f"{parts} computed again in fp32: {measured.tiles_redone_in_fp32}")
    if not options.quiet:
        report.line(
            f"look at it: {shlex.quote(str(output.path)) if picture else look_command(output.path, width, height)}"
        )


def look_command(store: Path, width: int, height: int) -> str:
    """Command that makes a small picture of a store."""
    words: Sequence[str] = ["engine", "export", str(store), str(store.with_suffix(".jpg"))]
    limit = ["--max-size", str(_SHOWN)] if max(width, height) > _SHOWN else []
    return shlex.join([*words, *limit])
