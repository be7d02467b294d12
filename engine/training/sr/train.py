"""``train_sr``: fine-tune the network of one super-resolution step on a photograph and write its weights."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from engine.archs.hpvaegan import BASE_WIDTH, BaseGenerator
from engine.device.precision import Precision
from engine.errors import InputError, UsageError, option
from engine.io.files import sha256
from engine.io.photo import Photo, open_photo
from engine.model.bundle import open_structure
from engine.run.stage import Stage
from engine.training.losses.vgg import VGGFeatures, missing_vgg_error, open_vgg
from engine.training.photo import IN_MEMORY, Size, open_picture
from engine.training.run import checkpoint, loop
from engine.training.run.events import Event, Forecast, Prepared, WeightsSaved
from engine.training.run.runtime import Runtime
from engine.training.run.trial import announce
from engine.training.sr import networks
from engine.training.sr.chain import (
    MAX_BYTES,
    Counts,
    PreviousStep,
    SimulatedInputs,
    cached_inputs,
    seconds_to_simulate,
    simulate_inputs,
)
from engine.training.sr.degradations import bicubic
from engine.training.sr.losses import feature_layers
from engine.training.sr.networks import Shape
from engine.training.sr.pairs import PhotographPairs, check_crop, check_grid
from engine.training.sr.recipe import Recipe
from engine.training.sr.request import PhotoTrainingRequest
from engine.training.sr.trainer import Settings, SRTrainer
from engine.training.sr.trial import forecast as trial_forecast
from engine.training.sr.trial import trial_trainer
from engine.training.sr.validation import Validation, fixed_crops

STEPS = (2, 3, 4)
"""Super-resolution steps of the paper."""
SCALE = 4
"""Enlargement by a step."""
MAX_ENLARGEMENT = 1.5
"""Largest enlargement of a photograph that is smaller than the step's output; a larger one would teach blur."""

Log = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class SRRequest(PhotoTrainingRequest):
    """Everything that decides the result except the photograph.

    Raises:
        UsageError: values out of range, or contradicting each other.
    """

    recipe: Recipe
    """Values of the training."""
    step: int = 2
    """Step of the paper: 2, 3 or 4."""
    width: int | None = None
    """Width of the HR photograph, pixels; None: that of the step's output, or the photograph's own below two thirds of it."""
    structure: Path | None = None
    """Structure file of step 1, for simulated inputs."""
    previous: tuple[Path, ...] = ()
    """Weights of steps 2 to ``step`` - 1, for simulated inputs."""

    @property
    def name(self) -> str:
        """Name of the training in messages."""
        return f"step {self.step}"

    @property
    def is_chained(self) -> bool:
        """Whether the recipe asks for simulated inputs, which need step 1."""
        return self.recipe.chain > 0 and self.recipe.reconstructions + self.recipe.samples > 0

    def __post_init__(self) -> None:
        PhotoTrainingRequest.__post_init__(self)
        if self.step not in STEPS:
            raise UsageError(f"{option('step', self.step)}: no super-resolution step; use 2, 3 or 4")
        if self.width is not None and self.width < 1:
            raise UsageError(f"{option('size', self.width)}: too small; use at least 1")
        if self.previous and self.structure is None:
            raise UsageError(f"{option('previous')}: without the structure it enlarges; give {option('structure')} too")
        count = self.step - STEPS[0]
        if self.structure is not None and self.recipe.chain and len(self.previous) != count:
            raise UsageError(
                f"{option('previous')}: {len(self.previous)} files for step {self.step} with a structure; give {count}"
            )


