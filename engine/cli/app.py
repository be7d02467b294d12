"""The command line: parses, calls, prints, and turns errors into one line and an exit code.

Exit codes: 0 ok, 1 failed, 2 usage, 3 refused by the plan, 4 bad input, 130 interrupted (go on with --resume).
Results go to stdout, everything else to stderr. torch is imported inside the commands only, so that --help is quick.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, CycloptsError, Parameter

from engine.cli.options import Options as TrainingOptions
from engine.errors import EngineError, InputError, Interrupted, UsageError
from engine.plan.request import Request
from engine.version import __version__

app = App(
    name="engine",
    version=__version__,
    help="One photograph in, a seamless image of any size out, in bounded memory.",
    suppress_keyboard_interrupt=False,  # ``main`` says how to go on
    default_parameter=Parameter(negative_iterable=()),  # no --empty-sr beside --sr
)
model_app = App(name="model", help="Build model files.")
train_app = App(name="train", help="Train on one photograph.")
app.command(model_app)
app.command(train_app)

ModelPath = Annotated[Path | None, Parameter(help="A model file; by default the one that comes with the engine.")]
Flag = Annotated[bool, Parameter(negative=())]
JsonFlag = Annotated[bool, Parameter(negative=(), help="Print JSON instead of text.")]


@app.command
def render(
    model: ModelPath = None,
    /,
    *,
    out: Annotated[Path, Parameter(help="OME-Zarr store to write.")],
    request: Request = Request(),  # noqa: B008
    count: Annotated[int, Parameter(help="Render this many images, of consecutive seeds, as NAME-SEED.zarr.")] = 1,
    resume: Annotated[bool, Parameter(negative=(), help="Finish a store that was interrupted.")] = False,
    overwrite: Annotated[bool, Parameter(negative=(), help="Replace an existing store.")] = False,
    dry_run: Annotated[bool, Parameter(negative=(), help="Print the plan and stop.")] = False,
    json: JsonFlag = False,
    report: Annotated[Path | None, Parameter(help="Write plan, projection and measurements to this JSON file.")] = None,
) -> None:
    """Render a model (or a bare super-resolution checkpoint with --init) into an OME-Zarr store."""
    from engine.cli import render as run

    if count < 1:
        raise UsageError(f"--count {count}: must be at least 1")
    if resume and overwrite:
        raise UsageError("--resume and --overwrite exclude each other: one keeps what is there, the other replaces it")
    if count > 1 and (json or report is not None):
        raise UsageError("--json and --report describe one render: leave --count out")
    if dry_run and report is not None:
        raise UsageError("--report holds measurements, and --dry-run makes none: leave one of them out")
    replace(request, seed=request.seed + count - 1)  # the last seed is refused now, not after the other renders
    for seed in range(request.seed, request.seed + count):
        target = out if count == 1 else out.with_name(f"{out.stem}-{seed}{out.suffix}")
        run.render(_model(model), target, replace(request, seed=seed), resume, overwrite, dry_run, json, report)


@app.command
def plan(
    model: ModelPath = None,
    /,
    *,
    out: Annotated[Path, Parameter(help="Where the store would be written: decides the free disk.")] = Path("out.zarr"),
    request: Request = Request(),  # noqa: B008
    theory: Annotated[
        bool,
        Parameter(
            negative=(),
            help="Print instead the paper's account of memory (its Table 2) for this model, or, without one, for the paper's.",
        ),
    ] = False,
    report: Annotated[
        Path | None, Parameter(help="For --theory: the report of a run of this model; its peak is put beside.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Print what a render would do and cost: tiles, halos, memory, disk and time. Refuses like render."""
    if theory:
        from engine.cli import paper_memory

        if request != Request() or out != Path("out.zarr"):
            raise UsageError("--theory counts networks: of the other options only --report and --json apply to it")
        if report is not None and model is None:
            raise UsageError(
                f"--report {report}: needs the model of that run; engine plan MODEL --theory --report {report}"
            )
        paper_memory.print_account(model, report, as_json=json)
        return
    if report is not None:
        raise UsageError("--report belongs to --theory here; engine render --report writes one")
    from engine.cli import render as run

    run.render(_model(model), out, request, False, False, True, json, None)


