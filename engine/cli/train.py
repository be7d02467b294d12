"""engine train, engine train structure, engine train sr, engine train distil and engine train preset."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.archs.hpvaegan import BASE_WIDTH
from engine.cli import report
from engine.cli.options import Options
from engine.cli.progress import clock, log, meter
from engine.device.choose import choose_device
from engine.device.heap import fix_malloc_thresholds
from engine.device.precision import Precision
from engine.errors import UsageError
from engine.io.photo import open_photo
from engine.model.bundle import load
from engine.training.losses.vgg import find_vgg
from engine.training.preset import Preset, preset_text, read_file, read_preset
from engine.training.run.events import (
    Event,
    IterationDone,
    Prepared,
    Reviewed,
    ScaleFinished,
    ScaleStarted,
    TrainingFinished,
    TrainingStarted,
)
from engine.training.run.tensorboard import writer
from engine.training.sr.distil import Request as DistilRequest
from engine.training.sr.distil import distil as follow
from engine.training.sr.networks import Shape, architecture_of
from engine.training.sr.train import Request as StepRequest
from engine.training.sr.train import Runtime, train_sr
from engine.training.sr.trainer import feature_layers
from engine.training.structure.train import train_structure
from engine.training.train import Request as WholeRequest
from engine.training.train import train_model, trained_steps

PAPER = "paper-esrgan"
"""Step 1 is the same in both of the paper's."""


def structure(
    photo: Path,
    out: Path,
    preset: str | None,
    config: Path | None,
    vgg: Path | None,
    device: str | None,
    precision: Precision,
    seed: int,
    resume: bool,
    licence: str,
    source: str,
    **changes: Any,  # noqa: ANN401 (as checked by StructureRecipe)
) -> None:
    """Train step 1 with progress and an ETA, and say what was written. ``changes``: of the preset, None for its own value."""
    default = _quick(vgg)
    recipe = _read(preset, config, default, lambda: PAPER).structure
    if recipe is None:
        raise UsageError(f"{config or preset}: has no table [structure]; take quick or paper, or add the table")
    recipe = replace(recipe, **{name: value for name, value in changes.items() if value is not None})
    open_photo(photo, BASE_WIDTH)  # what is wrong with it is said alone
    _say_default(preset, config, default)
    fix_malloc_thresholds()
    with meter("training", 1.0) as bar:
        train_structure(
            photo, out, **recipe.run(), vgg=vgg, device=str(choose_device(device)), precision=precision, seed=seed, resume=resume,
            licence=licence, source=source, on_event=_Shown(bar.advance),
        )  # fmt: skip
    report.line(
        f"{out}: {out.stat().st_size / 1e6:.1f} MB; put a model together with engine model build --structure {out}"
    )


def whole(photo: Path, out: Path, options: Options, *, vgg: Path | None, licence: str, source: str) -> None:
    """Train every part with progress, write the model and show it."""
    width = open_photo(photo).width  # what is wrong with it is said alone
    request = WholeRequest(
        preset=_preset(options, _quick(vgg)), start=options.start, shape=_shape(options), vgg=vgg, precision=options.precision,
        seed=options.seed, licence=licence, source=source,
    )  # fmt: skip
    parts = ["step 1", *(f"step {step}" for step in trained_steps(width))]
    with meter("training", 1.0) as bar:
        folder = train_model(photo, out, request, _runtime(options, bar.advance, parts))
    report.print_model(load(out))
    log(f"the parts, their logs and samples are kept in {folder}")


def sr(
    photo: Path,
    out: Path,
    options: Options,
    sigma: float | None,
    *,
    step: int,
    vgg: Path | None,
    **wanted: Any,  # noqa: ANN401 (as checked by StepRequest)
) -> None:
    """Fine-tune one step with progress and an ETA, and say what was written."""
    open_photo(photo, least_width=1)
    recipe = _preset(options, _quick(vgg)).step(step)
    if sigma is not None:
        recipe = recipe.replace(sigma=sigma, render_sigma=sigma)
    request = StepRequest(
        recipe=recipe,
        step=step,
        start=options.start,
        shape=_shape(options),
        precision=options.precision,
        seed=options.seed,
        vgg=vgg,
        **wanted,
    )
    with meter("training", 1.0) as bar:
        train_sr(photo, out, request, _runtime(options, bar.advance))
    _say_written(out)