def train_sr(photo: Path, out: Path, request: SRRequest, runtime: Runtime, forecast: Forecast | None = None) -> None:
    """Train on one photograph and write the EMA of the weights (safetensors, the community's tensor names).

    Log, samples and, until the end, the checkpoint and the simulated inputs that ``runtime.resume`` continues from lie next
    to ``out``. Nothing is written before all checks have passed.

    Args:
        photo: the photograph.
        out: weights file to write.
        request: everything that decides the result except the photograph.
        runtime: device, memory, resumption and callbacks.
        forecast: forecast of this training, if all checks have passed already.

    Raises:
        InputError: a file cannot be used, or the photograph is too small.
        UsageError: options contradict each other.
        BudgetError: an iteration does not fit the memory, or the files do not fit the disk.
        EngineError, Interrupted, ResumeError: as ``loop.train``.
    """
    started = time.monotonic()
    loop.check_out(out, runtime)
    opened = open_photo(photo, least_width=1)
    structure = open_structure(request.structure) if request.structure is not None else None
    if forecast is None:
        runtime.log("checking the settings and measuring iterations")
        previous = _previous(request.previous, request.precision, runtime.device)
        forecast = forecast_sr(opened, out, request, runtime, structure, previous)
        announce([forecast], out.parent, runtime)
    recipe, vgg = _feature_network(request, runtime.log)
    start = open_network(request.start, request.shape, request.seed, recipe, request.step - 2)
    scratch, chain_file = (out.with_name(out.name + suffix) for suffix in (".photo", ".chain"))
    try:
        picture = open_picture(opened, _size(opened, _base_size(structure), request), scratch)
        inputs = {
            "photo": opened.digest,
            "size": list(picture.size),
            "start": start.digest,
            "structure": file_digest(request.structure),
            "previous": [file_digest(path) for path in request.previous],
            "vgg": vgg.digest if vgg is not None else None,
        }
        chain = _chain(structure, opened, request, inputs, runtime, chain_file)
        pictures = chain.pictures if chain is not None else ()
        trained = columns_trained_on(picture.size, recipe)
        pairs = PhotographPairs(picture, pictures, recipe, SCALE, trained, runtime.device, vgg)
        crops, held_out = fixed_crops(picture, trained, SCALE * start.network.align)
        trainer = SRTrainer(
            Settings(recipe, request.name, request.precision, request.seed, inputs),
            start.network,
            pairs,
            Validation(
                crops, bicubic(crops, SCALE), recipe.render_sigma, start.network.noise_channels, held_out, pictures
            ),
            vgg,
            pairs.aligned,
            out.with_name(out.stem + "-samples"),
            runtime.budget_bytes(),
            runtime.device,
        )
        provenance = _provenance(opened, picture.size, request, recipe, start)
        if vgg is not None:
            provenance["vgg"] = {"network": vgg.name, "sha256": inputs["vgg"]}
        run(trainer, out, recipe, provenance, runtime, forecast, started, _prepared(picture.size, trained, chain))
        chain_file.unlink(missing_ok=True)
    finally:
        scratch.unlink(missing_ok=True)


