"""``engine render`` and ``engine plan``: into a store, or through a working store into a picture."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from engine.cli import report
from engine.cli.outputs import check_inputs_stay, check_place
from engine.cli.progress import Estimate, by_count, clock, log, meter, part_of_meter, warn
from engine.cli.view import TellingMeter, beside
from engine.cli.working import Output, PictureOptions, look_command, render_store, request_digest, write_picture
from engine.device.choose import choose_device
from engine.device.heap import fix_malloc_thresholds
from engine.errors import Interrupted, UsageError, option
from engine.exporters import ExportResult, check_pixels, check_target
from engine.exporters.about import REQUEST
from engine.geometry import Box
from engine.interrupt import deferred_interrupt
from engine.io.files import write_text
from engine.io.objects import is_url, spelled
from engine.io.zarr_store import ZarrSink
from engine.job import Job
from engine.model.build import chain
from engine.model.bundle import DEFAULT, Model, load
from engine.plan.cost import readable
from engine.plan.parts import Part
from engine.plan.request import Request
from engine.preview import contact_sheet as write_contact_sheet
from engine.result import RenderResult
from engine.view.beside import Beside

SHEET_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
"""Formats of a contact sheet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of the command that decide no pixel."""

    resume: bool = False
    overwrite: bool = False
    accept_backend: bool = False
    keep_store: bool = False
    part: Part | None = None
    """Part to render, of all parts of the store."""
    view: bool = False
    """Show the store in the browser while it grows."""
    dry_run: bool = False
    as_json: bool = False
    report: Path | None = None
    quiet: bool = False
    verbose: bool = False
    shows_print: bool = False
    """Print the size on paper with the plan."""
    is_upscale: bool = False
    """The command is ``engine upscale``: the result records the request, so that the same command knows that it is done."""
    picture: PictureOptions = field(default_factory=PictureOptions)


def render(models: Sequence[Path], output: Output, request: Request, options: Options) -> None:
    """Plan, print the plan, render with progress, write the picture, print the result. ``dry_run``: stop after the plan.

    Args:
        models: the model, or several whose enlargements run one after the other.
        output: place of the result.
        request: options of the render.
        options: options of the command.
    """
    if options.report is not None:
        check_place("report", options.report)
        inputs = [*models, request.init, output.path, output.store]
        check_inputs_stay("report", options.report, inputs)
        if isinstance(output.store, Path) and options.report.resolve().is_relative_to(output.store.resolve()):
            raise UsageError(f"{option('report', options.report)}: lies in the store; name a file outside it")
    check_inputs_stay("out", output.path, [*models, request.init])
    fix_malloc_thresholds()
    start = time.perf_counter()
    with interrupts("interrupted before the render began; nothing was written"):
        if request.vram is not None and choose_device(request.device).type == "cpu":
            warn("--vram: there is no GPU to limit; --memory limits the memory of a CPU")
        model = chain(models)
        request = in_chain(request, model, models)
        job = Job.prepare(model, request, output.store, log)
        if output.is_picture:
            if not options.dry_run:
                check_target(output.picture, size=job.plan.size, overwrite=True)
            for note in check_pixels(output.picture, options.picture.given, job.plan.pixels):
                log(f"{output.path}: {note}")
        if options.dry_run:
            if options.part is not None:
                job.show_part(options.part)
            _print_plan(job, models, options)
            job.check()
            return
        words = resume_words(models, request, options)
        digest = None
        if options.is_upscale:
            digest = request_digest(model, request, options.picture, job.picture.digest if job.picture else None)
        sink = open_sink(job, output, options, words, digest)
    if not options.as_json:
        _print_plan(job, models, options)
    with interrupts("interrupted; continue with --resume"), beside(output.store, is_wanted=options.view) as viewer:
        result, picture = _run(job, sink, output, options, viewer)
        account = {
            "path": str(output.path),
            "store": None if output.is_picture and not options.keep_store else str(output.store),
            "picture": {**asdict(picture), "path": str(picture.path)} if picture else None,
            **report.run_report(result, job.measured),
        }
        if options.report is not None:
            write_text(options.report, json.dumps(account, indent=2) + "\n")
        if picture is not None and viewer is None:  # after the report: what fails until here is finished by a resume
            output.put_away(sink, keep=options.keep_store)
        if options.as_json:
            report.print_json(account)
        else:
            _print_result(job, result, output, picture, time.perf_counter() - start, options)
    if picture is not None and viewer is not None:  # which has shown the working store until now
        output.put_away(sink, keep=options.keep_store)


def contact_sheet(model: Path, out: Path, request: Request, count: int, *, overwrite: bool, quiet: bool) -> None:
    """Write a contact sheet of many seeds, and say how to render one of them."""
    if out.suffix.lower() not in SHEET_SUFFIXES:
        raise UsageError(f"{option('out', out)}: a contact sheet is a picture; use {', '.join(SHEET_SUFFIXES)}")
    check_target(out, overwrite=overwrite)
    check_inputs_stay("out", out, [model, request.init])
    with interrupts("interrupted; nothing was written"), meter("seeds", count) as bar:
        seeds = write_contact_sheet(
            load(model), request, out, count, on_seed=lambda seed: bar.advance(1, f"seed {seed}"), log=log
        )
    report.line(f"{out}: seeds {seeds[0]} to {seeds[-1]}, row by row")
    if not quiet:
        words = [*resume_words([model], replace(request, seed=seeds[-1])), "--out", f"seed-{seeds[-1]}.png"]
        report.line(f"render one of them: {shlex.join(words)}")


def resume_words(models: Sequence[Path], request: Request, options: Options | None = None) -> list[str]:
    """Words of the command that continues a store of this render, without its output.

    Paths are absolute: the command may be needed in another folder.
    """
    options = options or Options()
    names = [spelled(model) if model.exists() or is_url(model) else str(model) for model in models if model != DEFAULT]
    words = ["engine", "render", *names]
    skipped: tuple[str, ...] = ()
    if options.is_upscale:
        assert request.init is not None
        words = ["engine", "upscale", spelled(request.init)]
        words += [word for name in names for word in ("--model", name)]
        skipped = ("init", "stages")
    for name, value in options.picture.given.items():
        words += [f"--{name}", f"{value:g}" if isinstance(value, float) else str(value)]
    for entry in fields(Request):
        value = getattr(request, entry.name)
        if value == entry.default or entry.name in skipped:
            continue
        words.append(f"--{entry.name.replace('_', '-')}")
        if entry.name == "noise_gain":
            words.append(",".join(str(gain).removesuffix(".0") for gain in value))
        elif isinstance(value, tuple):  # a size or a tile
            words.append(f"{value[0]}x{value[1]}")
        elif isinstance(value, Box):
            words.append(f"{value.x0},{value.y0},{value.width},{value.height}")
        elif isinstance(value, Path):
            words.append(spelled(value))
        elif value is not True:
            words.append(f"{value}B" if entry.name in ("memory", "vram") else str(value))
    return words


def name_of(models: Sequence[Path]) -> str:
    """Name of a model, or of several in a chain, for people."""
    return " + ".join(model.stem for model in models)


def in_chain(request: Request, model: Model, models: Sequence[Path]) -> Request:
    """The request for a model of several models, all of which run, also where fewer would be large enough."""
    return request if len(models) == 1 else replace(request, stages=len(model.stages))


def open_sink(job: Job, output: Output, options: Options, command: Sequence[str], request: str | None) -> ZarrSink:
    """Make the store of a job, or with --resume open it.

    Args:
        job: planned render.
        output: place of its result.
        options: options of the command.
        command: words that continue the store.
        request: digest of the request, to be recorded; None to record none.

    Raises:
        EngineError: as ``Job.open_sink``.
    """
    notes = output.notes(command, request, overwrite=options.overwrite)
    if options.part is not None:
        return job.open_part(options.part, accept_backend=options.accept_backend, notes=notes)
    sink = job.open_sink(
        resume=options.resume, overwrite=options.overwrite, accept_backend=options.accept_backend, notes=notes
    )
    if request is not None and sink.provenance.get(REQUEST) != request:  # other options of the picture
        sink.note({REQUEST: request})
    return sink


def _run(
    job: Job, sink: ZarrSink, output: Output, options: Options, viewer: Beside | None
) -> tuple[RenderResult, ExportResult | None]:
    """Render with progress, which begins with what earlier runs wrote, then write the picture."""
    before = 1 - sum(box.area for box in sink.missing()) / max(sink.area, 1)
    bar = meter("rendering", 1.0, done=before, forecast=job.projection.seconds)
    with bar as running, deferred_interrupt(say_stopping) as stop:
        if viewer is not None:
            running = TellingMeter(running, viewer, Estimate(1.0, before, job.projection.seconds))
        move = part_of_meter(running, 1 - before)
        result = render_store(job, sink, lambda p: move(p.share, f"step {p.step}"), stop.is_set)
    if not output.is_picture:
        return result, None
    with meter(f"writing {output.path.name}", 1.0) as running:
        return result, write_picture(sink, output, options.picture, by_count(running))


@contextmanager
def interrupts(message: str) -> Iterator[None]:
    """Turn Ctrl-C into one line that is true at this point."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(message) from error


