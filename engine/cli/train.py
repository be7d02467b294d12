"""Commands of engine train: structure, sr, distil, preset, and a whole model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from engine.archs.hpvaegan import BASE_WIDTH
from engine.cli import report
from engine.cli.options import Options
from engine.cli.outputs import check_inputs_stay
from engine.cli.progress import Meter, clock, duration, log, meter
from engine.device.choose import choose_device
from engine.device.heap import fix_malloc_thresholds
from engine.device.precision import Precision
from engine.errors import UsageError, option
from engine.io.photo import Photo, open_photo
from engine.model.bundle import load
from engine.plan.request import WRAPS
from engine.training.losses.vgg import find_vgg
from engine.training.preset import Preset, preset_text, read_file, read_preset
from engine.training.run.events import (
    Event,
    Forecast,
    Forecasted,
    IterationDone,
    Prepared,
    ScaleFinished,
    ScaleStarted,
    TrainingFinished,
    TrainingStarted,
    Validated,
)
from engine.training.run.runtime import Runtime
from engine.training.run.tensorboard import writer
from engine.training.sr.distil import Request as DistilRequest
from engine.training.sr.distil import distil as train_distilled
from engine.training.sr.losses import feature_layers
from engine.training.sr.networks import Shape, architecture_of
from engine.training.sr.train import SRRequest, train_sr
from engine.training.structure.recipe import StructureRecipe
from engine.training.structure.request import StructureRequest
from engine.training.structure.train import train_structure
from engine.training.train import ModelRequest, train_model

PAPER_STRUCTURE = "paper-esrgan"
"""Preset of the paper's step 1; paper-swinir has the same table."""


def structure(
    photo: Path,
    out: Path,
    preset: str | None,
    config: Path | None,
    vgg: Path | None,
    device: str | None,
    precision: Precision,
    memory: int | None,
    vram: int | None,
    seed: int,
    wrap: str | None,
    resume: bool,
    overwrite: bool,
    licence: str,
    source: str,
    *,
    iterations: list[int] | None,
    padding: str | None,
    coordinates: bool | None,
    ema: float | None,
) -> None:
    """Train step 1 with progress, and print the result. None keeps the preset's value."""
    check_inputs_stay("out", out, [photo, config, vgg])
    default = _quick_preset(vgg)
    recipe = _structure_recipe(preset, config, default)
    changes = {
        "iterations": tuple(iterations) if iterations is not None else None,
        "padding": padding,
        "coordinates": coordinates,
        "ema": ema,
    }
    recipe = recipe.replace(**{name: value for name, value in changes.items() if value is not None})
    _open(photo, BASE_WIDTH)
    _log_default(preset, config, default)
    request = StructureRequest(
        recipe=recipe,
        precision=precision,
        seed=seed,
        vgg=vgg,
        licence=licence,
        source=source,
    )
    with meter("training", 1.0) as bar:
        runtime = _runtime(bar, device, memory, vram, resume=resume, overwrite=overwrite)
        train_structure(photo, out, request, _with_wrap(runtime, wrap))
    report.line(f"{out}: {out.stat().st_size / 1e6:.1f} MB; build a model with engine model build --structure {out}")


def whole(
    photo: Path, out: Path, options: Options, *, wrap: str | None, vgg: Path | None, licence: str, source: str
) -> None:
    """Train every step with progress, write the model file and print its contents."""
    check_inputs_stay("out", out, [photo, options.config, options.start, vgg])
    _open(photo, BASE_WIDTH)
    request = ModelRequest(
        preset=_read_preset(options, _quick_preset(vgg)),
        start=options.start,
        shape=_shape(options),
        precision=options.precision,
        seed=options.seed,
        vgg=vgg,
        licence=licence,
        source=source,
    )
    with meter("training", 1.0) as bar:
        folder = train_model(photo, out, request, _with_wrap(_runtime_of(options, bar), wrap))
    report.print_model(load(out))
    log(f"work files of all steps, their logs and samples: {folder}")