def check_sr(photo: Photo, request: SRRequest, runtime: Runtime, base_size: Size | None) -> SRTrainer:
    """Check everything that a training needs: weights, VGG, the photograph's size and the memory.

    Args:
        photo: the photograph.
        request: everything that decides the result except the photograph.
        runtime: device and memory.
        base_size: (height, width) of step 1's image; None without step 1.

    Returns:
        A trainer to be measured and thrown away.

    Raises:
        InputError, UsageError, BudgetError: as ``train_sr``.
    """
    recipe, vgg = _feature_network(request, lambda line: None)
    start = open_network(request.start, request.shape, request.seed, recipe, request.step - 2)
    size = _size(photo, base_size, request)
    check_crop((size[0], columns_trained_on(size, recipe)), recipe.crop, "the photograph at this step")
    simulated = base_size is not None and request.is_chained
    if simulated and base_size is not None:
        height, width = (side * SCALE ** (request.step - STEPS[0]) for side in base_size)
        columns = width * columns_trained_on(size, recipe) // size[1]
        check_crop((height, columns), recipe.crop // SCALE, "a simulated input")
    return trial_trainer(request.name, recipe, start, request.precision, runtime, vgg=vgg, simulated=simulated)


def forecast_sr(
    photo: Photo,
    out: Path,
    request: SRRequest,
    runtime: Runtime,
    structure: BaseGenerator | None,
    previous: Sequence[PreviousStep],
) -> Forecast:
    """Check and measure a training.

    Args:
        photo: the photograph.
        out: weights file.
        request: everything that decides the result except the photograph.
        runtime: device and memory.
        structure: step 1, trained or not; None without it.
        previous: the steps between step 1 and this one, trained or not.

    Raises:
        InputError, UsageError, BudgetError: as ``train_sr``.
    """
    base_size = _base_size(structure)
    trainer = check_sr(photo, request, runtime, base_size)
    height, width = _size(photo, base_size, request)
    work_bytes = 3 * height * width if 3 * height * width > IN_MEMORY else 0
    preparation = 0.0
    if structure is not None and request.is_chained:
        work_bytes += MAX_BYTES
        if not checkpoint.checkpoint_path(out).exists():  # a resumed run reads its simulated inputs
            counts = Counts(request.recipe.reconstructions, request.recipe.samples)
            preparation = seconds_to_simulate(structure, previous, counts, runtime.device)
    return trial_forecast(trainer, out, preparation, work_bytes)


def run(
    trainer: SRTrainer,
    out: Path,
    recipe: Recipe,
    provenance: dict[str, Any],
    runtime: Runtime,
    forecast: Forecast,
    started: float,
    prepared: Sequence[Event],
) -> None:
    """Run the loop and write the weights file.

    Args:
        trainer: the run.
        out: weights file to write.
        recipe: values of the training.
        provenance: metadata of the weights file.
        runtime: resumption and callbacks.
        forecast: expected duration of the iterations.
        started: ``time.monotonic`` at the start.
        prepared: events that are logged first.
    """
    if trainer.uses_checkpointing:
        runtime.log("activation checkpointing: activations of the trunk are computed twice to fit the memory budget")

    def write() -> Event:
        dtype = torch.float16 if recipe.store == "fp16" else torch.float32
        networks.save(out, trainer.weights(), {**provenance, "quality": trainer.quality}, dtype)
        return WeightsSaved(out, out.stat().st_size, time.monotonic() - started)

    loop.train(
        trainer, out, runtime, forecast, checkpoint_every=recipe.checkpoint_every, write=write, prepared=prepared
    )


def open_network(name: str, shape: Shape, seed: int, recipe: Recipe, index: int = 0) -> networks.Start:
    """Initial network of a step.

    Args:
        name: packaged weights, a file or "scratch".
        shape: size of the network.
        seed: seed of fresh weights.
        recipe: values of the training.
        index: index of the network in a model file.

    Raises:
        UsageError: the network does not enlarge as a step does, or its windows do not divide the crop.
        ModelError: as ``networks.open_start``.
    """
    shape = dataclasses.replace(shape, noise_channels=recipe.noise_channels)
    start = networks.open_start(name, shape, seed, index)
    if start.network.scale != SCALE:
        raise UsageError(
            f"{option('start', name)}: enlarges {start.network.scale} times; use weights that enlarge {SCALE} times"
        )
    check_grid(recipe.crop, SCALE, start.network.align)
    return start


def columns_trained_on(size: Size, recipe: Recipe) -> int:
    """Columns of a picture of (height, width), from the left, for training; the others are for validation."""
    return size[1] - int(size[1] * recipe.held_out)


def file_digest(path: Path | None) -> str | None:
    """SHA-256 of a file; None without a file. Raises InputError if it cannot be read."""
    if path is None:
        return None
    try:
        return sha256(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); choose another file") from error


def _base_size(structure: BaseGenerator | None) -> Size | None:
    return structure.base_size if structure is not None else None


def _size(photo: Photo, base_size: Size | None, request: SRRequest) -> Size:
    """(height, width) of the HR photograph: the size of the step's output, or its own size if that is much smaller.

    A slightly smaller photograph is enlarged: at its own size stones and leaves would be smaller than in the step's
    inputs. With step 1 it has exactly the size of the step's output, so that simulated inputs match the photograph
    pixel by pixel.
    """
    factor = SCALE ** (request.step - 1)
    base_height, base_width = base_size or (0, BASE_WIDTH)
    output, largest = base_width * factor, int(MAX_ENLARGEMENT * photo.width)
    width = request.width if request.width is not None else output if output <= largest else photo.width
    if width > largest:
        raise InputError(
            f"{option('size', width)}: too large for a photograph of {photo.width} px, whose enlargement by more than "
            f"{MAX_ENLARGEMENT:g} times would teach blur; use at most {largest} or a larger photograph"
        )
    if base_size is not None and width == output:
        return base_height * factor, width
    return max(1, round(width * photo.height / photo.width)), width


def _chain(
    structure: BaseGenerator | None,
    photo: Photo,
    request: SRRequest,
    inputs: dict[str, Any],
    runtime: Runtime,
    path: Path,
) -> SimulatedInputs | None:
    """Simulated inputs, cached in the file ``path``; None without a structure or if the recipe has none."""
    if structure is None or not request.is_chained:
        return None
    counts = Counts(request.recipe.reconstructions, request.recipe.samples)
    digests = {name: inputs[name] for name in ("photo", "structure", "previous")}
    key = json.dumps([digests, dataclasses.asdict(counts), request.seed, request.precision])

    def make() -> SimulatedInputs:
        generator = torch.Generator().manual_seed(request.seed)
        previous = _previous(request.previous, request.precision, runtime.device)
        scratch = path.with_name(path.name + ".photo")
        try:
            return simulate_inputs(structure, photo, previous, counts, generator, runtime.device, scratch, runtime.log)
        finally:
            scratch.unlink(missing_ok=True)

    return cached_inputs(path, key, make)


def _previous(paths: Sequence[Path], precision: Precision, device: torch.device) -> list[PreviousStep]:
    starts = (networks.open_start(str(path), Shape(), 0, index) for index, path in enumerate(paths))
    return [previous_step(start, precision, device) for start in starts]


def previous_step(start: networks.Start, precision: Precision, device: torch.device) -> PreviousStep:
    """A network as a step below the one in training."""
    return PreviousStep(Stage(start.network.eval().requires_grad_(False), device, precision), start.sigma)


def _feature_network(request: SRRequest, log: Log) -> tuple[Recipe, VGGFeatures | None]:
    """VGG if a loss needs it. Without its weights the texture loss replaces the perceptual one; other losses are refused."""
    recipe = request.recipe
    layers = feature_layers(recipe)
    if not layers:
        return recipe, None
    if (vgg := open_vgg(request.vgg, layers)) is not None:
        return recipe, vgg
    if feature_layers(recipe.replace(perceptual=0.0)):
        raise missing_vgg_error(layers)
    texture = max(recipe.texture, recipe.perceptual)
    log(
        f"no VGG weights found: perceptual loss (weight {recipe.perceptual:g}) left out, texture loss has weight "
        f"{texture:g}"
    )
    return recipe.replace(perceptual=0.0, texture=texture), None


def _prepared(size: Size, trained: int, chain: SimulatedInputs | None) -> list[Event]:
    events: list[Event] = [Prepared("photograph", {"height": size[0], "width": size[1], "columns trained on": trained})]
    if chain is not None:
        height, width = chain.size
        values = {"pictures": len(chain.pictures), "height": height, "width": width}
        psnr = {"PSNR where the code was fitted": chain.psnr_fitted, "PSNR of reconstructions": chain.psnr}
        events.append(Prepared("chain", values | psnr))
    return events


def _provenance(photo: Photo, size: Size, request: SRRequest, recipe: Recipe, start: networks.Start) -> dict[str, Any]:
    """Metadata of the weights file about its training."""
    licences = [one for text in (request.licence, start.licence) if text for one in text.split("; ")]
    origin = f"fine-tuned on {request.source or photo.path.name}, started from "
    is_second_run = start.source.startswith(origin)  # on the same photograph
    return {
        "licence": "; ".join(dict.fromkeys(licences)) or "not stated",
        "source": start.source if is_second_run else origin + start.source,
        "sigma": recipe.render_sigma,
        "step": request.step,
        "photo": {
            "name": photo.path.name,
            "width": photo.width,
            "height": photo.height,
            "sha256": photo.digest,
            "trained_at": [size[1], size[0]],
        },
        "start": {"name": Path(request.start).name, **start.facts},
        "recipe": dataclasses.asdict(recipe),
        "precision": request.precision,
        "seed": request.seed,
        "engine": version("ourgan-engine"),
    }