@app.command
def probe(
    model: Path,
    /,
    *,
    image: Annotated[
        Path | None, Parameter(help="Measure on crops of this photograph instead of the model's own samples.")
    ] = None,
    save: Annotated[bool, Parameter(negative=(), help="Store the measurement in the model file.")] = False,
    plot: Annotated[Path | None, Parameter(help="Draw seam error against halo into this PNG or SVG.")] = None,
    device: Annotated[str | None, Parameter(help="cpu, cuda, ...")] = None,
    json: JsonFlag = False,
) -> None:
    """Measure each stage's receptive field and its seam error against the halo."""
    from engine.cli import model as run

    run.probe(model, image, save, plot, device, json)


@app.command
def info(model: ModelPath = None, /, *, json: JsonFlag = False) -> None:
    """Show what a model file holds: stages, parameters, halos, training, licences."""
    from engine.cli import model as run

    run.info(_model(model), json)


@app.command
def export(
    store: Path,
    out: Path,
    /,
    *,
    compression: Annotated[str | None, Parameter(help="TIFF: deflate (default), none, jpeg, ...")] = None,
    quality: Annotated[int | None, Parameter(help="JPEG and WebP quality, 1 to 100.")] = None,
    max_size: Annotated[
        int | None, Parameter(help="PNG, JPEG: reduce to at most this many pixels on the longer side.")
    ] = None,
    dpi: Annotated[float | None, Parameter(help="TIFF: dots per inch for print.")] = None,
    bigtiff: Annotated[
        bool | None, Parameter(help="TIFF: force or forbid BigTIFF; by default the size decides.")
    ] = None,
    overwrite: Annotated[bool, Parameter(negative=(), help="Replace an existing file.")] = False,
    allow_incomplete: Annotated[bool, Parameter(negative=(), help="Export a render that is not finished.")] = False,
    json: JsonFlag = False,
) -> None:
    """Export a store to pyramidal TIFF (.tif) or to a picture (.png, .jpg), in bounded memory."""
    from engine.cli import export as run

    run.export(store, out, json, compression=compression, quality=quality, max_size=max_size, dpi=dpi,
               bigtiff=bigtiff, overwrite=overwrite, allow_incomplete=allow_incomplete)  # fmt: skip


