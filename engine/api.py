"""``engine.render``: a render in one call, in this process or on workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Unpack

from engine.errors import UsageError, option
from engine.io.array import Picture, picture_file
from engine.io.objects import as_place
from engine.job import Job, Log
from engine.model.bundle import Model
from engine.plan.parts import Part, parse_part
from engine.plan.request import RenderOptions, Request
from engine.result import Progress, RenderResult
from engine.workers import check_workers


def render(
    model: Model | Path | str | None,
    out: Path | str,
    *,
    init: Picture | None = None,
    resume: bool = False,
    overwrite: bool = False,
    accept_backend: bool = False,
    part: Part | str | None = None,
    dask: str | None = None,
    devices: Sequence[str] | str = (),
    shares: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    log: Log | None = None,
    **options: Unpack[RenderOptions],
) -> RenderResult:
    """Plan a render and run it, into an OME-Zarr store.

    Args:
        model: a loaded model, a model file, or with ``init`` a super-resolution checkpoint, ``realsr`` or ``x4plus``. None: the
            model that comes with the engine, or ``realsr`` with ``init``.
        out: store to write: a folder, or a URL (s3://, gs://, az://; extra ``cloud``).
        init: picture to enlarge, in place of step 1: a file, or an array of uint8, uint16 or float32 in sRGB,
            [height, width] or [height, width, channels], with 1 to 4 channels: grey or RGB, then alpha.
        resume: finish a store that was interrupted; a missing store is begun.
        overwrite: replace an existing store.
        accept_backend: with ``resume``, finish a store that was begun with other instructions or another number of threads,
            whose pixels are rounded in another way.
        part: part to render, such as ``"2/4"``. Other processes render the others into the same store, and then
            ``engine.finish`` completes it. A part is resumed by rendering it again.
        dask: workers to render on: the address of a Dask scheduler or its file, ``local``, ``local:4``, or ``auto`` for the
            scheduler of DASK_SCHEDULER_ADDRESS (extra ``dask``). They see the model, the picture and the store under the
            same paths. The store is finished in the end; the same call continues one that was stopped.
        devices: devices of this machine to render on, a process each: ``"0,1"``, ``"cuda:0,cuda:1"`` or a list.
        shares: number of shares for the workers; by default few for each, as bands repeat work at a cut.
        on_progress: called with a ``Progress`` after each tile or band: ``done`` of ``total``.
        cancelled: asked after each write; True stops the render.
        log: receives a line before each measurement.
        **options: options of ``Request``: ``size="4096x3072"`` or ``(4096, 3072)``, ``seed``, ``roi``, ...

    Raises:
        UsageError: an option is wrong or contradicts another one.
        InputError: the model, the picture or the store cannot be used (ModelError, ResumeError).
        BudgetError: the plan does not fit the memory or the disk.
        RenderError: a network produced NaN or infinity.
        Interrupted: ``cancelled`` returned True; ``resume=True`` continues.
    """
    if resume and overwrite:
        raise UsageError(
            f"{option('resume', True)}: excludes {option('overwrite', True)}, which replaces the store; leave one out"
        )
    if part is not None and overwrite:
        raise UsageError(
            f"{option('part')}: excludes {option('overwrite', True)}, as parts share a store; remove the old one first"
        )
    part = None if part is None else parse_part(part)  # before anything is measured
    if dask is not None or devices:
        check_workers(dask, devices, shares, part=part, overwrite=overwrite, device=options.get("device"))
        from engine.workers.cluster import connected, parse_devices
        from engine.workers.conduct import Conductor
        from engine.workers.render import WorkersRender

        names = parse_devices(devices if isinstance(devices, str) else ",".join(devices)) if devices else ()
        path = model.path if isinstance(model, Model) else model
        with picture_file(init) as picture:
            request, stop = Request(init=picture, **options), cancelled or (lambda: False)
            with (
                connected(dask, names, request.memory) as client,
                closing(Conductor(client, log or _ignore)) as conductor,
            ):
                run = WorkersRender.begin(
                    conductor,
                    path,
                    request,
                    as_place(out),
                    shares=shares,
                    accept_backend=accept_backend,
                    cancelled=stop,
                )
                return run.run(on_progress=on_progress or _ignore, cancelled=stop)
    with picture_file(init) as picture:
        job = Job.prepare(model, Request(init=picture, **options), out, log)
        sink = (
            job.open_sink(resume=resume, overwrite=overwrite, accept_backend=accept_backend)
            if part is None
            else job.open_part(part, accept_backend=accept_backend)
        )
        return job.render(sink, on_progress=on_progress, cancelled=cancelled)


def _ignore(_: object) -> None:
    """Progress or a line without a reader."""
