"""``train_structure``: train step 1 on a photograph and write the structure file."""

from __future__ import annotations

import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from engine.archs.hpvaegan import BaseGenerator
from engine.io.photo import Photo, open_photo
from engine.model.structure_file import write_structure
from engine.training.losses.vgg import VGGFeatures, missing_vgg_error, open_vgg
from engine.training.run import loop
from engine.training.run.events import Event, StructureSaved
from engine.training.run.runtime import Runtime
from engine.training.structure.request import StructureRequest
from engine.training.structure.trainer import Settings, StructureTrainer


def train_structure(photo: Path, out: Path, request: StructureRequest, runtime: Runtime) -> BaseGenerator:
    """Train step 1 on one photograph and write a structure file.

    Log, samples and, until the end, the checkpoint that ``runtime.resume`` continues from lie next to ``out``.

    Args:
        photo: the photograph, at least ``request.base_width`` pixels wide.
        out: structure file to write (safetensors, half precision).
        request: everything that decides the result except the photograph.
        runtime: device, resumption and callbacks.

    Returns:
        The trained generator, on the CPU.

    Raises:
        InputError: a file cannot be used, or VGG's weights are missing.
        EngineError, Interrupted, ResumeError: as ``loop.train``.
    """
    started = time.monotonic()
    loop.check_out(out, resume=runtime.resume)
    opened = open_photo(photo, request.base_width)
    vgg = _open_vgg(request)
    settings = _settings(request, opened, vgg)
    provenance = _provenance(settings, opened, request, vgg)
    samples = out.with_name(out.stem + "-samples")
    trainer = StructureTrainer(settings, opened, provenance, samples, runtime.device, vgg)

    def write() -> Event:
        write_structure(trainer.structure.cpu().requires_grad_(False), out)
        return StructureSaved(out, out.stat().st_size, time.monotonic() - started)

    loop.train(trainer, out, runtime, checkpoint_every=request.recipe.checkpoint_every, write=write)
    return trainer.structure


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