def say_stopping() -> None:
    log("stopping after this shard; press Ctrl-C again to stop at once")


def _print_plan(job: Job, models: Sequence[Path], options: Options) -> None:
    if options.as_json:
        account = report.plan_json(job.plan, job.projection, job.measured)
        if options.part is not None:
            account["part"] = report.part_json(job.plan, job.measured, options.part)
        report.print_json(account)
    elif not options.quiet:
        picture = (job.request.init, job.picture.size) if job.request.init and job.picture else None
        name = name_of(models)
        report.print_plan(job.plan, job.projection, job.measured, model=name, picture=picture, verbose=options.verbose)
        if options.part is not None:
            report.print_part(job.plan, job.measured, options.part)
        if options.shows_print or options.verbose:
            dpi = job.picture.dpi if job.picture is not None else None
            report.print_on_paper(job.plan.size, options.picture.dpi or (dpi and dpi[0]))
        elif job.plan.wrap == "both":
            report.print_material(job.plan.size, repeats=True)


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
    part = "" if options.part is None else f"part {options.part} of "
    report.line(
        f"{output.path}: {part}{size}, in {clock(seconds if picture else measured.seconds)}, "
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
    if options.part is not None:
        if not options.quiet:
            report.line(f"when all parts are rendered: {shlex.join(['engine', 'finish', str(output.path)])}")
    elif not options.quiet:
        report.line(
            f"look at it: {shlex.quote(str(output.path)) if picture else look_command(output.path, width, height)}"
        )
