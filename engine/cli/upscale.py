"""``engine upscale``: pictures, patterns and folders of pictures, one after the other, by one or several models.

One picture is a render as of ``engine render --init``. Of many, each is such a render: its own plan, store and resume. The
networks and the choice of their precision are shared, and a picture that fails takes nothing from the others.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from engine.cli import batch_report, report
from engine.cli.batch import Batch, Item
from engine.cli.file_pairs import check_sources_stay, find_pictures, is_one_picture, output_of, pairs_of
from engine.cli.options import Format
from engine.cli.outputs import check_inputs_stay
from engine.cli.render import Options, in_chain, interrupts, render
from engine.cli.working import Output, PictureOptions, request_digest
from engine.device.heap import fix_malloc_thresholds
from engine.errors import UsageError, option
from engine.exporters import check_options
from engine.io.files import sha256
from engine.io.objects import local_copy
from engine.model.build import chain
from engine.plan.request import PictureRequest


def upscale(
    names: Sequence[str],
    models: Sequence[Path],
    out: Path,
    suffix: Format | None,
    request: PictureRequest,
    options: Options,
) -> None:
    """Enlarge pictures; one picture is a render, several are a batch.

    Args:
        names: pictures, folders and patterns.
        models: models whose enlargements run one after the other.
        out: file of one picture, or folder.
        suffix: format of the files in a folder; None: PNG.
        request: options of every render.
        options: options of the command.

    Raises:
        PicturesFailed: some pictures of several failed.
        EngineError: as ``render`` does for one picture.
    """
    fix_malloc_thresholds()
    if is_one_picture(names):
        _one(Path(names[0]), models, output_of(Path(names[0]), out, suffix), request, options)
        return
    pairs = pairs_of(find_pictures(names), out, suffix)
    check_sources_stay(pairs, names, out)
    options = _for_outputs(pairs[0].output, options)
    for pair in pairs:
        check_inputs_stay("out", pair.output.path, models)
    start = time.perf_counter()
    with interrupts("interrupted before the first picture; nothing was written"):
        batch = Batch(models, [Item(pair, request.of(pair.source)) for pair in pairs], options)
        batch.survey()
    if options.dry_run and options.as_json:
        report.print_json(batch_report.plan_json(batch))
    elif not (options.as_json or options.quiet):
        batch_report.print_plan(batch, options.picture.dpi)
    if options.dry_run:
        return
    try:
        batch.run()
    finally:
        seconds = time.perf_counter() - start
        if options.as_json:
            report.print_json(batch_report.results_json(batch, seconds))
        else:
            batch_report.print_results(batch, seconds, quiet=options.quiet)


def _one(picture: Path, models: Sequence[Path], output: Output, request: PictureRequest, options: Options) -> None:
    """Enlarge one picture, as ``render`` does."""
    options = _for_outputs(output, options)
    one = request.of(picture)
    if options.resume and output.path.exists():
        model = chain(models)
        if output.is_result_of(
            request_digest(model, in_chain(one, model, models), options.picture, sha256(local_copy(picture)))
        ):
            output.forget_working_store()
            report.line(f"{output.path}: done before")
            return
    if not options.dry_run:
        output.check(resume=options.resume, overwrite=options.overwrite)
    render(models, output, one, replace(options, resume=options.resume and output.store.exists()))


def _for_outputs(output: Output, options: Options) -> Options:
    """The options for results of this kind. Raises UsageError for those that it lacks."""
    if output.is_picture:
        check_options(output.picture, options.picture.given)
        return options
    for name in ("quality", "compression"):
        if getattr(options.picture, name) is not None:
            raise UsageError(f"{option(name)}: does not apply to stores; leave it out, or give it to engine export")
    return replace(options, picture=PictureOptions())
