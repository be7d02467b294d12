"""Trainer of a super-resolution step: networks, losses and optimisers (OUR-GAN, section 3.3).

The network trains in mixed precision: master weights in fp32 are updated, and a copy computes in the precision of a
render. The first and last convolution and the residual stream of the copy stay in fp32.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.archs import Trainable
from engine.archs.checkpointing import checkpoint_blocks
from engine.device.precision import Precision
from engine.training.losses import discriminators
from engine.training.losses.features import ImageFeatures, Roll, draw_roll, maps_of
from engine.training.losses.gan import ScoreGan
from engine.training.losses.vgg import VGGFeatures
from engine.training.run.ema import Ema
from engine.training.run.events import Event, TrainingFinished, TrainingStarted, Validated
from engine.training.run.loop import IterationLosses, Trainer
from engine.training.run.optimisation import Optimisation, make_scaler
from engine.training.run.precision import HALF
from engine.training.run.seed import seeded
from engine.training.sr import footprint
from engine.training.sr.losses import SRLosses, feature_layers
from engine.training.sr.pairs import BatchSource, add_noise
from engine.training.sr.recipe import Recipe
from engine.training.sr.validation import Validation


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that decides the result; a checkpoint is resumed with equal settings only."""

    recipe: Recipe
    """Values of the training."""
    name: str
    """The network, such as "step 2"."""
    precision: Precision
    """Precision of the computing networks."""
    seed: int
    """Seed of fresh weights, crops and noise."""
    inputs: dict[str, Any]
    """Digests of all files that were read."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return dataclasses.asdict(self)


class SRTrainer(Trainer):
    """Generator with its EMA, discriminator, their optimisers, and the random generator of the run.

    Args:
        settings: settings of the run.
        network: initial network, in fp32.
        source: source of batches.
        validation: fixed crops for validation.
        vgg: network with the layers of ``feature_layers``; None if there are none.
        aligned: whether simulated inputs match the photograph pixel by pixel.
        samples: folder of the sample images.
        budget: memory that an iteration may take, bytes.
        device: device of the networks.

    Raises:
        BudgetError: an iteration takes more than ``budget``.
    """

    phase_name = "run"

    def __init__(
        self,
        settings: Settings,
        network: Trainable,
        source: BatchSource,
        validation: Validation,
        vgg: VGGFeatures | None,
        aligned: bool,
        samples: Path,
        budget: int,
        device: torch.device,
    ) -> None:
        recipe = settings.recipe
        self.name = settings.name
        self._settings, self.recipe, self.device = settings, recipe, device
        self.totals = (recipe.iterations,)
        self.source, self.validation, self.samples = source, validation, samples
        self.master: Trainable = network.to(device).to(memory_format=torch.channels_last).requires_grad_(True)  # type: ignore[call-overload]
        self.compute_copy = self._make_compute_copy()
        self.ema = Ema(self.master.parameters())
        self.vgg = vgg.to(device) if vgg is not None else None
        self.losses = SRLosses(recipe, network.scale, aligned=aligned)
        with seeded(settings.seed):
            discriminator = discriminators.build(recipe.discriminator, recipe.crop, recipe.discriminator_channels)
        self.discriminator = discriminator.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.gan = ScoreGan(self.discriminator, settings.precision, recipe.gan)
        self.uses_checkpointing = footprint.needs_checkpointing(
            settings.name, self.compute_copy, self.discriminator, self.vgg, recipe, budget, device
        )
        if self.uses_checkpointing:
            checkpoint_blocks(self.compute_copy)
        self._generator_steps, self._discriminator_steps = self._make_optimisations()
        # Noise and crops are drawn on the CPU, so that a seed means the same on every device.
        self.rng = torch.Generator().manual_seed(settings.seed)
        self.quality: dict[str, dict[str, float]] = {}
        """Measures of the last validation."""
        self._bicubic = validation.bicubic()
        self._start = validation.quality(self._enlarge, noise=False)
        validation.keep_start(self._enlarge)

    def settings(self) -> dict[str, Any]:
        return self._settings.as_dict()

    def begin(self) -> None:
        self.begun = True

    def iterate(self) -> IterationLosses:
        recipe = self.recipe
        self._set_rates()
        batch = self.source.draw(self.rng)
        lr = add_noise(batch.lr, recipe, self.master.noise_channels, self.rng)
        lr = lr.contiguous(memory_format=torch.channels_last)
        roll = self._draw_roll()
        fake = self._features(self.compute_copy(lr).float(), roll)
        with torch.no_grad():
            real = self._features(batch.hr, roll)
        losses = self.losses(fake, real, batch, self.rng)
        if recipe.adversarial > 0 and self.iteration >= recipe.gan_from:
            losses["adv"] = self.gan.generator_loss(real, fake)
        self._train_generator(self.losses.weighted_sum(losses))
        values = {name: loss.item() for name, loss in losses.items()}
        if recipe.adversarial > 0:
            critic = self.gan.train_discriminator(self._discriminator_steps, real, fake, self.rng)
            values["d"] = sum(critic.values())
        self.iteration += 1
        return IterationLosses(values)

    def state(self) -> dict[str, Any]:
        optimisations = (self._generator_steps, self._discriminator_steps)
        return {
            "iteration": self.iteration,
            "phase": self.phase,
            "begun": self.begun,
            "network": self.master.state_dict(),
            "mean": self.ema.values,
            "discriminator": self.discriminator.state_dict(),
            "optimisers": [optimisation.adam.state_dict() for optimisation in optimisations],
            "scalers": [optimisation.scaler.state_dict() for optimisation in optimisations],
            "generator": self.rng.get_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.iteration, self.phase, self.begun = state["iteration"], state["phase"], state["begun"]
        self.master.load_state_dict(state["network"])
        self.discriminator.load_state_dict(state["discriminator"])
        self._fill_compute_copy(self.master.parameters())
        self.ema.load(state["mean"])
        optimisations = (self._generator_steps, self._discriminator_steps)
        for optimisation, adam, scaler in zip(optimisations, state["optimisers"], state["scalers"], strict=True):
            optimisation.adam.load_state_dict(adam)
            optimisation.scaler.load_state_dict(scaler)
        self.rng.set_state(state["generator"])

    def is_finite(self) -> bool:
        parameters = [*self.master.parameters(), *self.discriminator.parameters()]
        return all(bool(p.isfinite().all()) for p in parameters)

    def start_event(self) -> Event:
        return TrainingStarted(self._settings.name, self.iteration, self.totals[0])

    def validate(self) -> Iterable[Event]:
        """Measure the EMA, which is written in the end, and write its samples."""
        self._fill_compute_copy(self.ema.values)
        try:
            now = self.validation.quality(self._enlarge, noise=True)
            path = self.samples / f"iteration-{self.iteration:06}.png"
            self.validation.write(self._enlarge, path)
        finally:
            self._fill_compute_copy(self.master.parameters())
        psnr = {"bicubic": self._bicubic.psnr, "start": self._start.psnr, "now": now.psnr}
        texture = {"bicubic": self._bicubic.texture, "start": self._start.texture, "now": now.texture}
        self.quality = {"psnr": _rounded(psnr, 3), "texture": _rounded(texture, 5)}
        yield Validated(self.iteration, self.validation.held_out, **self.quality, sample=path)

    def finish_event(self, seconds: float) -> Event:
        return TrainingFinished(self._settings.name, seconds)

    def weights(self) -> dict[str, Tensor]:
        """EMA of the weights under the community's names."""
        names = [name for name, _ in self.master.named_parameters()]
        return dict(zip(names, self.ema.values, strict=True))

    def _draw_roll(self) -> Roll:
        """Roll of the crops before VGG; none for the perceptual loss alone, as in the papers."""
        if not feature_layers(self.recipe.replace(perceptual=0.0)):
            return 0, 0
        return draw_roll((self.recipe.crop, self.recipe.crop), self.rng)

    def _features(self, image: Tensor, roll: Roll) -> ImageFeatures:
        return ImageFeatures(image, maps_of(image, self.vgg, roll, self._settings.precision))

    def _train_generator(self, loss: Tensor) -> None:
        """Update the master weights, their EMA and the compute copy, unless the loss is NaN or infinite."""
        if self._generator_steps.descend([loss]):
            self.ema.update(1 - self.recipe.ema)
            self._fill_compute_copy(self.master.parameters())

    def _make_optimisations(self) -> tuple[Optimisation, Optimisation]:
        recipe, betas = self.recipe, (self.recipe.betas[0], self.recipe.betas[1])
        scalers = [make_scaler(self.device, self._settings.precision) for _ in range(2)]
        generator = [(self.master.parameters(), recipe.learning_rate)]
        discriminator = [(self.discriminator.parameters(), recipe.discriminator_rate)]
        return (
            Optimisation(generator, betas, scalers[0], compute_copy=self.compute_copy.parameters()),
            Optimisation(discriminator, betas, scalers[1]),
        )

    def _make_compute_copy(self) -> Trainable:
        compute_copy = copy.deepcopy(self.master)
        half = HALF.get(self._settings.precision)
        if half is not None:
            compute_copy.to_mixed(half)
        return compute_copy

    @torch.no_grad()
    def _fill_compute_copy(self, weights: Iterable[Tensor]) -> None:
        for computing, weight in zip(self.compute_copy.parameters(), weights, strict=True):
            computing.copy_(weight)

    @torch.no_grad()
    def _enlarge(self, lr: Tensor) -> Tensor:
        """Enlarge crops one by one, which takes less memory than training."""
        enlarged = [self.compute_copy(one.to(self.device)).float().clamp(0, 1).cpu() for one in torch.split(lr, 1)]
        return torch.cat(enlarged)

    def _set_rates(self) -> None:
        """Learning rates of this iteration."""
        passed = sum(self.iteration >= milestone for milestone in self.recipe.milestones)
        self._generator_steps.set_rate(self.recipe.learning_rate * self.recipe.decay**passed)
        self._discriminator_steps.set_rate(self.recipe.discriminator_rate * self.recipe.decay**passed)


def _rounded(values: dict[str, float], digits: int) -> dict[str, float]:
    return {name: round(value, digits) for name, value in values.items()}