def sr(
    photo: Path,
    out: Path,
    options: Options,
    sigma: float | None,
    *,
    step: int,
    width: int | None,
    structure: Path | None,
    previous: tuple[Path, ...],
    vgg: Path | None,
    licence: str,
    source: str,
) -> None:
    """Fine-tune one super-resolution step with progress, and print the result."""
    check_inputs_stay("out", out, [photo, options.config, options.start, structure, *previous, vgg])
    _open(photo, least_width=1)
    recipe = _read_preset(options, _quick_preset(vgg)).step(step)
    if sigma is not None:
        recipe = recipe.replace(sigma=sigma, render_sigma=sigma)
    request = SRRequest(
        recipe=recipe,
        step=step,
        width=width,
        structure=structure,
        previous=previous,
        start=options.start,
        shape=_shape(options),
        precision=options.precision,
        seed=options.seed,
        vgg=vgg,
        licence=licence,
        source=source,
    )
    with meter("training", 1.0) as bar:
        train_sr(photo, out, request, _runtime_of(options, bar))
    _print_weights(out)


def distil(photos: Sequence[Path], out: Path, options: Options, teacher: str) -> None:
    """Train a small network to imitate a large one, with progress, and print the result."""
    check_inputs_stay("out", out, [*photos, options.config, options.start, teacher])
    request = DistilRequest(
        recipe=_read_preset(options, "distil").sr,
        teacher=teacher,
        start=options.start,
        shape=_shape(options),
        precision=options.precision,
        seed=options.seed,
    )
    with meter("training", 1.0) as bar:
        train_distilled(photos, out, request, _runtime_of(options, bar))
    _print_weights(out)


def preset(name: str) -> None:
    """Print a preset."""
    report.text(preset_text(name))


class ProgressReporter:
    """Prints training events, and moves a progress bar by the finished share of the forecast.

    Args:
        meter: the bar.
        device: device of the training.
    """

    def __init__(self, meter: Meter, device: torch.device) -> None:
        self._meter, self._device = meter, device
        self._parts: tuple[Forecast, ...] = ()
        self._part, self._phase = 0, ""
        self._share = 0.0

    def __call__(self, event: Event) -> None:
        match event:
            case Forecasted():
                self._parts = event.parts
                if event.parts:
                    log(_forecast_line(event.parts, self._device))
            case ScaleStarted():
                height, width = event.size
                self._begin_part("step 1")
                self._phase = f" scale {event.scale} of 0 to {event.scales - 1}"
                log(f"scale {event.scale} of 0 to {event.scales - 1}: {width}x{height}, {event.kind}")
            case TrainingStarted():
                self._begin_part(event.name)
                self._phase = ""
                log(f"{event.name}: {event.total - event.iteration} iterations")
            case Prepared():
                log(f"{event.what}: " + ", ".join(f"{name} {value:.4g}" for name, value in event.values.items()))
            case IterationDone():
                self._report_progress(event)
            case ScaleFinished():
                log(f"scale {event.scale} done in {clock(event.seconds)}; samples: {event.sample}")
            case TrainingFinished():
                log(f"{event.name} done in {clock(event.seconds)}")
            case Validated():
                crops = "held-out strip" if event.held_out else "photograph itself"
                psnr, texture = _measures(event.psnr, ".2f"), _measures(event.texture, ".4f")
                log(
                    f"iteration {event.iteration}, {crops}, bicubic / start / now: PSNR {psnr} dB, "
                    f"texture distance {texture}; samples: {event.sample}"
                )
            case _:
                pass

    def _begin_part(self, name: str) -> None:
        self._part = next(number for number, part in enumerate(self._parts) if part.name == name)

    def _report_progress(self, event: IterationDone) -> None:
        """Later parts are taken to run at the pace of this one."""
        part, later = self._parts[self._part], self._parts[self._part + 1 :]
        left_here, left_later = part.left(event.phase, event.iteration), sum(one.total for one in later)
        pace = event.eta / left_here if left_here else 1.0
        share = 1 - (left_here + left_later) / sum(one.total for one in self._parts)
        note = f"{part.name}{self._phase}: iteration {event.iteration} of {event.total}"
        self._meter.advance(max(0.0, share - self._share), note, left=event.eta + pace * left_later)
        self._share = max(self._share, share)


