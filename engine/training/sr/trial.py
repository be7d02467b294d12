"""Trial of a super-resolution training: a trainer on random pixels, to be measured and thrown away."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.device.precision import Precision
from engine.training.losses.vgg import VGGFeatures
from engine.training.photo import Picture
from engine.training.run import checkpoint
from engine.training.run.events import Forecast
from engine.training.run.runtime import Runtime
from engine.training.run.trial import measure
from engine.training.sr.chain import SimulatedInput
from engine.training.sr.degradations import bicubic
from engine.training.sr.networks import Start
from engine.training.sr.pairs import BatchSource, Enlarge, PhotographPairs, TeacherPairs
from engine.training.sr.recipe import Recipe
from engine.training.sr.trainer import Settings, SRTrainer
from engine.training.sr.validation import Validation, fixed_crops


def trial_trainer(
    name: str,
    recipe: Recipe,
    start: Start,
    precision: Precision,
    runtime: Runtime,
    *,
    vgg: VGGFeatures | None = None,
    simulated: bool = False,
    enlarge: Enlarge | None = None,
) -> SRTrainer:
    """A trainer with the cost of the real one, whose batches are crops of random pixels.

    Args:
        name: the training, such as "step 2".
        recipe: values of the training.
        start: initial network; it is changed.
        precision: precision of the computing network.
        runtime: device and memory.
        vgg: feature network of the losses.
        simulated: whether batches hold simulated inputs.
        enlarge: teacher of a distillation.

    Raises:
        BudgetError: an iteration does not fit the memory.
    """
    generator, scale, side = torch.Generator().manual_seed(0), start.network.scale, 2 * recipe.crop
    picture = Picture.of(torch.randint(256, (side, side, 3), dtype=torch.uint8, generator=generator).numpy())
    small = torch.rand(3, side // scale, side // scale, generator=generator).half()
    inputs = [SimulatedInput(small, small, paired) for paired in (True, False)] if simulated else []
    source: BatchSource
    if enlarge is not None:
        source = TeacherPairs([(picture, side)], enlarge, recipe, scale, runtime.device)
    else:
        source = PhotographPairs(picture, inputs, recipe, scale, side, runtime.device, vgg)
    crops, _ = fixed_crops(picture, side, scale * start.network.align)
    validation = Validation(crops, bicubic(crops, scale), recipe.render_sigma, start.network.noise_channels, False)
    settings = Settings(recipe, name, precision, 0, {})
    trainer = SRTrainer(
        settings, start.network, source, validation, vgg, True, Path(), runtime.budget_bytes(), runtime.device
    )
    # Iterations with the adversarial loss are the dear ones.
    trainer.iteration = min(recipe.gan_from, recipe.iterations - 1) if recipe.adversarial else 0
    return trainer


def forecast(trainer: SRTrainer, out: Path, preparation: float, work_bytes: int) -> Forecast:
    """Measure a trial.

    Args:
        trainer: trainer of ``trial_trainer``.
        out: weights file, whose checkpoint tells the position.
        preparation: seconds before the first iteration.
        work_bytes: bytes of the work files in addition to the checkpoint.
    """
    recipe = trainer.recipe
    seconds, checkpoint_bytes = measure(trainer)
    weight_bytes = 2 if recipe.store == "fp16" else 4
    return Forecast(
        name=trainer.name,
        iterations=trainer.totals,
        seconds=seconds,
        preparation=preparation,
        position=checkpoint.position(checkpoint.checkpoint_path(out)),
        result_bytes=weight_bytes * sum(weight.numel() for weight in trainer.master.parameters()),
        work_bytes=2 * checkpoint_bytes + work_bytes,  # the old checkpoint and the new one
    )
