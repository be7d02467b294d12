"""``engine render --dask`` and ``--devices``: a render by workers, with progress over all of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from engine.cli import report
from engine.cli.outputs import check_inputs_stay, check_place
from engine.cli.progress import clock, log, meter, part_of_meter
from engine.cli.render import Options, interrupts, name_of, resume_words, say_stopping
from engine.cli.working import Output, look_command
from engine.errors import counted
from engine.interrupt import deferred_interrupt
from engine.io.files import write_text
from engine.plan.request import Request
from engine.workers.cluster import connected, parse_devices
from engine.workers.conduct import Conductor
from engine.workers.render import WorkersRender


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """Workers as the command line names them."""

    dask: str | None
    devices: str | None
    shares: int | None

    @contextmanager
    def conductor(self, memory: int | None) -> Iterator[Conductor]:
        """Connect to the workers, and say which these are. Raises UsageError when there are none."""
        devices = parse_devices(self.devices) if self.devices else ()
        with connected(self.dask, devices, memory) as client, closing(Conductor(client, log)) as conductor:
            dashboard = f", dashboard {client.dashboard_link}" if find_spec("bokeh") else ""  # without, it has no pages
            log(f"{counted(len(conductor.workers()), 'worker')} at {client.scheduler.address}{dashboard}")
            yield conductor


def render(model: Path, output: Output, request: Request, options: Options, workers: Workers) -> None:
    """Let workers plan the render, print the plan, render with progress and finish the store.

    Args:
        model: the model.
        output: the store.
        request: options of the render.
        options: options of the command.
        workers: the workers.
    """
    if options.report is not None:
        check_place("report", options.report)
        check_inputs_stay("report", options.report, [model, request.init, output.path])
    check_inputs_stay("out", output.path, [model, request.init])
    with (
        interrupts("interrupted; continue with the same command"),
        deferred_interrupt(say_stopping) as stop,
        workers.conductor(request.memory) as conductor,
    ):
        words = resume_words([model], request, options)
        run = WorkersRender.begin(
            conductor,
            model,
            request,
            output.store,
            shares=workers.shares,
            accept_backend=options.accept_backend,
            notes=output.notes(words, None, overwrite=False),
            cancelled=stop.is_set,
        )
        if not (options.quiet or options.as_json):
            _print_plan(run, model, request, options)
        before = run.done
        with meter("rendering", 1.0, done=before, forecast=run.seconds) as bar:
            move = part_of_meter(bar, 1 - before)
            result = run.run(on_progress=lambda p: move(p.share, ""), cancelled=stop.is_set)
    account = {"path": str(output.path), "store": str(output.store), "picture": None}
    account |= report.run_report(result, run.begun.measured)
    if options.report is not None:
        write_text(options.report, json.dumps(account, indent=2) + "\n")
    if options.as_json:
        report.print_json(account)
        return
    height, width = result.plan.size
    measured = result.measurements
    if not measured.writes:
        report.line(f"{output.path}: {width}x{height}, complete")
        return
    report.line(
        f"{output.path}: {width}x{height}, in {clock(measured.seconds)}, seam error "
        f"{report.seam_text(measured.seam_error_levels)}, peak memory of a worker "
        f"{report.part_of(measured.host_peak, run.begun.measured.budget.host)}"
    )
    if not options.quiet:
        report.line(f"look at it: {look_command(output.path, width, height)}")


def _print_plan(run: WorkersRender, model: Path, request: Request, options: Options) -> None:
    begun = run.begun
    picture = (request.init, begun.picture) if request.init and begun.picture else None
    report.print_plan(
        begun.plan, begun.projection, begun.measured, model=name_of([model]), picture=picture, verbose=options.verbose
    )
    more = begun.shares.overhead(begun.plan, begun.measured)
    left = sum(1 for seconds in begun.seconds if seconds)
    report.line(
        f"{counted(begun.shares.count, 'share')} for {counted(run.workers, 'worker')}, {left} to render; together they take "
        f"{100 * more:.1f} % more time of the networks than one run"
    )