def _open(photo: Path, least_width: int) -> Photo:
    """Open a photograph before anything else, so that its errors and notes are the first lines."""
    opened = open_photo(photo, least_width)
    for note in opened.notes:
        log(f"{photo}: {note}")
    return opened


def _forecast_line(parts: Sequence[Forecast], device: torch.device) -> str:
    """Durations of all parts in one line."""
    title = "forecast" if device.type == "cpu" else "forecast, not yet measured on a GPU"
    texts = [f"{part.name} about {duration(part.total)}" for part in parts]
    if len(parts) > 1:
        texts.append(f"in all about {duration(sum(part.total for part in parts))}")
    return f"{title}: {', '.join(texts)}"


def _measures(values: Mapping[str, float], form: str) -> str:
    return " / ".join(f"{values[name]:{form}}" for name in ("bicubic", "start", "now"))


def _print_weights(out: Path) -> None:
    report.line(f"{out}: {out.stat().st_size / 1e6:.1f} MB; build a model with engine model build --sr {out}")


def _quick_preset(vgg: Path | None) -> str:
    """Default preset: quick-vgg if there are VGG weights, else quick."""
    return "quick-vgg" if vgg is not None or find_vgg(feature_layers(read_preset("quick-vgg").sr)) else "quick"


def _structure_recipe(preset: str | None, config: Path | None, default: str) -> StructureRecipe:
    """Recipe of step 1 of the chosen preset."""
    recipe = _choose_preset(preset, config, default, lambda: PAPER_STRUCTURE).structure
    if recipe is None:
        raise UsageError(f"{config or preset}: has no table [structure]; use quick or paper, or add the table")
    return recipe


def _read_preset(options: Options, default: str) -> Preset:
    """The chosen preset with the iterations of the command line."""
    shape = _shape(options)
    _log_default(options.preset, options.config, default)
    chosen = _choose_preset(
        options.preset, options.config, default, lambda: f"paper-{architecture_of(options.start, shape)}"
    )
    return chosen if options.iterations is None else chosen.replace(iterations=options.iterations)


def _choose_preset(preset: str | None, config: Path | None, default: str, paper: Callable[[], str]) -> Preset:
    """A user's file, a named preset or the default; ``paper`` names the preset that "paper" means."""
    if config is not None:
        if preset is not None:
            raise UsageError(
                f"{option('preset', preset)}: excludes {option('config')}, a whole preset; use one of them"
            )
        return read_file(config)
    return read_preset(paper() if preset == "paper" else preset or default)


def _log_default(preset: str | None, config: Path | None, default: str) -> None:
    if preset is None and config is None:
        advice = "; for better texture get VGG weights: engine weights fetch vgg16" if default == "quick" else ""
        log(f"preset {default}{advice}")


def _shape(options: Options) -> Shape:
    return Shape(options.architecture, options.channels, options.blocks)


def _with_wrap(runtime: Runtime, wrap: str | None) -> Runtime:
    """The runtime with sample images that repeat along these axes."""
    return runtime if wrap is None else replace(runtime, wraps=WRAPS[wrap])


def _runtime_of(options: Options, bar: Meter) -> Runtime:
    listeners = [] if options.tensorboard is None else [writer(options.tensorboard)]
    return _runtime(
        bar,
        options.device,
        options.memory,
        options.vram,
        *listeners,
        resume=options.resume,
        overwrite=options.overwrite,
    )


def _runtime(
    bar: Meter,
    device_name: str | None,
    memory: int | None,
    vram: int | None,
    *listeners: Callable[[Event], Any],
    resume: bool,
    overwrite: bool,
) -> Runtime:
    fix_malloc_thresholds()
    device = choose_device(device_name)
    callbacks: list[Callable[[Event], Any]] = [ProgressReporter(bar, device), *listeners]

    def on_event(event: Event) -> None:
        for callback in callbacks:
            callback(event)

    budget = memory if device.type == "cpu" else vram
    return Runtime(device=device, resume=resume, overwrite=overwrite, budget=budget, on_event=on_event, log=log)
