"""``train_structure``: train step 1 on a photograph and write the structure file, after a trial."""

from __future__ import annotations

import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from engine.archs.hpvaegan import BaseGenerator, scale_sizes
from engine.io.photo import Photo, open_photo
from engine.model.structure_file import write_structure
from engine.training.losses.vgg import VGGFeatures, missing_vgg_error, open_vgg
from engine.training.run import checkpoint, loop, trial
from engine.training.run.budget import check_budget
from engine.training.run.events import Event, Forecast, StructureSaved
from engine.training.run.runtime import Runtime
from engine.training.run.seed import seeded
from engine.training.structure.footprint import estimate
from engine.training.structure.request import StructureRequest
from engine.training.structure.trainer import Settings, StructureTrainer

NAME = "step 1"
"""Name of the training in messages."""


def train_structure(
    photo: Path, out: Path, request: StructureRequest, runtime: Runtime, forecast: Forecast | None = None
) -> BaseGenerator:
    """Train step 1 on one photograph and write a structure file.

    Log, samples and, until the end, the checkpoint that ``runtime.resume`` continues from lie next to ``out``. Nothing is
    written before all checks have passed.

    Args:
        photo: the photograph, at least ``request.base_width`` pixels wide.
        out: structure file to write (safetensors, half precision).
        request: everything that decides the result except the photograph.
        runtime: device, memory, resumption and callbacks.
        forecast: forecast of this training, if all checks have passed already.

    Returns:
        The trained generator, on the CPU.

    Raises:
        InputError: a file cannot be used, or VGG's weights are missing.
        BudgetError: an iteration does not fit the memory, or the files do not fit the disk.
        EngineError, Interrupted, ResumeError: as ``loop.train``.
    """
    started = time.monotonic()
    loop.check_out(out, runtime)
    opened = open_photo(photo, request.base_width)
    if forecast is None:
        runtime.log("checking the settings and measuring an iteration of each scale")
        forecast = forecast_structure(opened, out, request, runtime)
        trial.announce([forecast], out.parent, runtime)
    vgg = _open_vgg(request)
    settings = _settings(request, opened, vgg)
    provenance = _provenance(settings, opened, request, vgg)
    samples = out.with_name(out.stem + "-samples")
    trainer = StructureTrainer(settings, opened, provenance, samples, runtime.device, vgg, runtime.wraps)

    def write() -> Event:
        write_structure(trainer.structure.cpu().requires_grad_(False), out)
        return StructureSaved(out, out.stat().st_size, time.monotonic() - started)

    loop.train(trainer, out, runtime, forecast, checkpoint_every=request.recipe.checkpoint_every, write=write)
    return trainer.structure


def check_structure(photo: Photo, request: StructureRequest, runtime: Runtime) -> StructureTrainer:
    """Check everything that a training of step 1 needs.

    Returns:
        A trainer to be measured and thrown away.

    Raises:
        InputError: the photograph is damaged, or VGG's weights are missing or damaged.
        BudgetError: an iteration does not fit the memory.
    """
    vgg = _open_vgg(request)
    settings = _settings(request, photo, vgg)
    trainer = StructureTrainer(settings, photo, {}, Path(), runtime.device, vgg)
    needed = estimate(trainer)
    check_budget(NAME, needed, runtime.budget_bytes(), "use a smaller batch", runtime.device)
    return trainer


def forecast_structure(photo: Photo, out: Path, request: StructureRequest, runtime: Runtime) -> Forecast:
    """Check and measure a training of step 1. Raises as ``check_structure``."""
    trainer = check_structure(photo, request, runtime)
    seconds, checkpoint_bytes = trial.measure(trainer)
    return Forecast(
        name=NAME,
        iterations=trainer.totals,
        seconds=seconds,
        position=checkpoint.position(checkpoint.checkpoint_path(out)),
        result_bytes=sum(2 * weight.numel() for weight in trainer.structure.parameters()),
        work_bytes=2 * checkpoint_bytes,  # the old one and the new one
    )


def untrained_structure(photo: Photo, request: StructureRequest) -> BaseGenerator:
    """Step 1 of the request's sizes with fresh weights."""
    sizes = scale_sizes((photo.height, photo.width), request.config.last, request.base_width, request.least_width)
    with seeded(request.seed):
        return BaseGenerator(request.config, sizes, {})


def _open_vgg(request: StructureRequest) -> VGGFeatures | None:
    """VGG if a loss needs it."""
    layers = request.recipe.loss_weights.layers
    if not layers:
        return None
    vgg = open_vgg(request.vgg, layers)
    if vgg is None:
        raise missing_vgg_error(layers)
    return vgg


def _settings(request: StructureRequest, photo: Photo, vgg: VGGFeatures | None) -> Settings:
    recipe = request.recipe
    return Settings(
        iterations=request.iterations,
        config=request.config,
        base_width=request.base_width,
        least_width=request.least_width,
        precision=request.precision,
        batch=recipe.batch,
        losses=recipe.loss_weights,
        sigma=recipe.sigma,
        ema=recipe.ema,
        seed=request.seed,
        photo=photo.digest,
        vgg=vgg.digest if vgg is not None else None,
    )


def _provenance(settings: Settings, photo: Photo, request: StructureRequest, vgg: VGGFeatures | None) -> dict[str, Any]:
    """Metadata of the structure file about its training."""
    provenance: dict[str, Any] = {
        "photo": {"name": photo.path.name, "width": photo.width, "height": photo.height, "sha256": photo.digest},
        "licence": request.licence,
        "source": request.source,
        "iterations": list(settings.iterations),
        "precision": settings.precision,
        **asdict(settings.losses),
        "sigma": settings.sigma,
        "ema": settings.ema,
        "seed": settings.seed,
        "engine": version("ourgan-engine"),
    }
    if vgg is not None:
        provenance["vgg"] = {"network": vgg.name, "sha256": vgg.digest}
    return provenance
