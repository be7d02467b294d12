"""`train_sr`: the super-resolution network of one step, fine-tuned on one photograph, becomes a weights file.

Knows what a run is put together from; what happens within an iteration is the trainer's affair.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from engine.archs.hpvaegan import BASE_WIDTH, BaseGenerator
from engine.device.memory import free_device, free_host
from engine.device.precision import Precision
from engine.errors import InputError, UsageError
from engine.io.photo import Photo, open_photo
from engine.model.bundle import open_structure
from engine.run.stage import Stage
from engine.training.losses.vgg import ABSENT, VGGFeatures, absent, open_vgg
from engine.training.photo import Picture, Size, open_picture
from engine.training.run import loop
from engine.training.run.events import Event, Prepared, WeightsSaved
from engine.training.run.precision import known_device
from engine.training.sr import networks
from engine.training.sr.chain import Counts, Log, PreviousStep, SimulatedInputs, cached_inputs, simulate_inputs
from engine.training.sr.degradations import bicubic
from engine.training.sr.networks import Shape
from engine.training.sr.pairs import PhotographPairs, check_grid
from engine.training.sr.recipe import Recipe
from engine.training.sr.request import OfPhotograph
from engine.training.sr.trainer import Settings, SRTrainer, feature_layers
from engine.training.sr.validation import Validation, fixed_crops

STEPS = (2, 3, 4)
SCALE = 4
MOST_ENLARGED = 1.5  # times, a photograph that is smaller than the step's output; more would teach blur
SHARE_OF_FREE = 0.8  # of the memory that is free, unless a budget is given: single operations need room as well


@dataclass(frozen=True, slots=True, kw_only=True)
class Request(OfPhotograph):
    """What to train. `step`: 2, 3 or 4 of the paper. `width`: of the HR photograph in pixels; None for the step's output,
    or the photograph's own where that is less than two thirds of it. `structure` and `previous` (the weights of steps 2 to
    `step` - 1) make chain pictures.
    """

    recipe: Recipe
    step: int = 2
    width: int | None = None
    structure: Path | None = None
    previous: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        OfPhotograph.__post_init__(self)
        if self.step not in STEPS:
            raise UsageError(f"step = {self.step}: choose 2, 3 or 4 (step 1 is the structure)")
        if self.width is not None and self.width < 1:
            raise UsageError(f"size = {self.width}: must be at least 1")
        if self.previous and self.structure is None:
            raise UsageError("the weights of previous steps enlarge step 1's pictures: give the structure too")
        wanted = self.step - STEPS[0]
        if self.structure is not None and self.recipe.chain and len(self.previous) != wanted:
            raise UsageError(
                f"step {self.step} with a structure takes {wanted} files of previous weights, not {len(self.previous)}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """How to run, with no influence on the result but rounding. `budget`: bytes of memory that an iteration may take."""

    device: str = "cpu"
    resume: bool = False
    budget: int | None = None
    on_event: Callable[[Event], None] = lambda event: None
    log: Log = lambda line: None

    def bytes_for(self, device: torch.device) -> int:
        if self.budget is not None:
            return self.budget
        free = free_device(device)
        return int(SHARE_OF_FREE * (free if free is not None else free_host()))


def train_sr(photo: Path, out: Path, request: Request, runtime: Runtime) -> None:
    """Train on one photograph and write the running mean of the weights to `out` (safetensors, the community's names).

    Next to `out` stand the log, the samples and, until the end, the checkpoint and the chain pictures from which
    `resume` goes on.

    Raises:
        InputError: a file that cannot be used, or a photograph that is too small.
        UsageError: options that contradict each other.
        BudgetError: an iteration does not fit the memory.
        Interrupted, ResumeError, EngineError: as `loop.train`.
    """
    started = time.monotonic()
    loop.check_out(out, runtime.resume)
    device = known_device(runtime.device)
    recipe, vgg = _feature_network(request, runtime.log)
    opened = open_photo(photo, least_width=1)
    start = open_network(request.start, request.shape, request.seed, recipe, request.step - 2)
    structure = open_structure(request.structure) if request.structure is not None else None
    scratch, kept = (out.with_name(out.name + suffix) for suffix in (".photo", ".chain"))
    try:
        picture = open_picture(opened, _size(opened, structure, request), scratch)
        inputs = {
            "photo": opened.digest,
            "size": list(picture.size),
            "start": start.digest,
            "structure": file_digest(request.structure),
            "previous": [file_digest(path) for path in request.previous],
            "vgg": vgg.digest if vgg is not None else None,
        }
        chain = _chain(structure, opened, request, inputs, device, kept, runtime.log)
        pictures = chain.pictures if chain is not None else ()
        trained = columns_trained_on(picture, recipe)
        pairs = PhotographPairs(picture, pictures, recipe, SCALE, trained, device, vgg)
        crops, held_out = fixed_crops(picture, trained, SCALE * start.network.align)
        trainer = SRTrainer(
            Settings(recipe, f"step {request.step}", request.precision, request.seed, inputs),
            start.network,
            pairs,
            Validation(
                crops, bicubic(crops, SCALE), recipe.render_sigma, start.network.noise_channels, held_out, pictures
            ),
            vgg,
            pairs.aligned,
            out.with_name(out.stem + "-samples"),
            runtime.bytes_for(device),
            device,
        )
        facts = _facts(opened, picture.size, request, recipe, start)
        if vgg is not None:
            facts["vgg"] = {"network": vgg.name, "sha256": inputs["vgg"]}
        run(trainer, out, recipe, facts, runtime, started, _prepared(picture.size, trained, chain))
        kept.unlink(missing_ok=True)
    finally:
        scratch.unlink(missing_ok=True)


def run(
    trainer: SRTrainer,
    out: Path,
    recipe: Recipe,
    facts: dict[str, Any],
    runtime: Runtime,
    started: float,
    prepared: Sequence[Event],
) -> None:
    """The loop, and the weights file at its end."""
    if trainer.computes_twice:
        runtime.log("activations of the trunk are computed twice to stay within the memory budget")

    def write() -> Event:
        dtype = torch.float16 if recipe.store == "fp16" else torch.float32
        networks.save(out, trainer.weights(), {**facts, "quality": trainer.quality}, dtype)
        return WeightsSaved(out, out.stat().st_size, time.monotonic() - started)

    loop.train(
        trainer,
        out,
        checkpoint_every=recipe.checkpoint_every,
        resume=runtime.resume,
        on_event=runtime.on_event,
        write=write,
        prepared=prepared,
    )


def open_network(name: str, shape: Shape, seed: int, recipe: Recipe, place: int = 0) -> networks.Start:
    """The start, checked against what a step and a crop must be."""
    shape = dataclasses.replace(shape, noise_channels=recipe.noise_channels)
    start = networks.open_start(name, shape, seed, place)
    if start.network.scale != SCALE:
        raise UsageError(f"the start {name} enlarges {start.network.scale} times: a step enlarges {SCALE} times")
    check_grid(recipe.crop, SCALE, start.network.align)
    return start


def columns_trained_on(picture: Picture, recipe: Recipe) -> int:
    """How many columns, from the left, are trained on; the others are measured on."""
    return picture.size[1] - int(picture.size[1] * recipe.held_out)


def file_digest(path: Path | None) -> str | None:
    """sha256 of a file that must be there."""
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): name a file that is there") from None


def _size(photo: Photo, structure: BaseGenerator | None, request: Request) -> Size:
    """(height, width) of the HR photograph: the step's output, or the photograph's own where that is much smaller.

    A photograph that is smaller by little is enlarged: at its own size stones and leaves would be smaller than those that the
    step is given to enlarge. Where the structure is known, exactly the size of the chain's output, so that both agree pixel by
    pixel.
    """
    factor = SCALE ** (request.step - 1)
    base_height, base_width = structure.base_size if structure is not None else (0, BASE_WIDTH)
    output, most = base_width * factor, int(MOST_ENLARGED * photo.width)
    width = request.width if request.width is not None else output if output <= most else photo.width
    if width > most:
        raise InputError(
            f"size = {width}: the photograph is {photo.width} px wide, and enlarging it more than {MOST_ENLARGED:g} times would "
            f"teach blur: take at most {most} or a larger photograph"
        )
    if structure is not None and width == output:
        return base_height * factor, width
    return max(1, round(width * photo.height / photo.width)), width


def _chain(
    structure: BaseGenerator | None,
    photo: Photo,
    request: Request,
    inputs: dict[str, Any],
    device: torch.device,
    path: Path,
    log: Log,
) -> SimulatedInputs | None:
    """The chain pictures if there is a structure and the recipe wants them."""
    counts = Counts(request.recipe.reconstructions, request.recipe.samples)
    if structure is None or request.recipe.chain == 0 or counts == Counts(0, 0):
        return None
    wanted = {name: inputs[name] for name in ("photo", "structure", "previous")}
    key = json.dumps([wanted, dataclasses.asdict(counts), request.seed, request.precision])

    def make() -> SimulatedInputs:
        generator = torch.Generator().manual_seed(request.seed)
        previous = _previous(request.previous, request.precision, device)
        scratch = path.with_name(path.name + ".photo")
        try:
            return simulate_inputs(structure, photo, previous, counts, generator, device, scratch, log)
        finally:
            scratch.unlink(missing_ok=True)

    return cached_inputs(path, key, make)


def _previous(paths: Sequence[Path], precision: Precision, device: torch.device) -> list[PreviousStep]:
    found = []
    for place, path in enumerate(paths):
        start = networks.open_start(str(path), Shape(), 0, place)
        network = start.network.eval().requires_grad_(False)
        found.append(PreviousStep(Stage(network, device, precision), start.sigma))
    return found


def _feature_network(request: Request, log: Log) -> tuple[Recipe, VGGFeatures | None]:
    """VGG if the recipe asks for it and its weights are there; else, of the perceptual loss alone, patches in its place."""
    recipe = request.recipe
    layers = feature_layers(recipe)
    if not layers:
        return recipe, None
    if (vgg := open_vgg(request.vgg, layers)) is not None:
        return recipe, vgg
    if feature_layers(recipe.replace(perceptual=0.0)):
        raise absent()
    texture = max(recipe.texture, recipe.perceptual)
    log(
        f"{ABSENT}: the perceptual loss of weight {recipe.perceptual:g} is left out, and the texture loss has weight "
        f"{texture:g}"
    )
    return recipe.replace(perceptual=0.0, texture=texture), None


def _prepared(size: Size, trained: int, chain: SimulatedInputs | None) -> list[Event]:
    events: list[Event] = [Prepared("photograph", {"height": size[0], "width": size[1], "columns trained on": trained})]
    if chain is not None:
        height, width = chain.size
        values = {"pictures": len(chain.pictures), "height": height, "width": width}
        likeness = {"PSNR where the code was fitted": chain.psnr_fitted, "PSNR of reconstructions": chain.psnr}
        events.append(Prepared("chain", values | likeness))
    return events


def _facts(photo: Photo, size: Size, request: Request, recipe: Recipe, start: networks.Start) -> dict[str, Any]:
    """What the weights file says about itself."""
    licences = [one for text in (request.licence, start.licence) if text for one in text.split("; ")]
    origin = f"fine-tuned on {request.source or photo.path.name}, started from "
    again = start.source.startswith(origin)  # a second run on the same photograph
    return {
        "licence": "; ".join(dict.fromkeys(licences)) or "not stated",
        "source": start.source if again else origin + start.source,
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