def distil(photos: Sequence[Path], out: Path, options: Options, teacher: str) -> None:
    """Follow a teacher with progress and an ETA, and say what was written."""
    request = DistilRequest(
        recipe=_preset(options, "distil").sr, teacher=teacher, start=options.start, shape=_shape(options),
        precision=options.precision, seed=options.seed,
    )  # fmt: skip
    with meter("training", 1.0) as bar:
        follow(photos, out, request, _runtime(options, bar.advance))
    _say_written(out)


def preset(name: str) -> None:
    """Print a preset."""
    report.line(preset_text(name).rstrip())


def _say_written(out: Path) -> None:
    report.line(f"{out}: {out.stat().st_size / 1e6:.1f} MB; put a model together with engine model build --sr {out}")


def _quick(vgg: Path | None) -> str:
    """The better of the quick presets for which everything is there."""
    return "quick-vgg" if vgg is not None or find_vgg(feature_layers(read_preset("quick-vgg").sr)) else "quick"


def _preset(options: Options, default: str) -> Preset:
    """A preset or a file, with what was asked for on the command line in place of its values."""
    shape = _shape(options)
    _say_default(options.preset, options.config, default)
    found = _read(options.preset, options.config, default, lambda: f"paper-{architecture_of(options.start, shape)}")
    return found if options.iterations is None else found.replace(iterations=options.iterations)


def _read(preset: str | None, config: Path | None, default: str, paper: Callable[[], str]) -> Preset:
    """A preset by name, the file in its place, or the default. ``paper``: which of the paper's is meant."""
    if config is not None:
        if preset is not None:
            raise UsageError("--preset and --config exclude each other: a file is a whole preset")
        return read_file(config)
    return read_preset(paper() if preset == "paper" else preset or default)


def _say_default(preset: str | None, config: Path | None, default: str) -> None:
    if preset is None and config is None:
        log(f"preset {default}" + (": better texture with VGG weights, --vgg FILE" if default == "quick" else ""))


def _shape(options: Options) -> Shape:
    return Shape(options.architecture, options.channels, options.blocks)


def _runtime(options: Options, advance: Callable[[float, str], None], parts: Sequence[str] = ()) -> Runtime:
    fix_malloc_thresholds()
    device = choose_device(options.device)
    shown, board = _Shown(advance, parts), writer(options.tensorboard) if options.tensorboard is not None else None

    def on_event(event: Event) -> None:
        shown(event)
        if board is not None:
            board(event)

    budget = options.memory if device.type == "cpu" else options.vram
    return Runtime(device=str(device), resume=options.resume, budget=budget, on_event=on_event, log=log)


class _Shown:
    """Turns training events into words and progress; the bar's unit is the share of estimated time, part by part."""

    def __init__(self, advance: Callable[[float, str], None], parts: Sequence[str] = ()) -> None:
        self._advance, self._parts = advance, list(parts)
        self._spent = self._share = 0.0
        self._part = 0

    def _begin(self, name: str) -> None:
        """A part of a longer run; a run of one part has no names."""
        if name in self._parts:
            self._part, self._spent = self._parts.index(name), 0.0

    def _progress(self, event: IterationDone) -> None:
        self._spent += event.seconds
        share = (self._part + self._spent / max(self._spent + event.eta, 1e-9)) / max(1, len(self._parts))
        self._advance(max(0.0, share - self._share), f"{event.iteration}/{event.total}, {clock(event.eta)} left")
        self._share = max(self._share, share)

    def __call__(self, event: Event) -> None:
        match event:
            case ScaleStarted():
                height, width = event.size
                if event.scale == 0:
                    self._begin("step 1")
                log(f"scale {event.scale + 1} of {event.scales}: {width}x{height}, {event.kind}")
            case TrainingStarted():
                self._begin(event.name)
                log(f"{event.name}: {event.total - event.iteration} iterations")
            case Prepared():
                log(f"{event.what}: " + ", ".join(f"{name} {value:.4g}" for name, value in event.values.items()))
            case IterationDone():
                self._progress(event)
            case ScaleFinished():
                log(f"scale {event.scale + 1} done in {clock(event.seconds)}, samples in {event.sample}")
            case TrainingFinished():
                log(f"{event.name} done in {clock(event.seconds)}")
            case Reviewed():
                where = "held-out strip" if event.held_out else "the photograph itself"
                log(
                    f"iteration {event.iteration}, {where}, bicubic / start / now: PSNR "
                    + " / ".join(f"{event.psnr[k]:.2f}" for k in ("bicubic", "start", "now"))
                    + " dB, texture distance "
                    + " / ".join(f"{event.texture[k]:.4f}" for k in ("bicubic", "start", "now"))
                    + f"; {event.sample}"
                )
            case _:
                pass
