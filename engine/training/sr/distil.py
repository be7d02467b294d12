"""``distil``: a small network learns to reproduce a large one on crops of any photographs.

The target is the teacher's output, so there is no texture to invent and the pixel loss alone is enough: response-based
distillation (Hinton et al. 2015; Gou et al. 2021). The loop, the trainer and the file format are those of ``train_sr``.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import InputError, UsageError, option
from engine.io.photo import SUFFIXES, Photo, open_photo
from engine.run.stage import Stage
from engine.training.photo import IN_MEMORY, open_picture
from engine.training.run import loop
from engine.training.run.events import Prepared
from engine.training.run.runtime import Runtime
from engine.training.run.trial import announce
from engine.training.sr import networks
from engine.training.sr.degradations import bicubic
from engine.training.sr.networks import Shape
from engine.training.sr.pairs import TeacherPairs, check_crop
from engine.training.sr.recipe import Recipe
from engine.training.sr.request import TrainingRequest
from engine.training.sr.train import SCALE, columns_trained_on, open_network, run
from engine.training.sr.trainer import Settings, SRTrainer
from engine.training.sr.trial import forecast, trial_trainer
from engine.training.sr.validation import Validation, fixed_crops

NAME = "distillation"
"""Name of the training in messages."""

_MUST_BE_ZERO = (
    "consistency",
    "perceptual",
    "texture",
    "detail",
    "feature_texture",
    "checkerboard",
    "adversarial",
    "chain",
    "noise_channels",
)
"""Values of a recipe that make no sense with a teacher."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request(TrainingRequest):
    """Options of a distillation. Raises UsageError for a recipe with other losses than the pixel loss."""

    recipe: Recipe

    teacher: str = "realsr"
    """Packaged weights or a checkpoint file."""

    def __post_init__(self) -> None:
        TrainingRequest.__post_init__(self)
        for name in _MUST_BE_ZERO:
            if value := getattr(self.recipe, name):
                raise UsageError(f"{name} = {value:g}: a distillation uses the pixel loss alone; set it to 0")


def distil(photos: Sequence[Path], out: Path, request: Request, runtime: Runtime) -> None:
    """Train on crops of photographs and write the weights.

    Args:
        photos: files, or folders of them.
        out: weights file to write (safetensors, the community's tensor names).
        request: what to train; validation measures against the teacher's output.
        runtime: how to run.

    Raises:
        InputError: a photograph is missing, undecodable or smaller than a crop.
        UsageError: no photographs, or a teacher that draws noise.
        BudgetError: an iteration does not fit the memory, or the files do not fit the disk.
        Interrupted, ResumeError, EngineError: as ``loop.train``.
    """
    started = time.monotonic()
    loop.check_out(out, runtime)
    recipe, device = request.recipe, runtime.device
    opened = [open_photo(path, least_width=1) for path in _files(photos)]
    for photo in opened:
        for note in photo.notes:
            runtime.log(f"{photo.path}: {note}")
        size = (photo.height, photo.width)
        check_crop((size[0], columns_trained_on(size, recipe)), recipe.crop, "a photograph")
    teacher = open_network(request.teacher, Shape(), 0, recipe)
    if channels := teacher.network.noise_channels:
        raise UsageError(
            f"{request.teacher}: has {channels} noise channels, and random detail cannot be learned; "
            f"choose another {option('teacher')}"
        )
    stage = Stage(teacher.network.eval().requires_grad_(False), device, request.precision)

    def enlarge(lr: Tensor) -> Tensor:
        with torch.no_grad():
            lr = lr.to(device).contiguous(memory_format=torch.channels_last)
            # Autograd refuses tensors from inference mode; a copy of one is an ordinary tensor.
            return stage.run(lr).float().clamp(0, 1).clone()

    def open_student() -> networks.Start:
        return open_network(request.start, request.shape, request.seed, recipe)

    runtime.log("checking the settings and measuring iterations")
    trainer = trial_trainer(NAME, recipe, open_student(), request.precision, runtime, enlarge=enlarge)
    expected = forecast(trainer, out, 0.0, sum(3 * photo.height * photo.width for photo in opened))
    announce([expected], out.parent, runtime)
    start = open_student()
    scratches = [out.with_name(f"{out.name}.photo{i}") for i in range(len(opened))]
    try:
        pictures = [
            open_picture(photo, (photo.height, photo.width), scratch, IN_MEMORY // len(opened))
            for photo, scratch in zip(opened, scratches, strict=True)
        ]
        usable = [(picture, columns_trained_on(picture.size, recipe)) for picture in pictures]
        pairs = TeacherPairs(usable, enlarge, recipe, SCALE, device)
        crops, held_out = fixed_crops(*usable[0], SCALE * start.network.align)
        lr = bicubic(crops, SCALE)
        truth = torch.cat([enlarge(one).cpu() for one in torch.split(lr, 1)])
        inputs = {"photos": [photo.digest for photo in opened], "start": start.digest, "teacher": teacher.digest}
        trainer = SRTrainer(
            Settings(recipe, NAME, request.precision, request.seed, inputs),
            start.network,
            pairs,
            Validation(truth, lr, recipe.render_sigma, start.network.noise_channels, held_out),
            None,
            True,
            out.with_name(out.stem + "-samples"),
            runtime.budget_bytes(),
            device,
        )
        megapixels = sum(photo.width * photo.height for photo in opened) / 1e6
        prepared = [Prepared("photographs", {"number": len(opened), "megapixels": megapixels})]
        run(trainer, out, recipe, _facts(opened, request, teacher), runtime, expected, started, prepared)
    finally:
        for scratch in scratches:
            scratch.unlink(missing_ok=True)


def _files(photos: Sequence[Path]) -> list[Path]:
    """Files as they are, and the photographs of every folder by name."""
    files: list[Path] = []
    for path in photos:
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        if not inside:
            raise InputError(f"{path}: no photograph in this folder ({', '.join(SUFFIXES)}); name another")
        files += inside
    if not files:
        raise UsageError("no photographs to learn from; name files or folders")
    return files


def _facts(photos: Sequence[Photo], request: Request, teacher: networks.Start) -> dict[str, Any]:
    """Metadata of the weights file."""
    return {
        "licence": teacher.licence or "not stated",
        "source": f"distilled from {teacher.source} on {len(photos)} photographs",
        "sigma": request.recipe.render_sigma,
        "photos": [{"name": photo.path.name, "sha256": photo.digest} for photo in photos],
        "teacher": Path(request.teacher).name,
        "start": {"name": Path(request.start).name},
        "recipe": dataclasses.asdict(request.recipe),
        "precision": request.precision,
        "seed": request.seed,
        "engine": version("ourgan-engine"),
    }