@app.command
def score(
    *images: Path,
    real: Annotated[
        Path | None, Parameter(name=["--real", "--against"], help="The photograph that the images are samples of.")
    ] = None,
    reference: Annotated[
        Path | None, Parameter(help="Instead: the picture that every image should equal; gives PSNR and SSIM.")
    ] = None,
    model: Annotated[Path | None, Parameter(help="Render the samples with this model, and score them.")] = None,
    samples: Annotated[int, Parameter(help="With --model: how many, of consecutive seeds; the paper takes 50.")] = 50,
    keep: Annotated[
        Path | None, Parameter(help="With --model: keep the samples' stores in this folder; found ones are used again.")
    ] = None,
    request: Request = Request(),  # noqa: B008
    metrics: Annotated[
        str,
        Parameter(
            help="What to compute with trained weights: available, free (nothing), all, or sifid,lpips; all but the first "
            "fail when a file of weights is missing. What needs no weights is always computed."
        ),
    ] = "available",
    weights_dir: Annotated[
        Path | None, Parameter(help="Folder of the weights; by default PyTorch's cache of downloaded models.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Score pictures, stores or folders of them against the photograph (SIFID, LPIPS and more) or against a reference."""
    from engine.cli import score as run

    run.check(images, real, reference, model, samples, keep, request)
    if reference is not None:
        run.reference(images, reference, json)
        return
    assert real is not None
    rendering = run.Rendering(model, samples, request, keep) if model is not None else None
    run.against(real, images, rendering, metrics, weights_dir, request.device, json)


@model_app.command
def build(
    *,
    out: Annotated[Path, Parameter(help="Model file to write.")],
    sr: Annotated[
        list[str],
        Parameter(
            help="Checkpoint of a stage (.safetensors, .pth, ncnn .param), a model whose stage of this place is taken, or realsr, "
            "x4plus; once per stage."
        ),
    ],
    structure: Annotated[
        Path | None, Parameter(help="Step 1: what engine train structure wrote, or a model whose step 1 is taken.")
    ] = None,
    sigma: Annotated[list[float] | None, Parameter(help="Input noise of a stage, of 1.0; once per stage.")] = None,
    licence: Annotated[str | None, Parameter(help="Licence of checkpoints that are given as files.")] = None,
    margin: Annotated[
        int | None,
        Parameter(
            help="So many pixels of step 1 along its sides are made and cut off, for they show what networks make of a border; "
            "8 by default, 0 as in the paper."
        ),
    ] = None,
    noise_gain: Annotated[
        list[float] | None,
        Parameter(
            help="How many times as loud as trained a stage's noise channels are: more is more fine texture; once per stage."
        ),
    ] = None,
) -> None:
    """Put a model file together from a structure file and super-resolution checkpoints."""
    from engine.cli import model as run

    run.build(out, structure, sr, sigma or [], licence, margin, noise_gain or [])


@train_app.command
def structure(
    photo: Path,
    /,
    *,
    out: Annotated[Path, Parameter(help="Structure file to write.")],
    preset: Annotated[
        Literal["quick", "quick-vgg", "paper"] | None,
        Parameter(help="quick, quick-vgg (default where VGG weights are) or paper; see engine train preset."),
    ] = None,
    config: Annotated[Path | None, Parameter(help="An edited preset as a TOML file, instead of --preset.")] = None,
    iterations: Annotated[
        list[int] | None,
        Parameter(
            help="Iterations of each scale, instead of the preset's: one number, or one for each.",
            consume_multiple=True,
        ),
    ] = None,
    padding: Annotated[
        str | None, Parameter(help="Border of the convolutions: zeros (the paper), reflect or replicate.")
    ] = None,
    coordinates: Annotated[
        bool | None, Parameter(help="Vertical coordinate convolution (off: the vanilla baseline).")
    ] = None,
    ema: Annotated[
        float | None, Parameter(help="Decay of the running mean of weights that is kept; 0: the last ones (the paper).")
    ] = None,
    vgg: Annotated[Path | None, Parameter(help="Weights of VGG-19 or VGG-16, torchvision's file.")] = None,
    device: Annotated[str | None, Parameter(help="cpu, cuda, ...; by default a GPU when there is one.")] = None,
    precision: Annotated[Literal["bf16", "fp16", "fp32"], Parameter(help="Precision of the convolutions.")] = "bf16",
    seed: Annotated[int, Parameter(help="Seed of the weights and the noise.")] = 0,
    resume: Annotated[bool, Parameter(negative=(), help="Go on from the last checkpoint, if there is one.")] = False,
    licence: Annotated[str, Parameter(help="Licence of the photograph, recorded in the file.")] = "",
    source: Annotated[str, Parameter(help="Author and origin of the photograph, recorded in the file.")] = "",
) -> None:
    """Train step 1 (HP-VAE-GAN with vertical coordinates) on one photograph."""
    from engine.cli import train as run

    run.structure(photo, out, preset, config, vgg, device, precision, seed, resume, licence, source,
                  iterations=iterations, padding=padding, coordinates=coordinates, ema=ema)  # fmt: skip


@train_app.default
def train(
    photo: Path,
    /,
    *,
    out: Annotated[Path, Parameter(help="Model file to write; work files stay in NAME.training beside it.")],
    options: TrainingOptions = TrainingOptions(),  # noqa: B008
    vgg: Annotated[Path | None, Parameter(help="Weights of VGG-19 or VGG-16, torchvision's file.")] = None,
    licence: Annotated[str, Parameter(help="Licence of the photograph, recorded in the file.")] = "",
    source: Annotated[str, Parameter(help="Author and origin of the photograph, recorded in the file.")] = "",
) -> None:
    """Train a whole model on one photograph: step 1, every super-resolution step, and the model file."""
    from engine.cli import train as run

    run.whole(photo, out, options, vgg=vgg, licence=licence, source=source)


@train_app.command
def sr(
    photo: Path,
    /,
    *,
    out: Annotated[Path, Parameter(help="Weights file to write (.safetensors, the community's tensor names).")],
    step: Annotated[Literal[2, 3, 4], Parameter(help="Which enlargement: to 1K, to 4K or to 16K.")] = 2,
    size: Annotated[
        int | None,
        Parameter(help="Width of the photograph in training; default: the step's output, or its own if far smaller."),
    ] = None,
    sigma: Annotated[float | None, Parameter(help="Input noise, of 1.0, in training and for the render.")] = None,
    structure: Annotated[Path | None, Parameter(help="Step 1: also train on what it and --previous make.")] = None,
    previous: Annotated[
        list[Path] | None, Parameter(help="Weights of a step below (or a model that has them), from step 2 on; repeat.")
    ] = None,
    options: TrainingOptions = TrainingOptions(),  # noqa: B008
    vgg: Annotated[Path | None, Parameter(help="Weights of VGG-19 or VGG-16, torchvision's file.")] = None,
    licence: Annotated[str, Parameter(help="Licence of the photograph, recorded in the file.")] = "",
    source: Annotated[str, Parameter(help="Author and origin of the photograph, recorded in the file.")] = "",
) -> None:
    """Fine-tune the super-resolution network of one step on one photograph."""
    from engine.cli import train as run

    run.sr(photo, out, options, sigma, step=step, width=size, structure=structure, previous=tuple(previous or ()),
           vgg=vgg, licence=licence, source=source)  # fmt: skip


@train_app.command
def distil(
    *photos: Path,
    out: Annotated[Path, Parameter(help="Weights file to write (.safetensors, the community's tensor names).")],
    teacher: Annotated[str, Parameter(help="The network to follow: realsr, x4plus, or a checkpoint file.")] = "realsr",
    options: TrainingOptions = TrainingOptions(),  # noqa: B008
) -> None:
    """Train a smaller network to do what a large one does, on photographs or folders of them."""
    from engine.cli import train as run

    run.distil(photos, out, options, teacher)


@train_app.command
def preset(name: str = "quick", /) -> None:
    """Print a preset (quick, quick-vgg, paper-esrgan, paper-swinir, distil) as TOML, to be edited and given to --config."""
    from engine.cli import train as run

    run.preset(name)


SPINS = 3000
"""How often a thread looks for work before it sleeps, about a tenth of a millisecond. GNU OpenMP's own 300,000 cost nothing on
a quiet machine; where another process shares the cores they made bands 15 to 25 times as slow (docs/log.md)."""


def _share_the_cores() -> None:
    """Read by the library when torch is loaded, so before that; what the user has set stays."""
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script: exits with the documented code."""
    _share_the_cores()
    try:
        try:
            app(arguments, exit_on_error=False, print_error=False)
        finally:
            sys.stdout.flush()  # here, where a pipe that was closed can still be caught
    except EngineError as error:
        _fail(error.for_command_line(), error.exit_code)
    except CycloptsError as error:
        _fail(_cause(error), UsageError.exit_code)
    except KeyboardInterrupt:
        _fail("stopped at once; --resume goes on from what was finished", Interrupted.exit_code)
    except MemoryError:
        _fail("out of memory; use a smaller --memory or --tile", EngineError.exit_code)
    except BrokenPipeError:
        # Whoever read our output has gone. Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(EngineError.exit_code) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        advice = "make room and go on with --resume" if error.errno == errno.ENOSPC else "choose another place"
        code = EngineError.exit_code if error.errno in (errno.ENOSPC, errno.EIO) else InputError.exit_code
        _fail(f"{where}{error.strerror or error}; {advice}", code)


def _model(given: Path | None) -> Path:
    if given is not None:
        return given
    from engine.model.bundle import DEFAULT

    return DEFAULT


def _cause(error: CycloptsError) -> str:
    """An error of ours that was raised while parsing says more than the parser's."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, EngineError):
            return cause.for_command_line()
        cause = cause.__cause__ or cause.__context__
    return f"{' '.join(str(error).split())} (see engine --help)"


def _fail(message: str, code: int) -> None:
    sys.stderr.write(f"engine: {' '.join(message.splitlines())}\n")
    raise SystemExit(code)
