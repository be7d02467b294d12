"""One iteration of a super-resolution step's fine-tuning at a time: networks, losses, optimisers (OUR-GAN, sec. 3.3).

The network trains in the precision in which it renders: fp32 weights are kept and updated, and a copy of them computes,
in half precision where that is asked for (first and last convolution and the residual stream stay in fp32). Does not know
files.
"""

import copy
import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.archs import Upscaler
from engine.device.precision import Precision
from engine.training.losses import discriminators
from engine.training.losses.features import Look, Shift, draw_shift, maps_of
from engine.training.losses.gan import discriminator_loss, generator_loss
from engine.training.losses.texture import TEXTURE_LAYERS, Checkerboard, FeatureWasserstein, SlicedWasserstein
from engine.training.losses.vgg import VGGFeatures
from engine.training.run.adam import Adam
from engine.training.run.events import Event, Reviewed, TrainingFinished, TrainingStarted
from engine.training.run.loop import Step, Trainer
from engine.training.run.precision import HALF, autocast
from engine.training.run.seed import seeded
from engine.training.sr import footprint
from engine.training.sr.degradations import bicubic
from engine.training.sr.losses import PERCEPTUAL, consistency_loss, perceptual_loss
from engine.training.sr.pairs import Batch, BatchSource, add_noise
from engine.training.sr.recipe import Recipe
from engine.training.sr.validation import Validation


@dataclass(frozen=True, slots=True)
class Settings:
    """All that decides the outcome of a run: `name` says what is trained, `inputs` are digests of all that was read."""

    recipe: Recipe
    name: str
    precision: Precision
    seed: int
    inputs: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def feature_layers(recipe: Recipe) -> tuple[str, ...]:
    """The layers of VGG that the recipe's losses look at."""
    wanted: list[str] = []
    if recipe.perceptual:
        wanted += PERCEPTUAL[recipe.perceptual_layers].weights
    if recipe.feature_texture:
        wanted += TEXTURE_LAYERS
    if recipe.adversarial and recipe.discriminator == "projected":
        wanted += discriminators.PROJECTED_LAYERS
    return tuple(dict.fromkeys(wanted))


class SRTrainer(Trainer):
    """The generator, its running mean, the discriminator, their optimisers and the run's one random generator."""

    phase_name = "run"

    def __init__(
        self,
        settings: Settings,
        network: Upscaler,
        source: BatchSource,
        review: Validation,
        vgg: VGGFeatures | None,
        aligned: bool,
        samples: Path,
        budget: int,
        device: torch.device,
    ) -> None:
        """`vgg`: has the layers that `feature_layers` names, None if there are none. `aligned`: chain crops match the
        photograph's pixel by pixel. `budget`: bytes that an iteration may take.
        """
        self._settings, self.recipe, self.device = settings, settings.recipe, device
        self.totals = (settings.recipe.iterations,)
        self.source, self.review, self.samples, self.aligned = source, review, samples, aligned
        self.network: Upscaler = network.to(device).to(memory_format=torch.channels_last).requires_grad_(True)  # type: ignore[call-overload]
        self.worker = self._make_worker()
        self.mean = [p.detach().clone() for p in self.network.parameters()]
        self.vgg = vgg.to(device) if vgg is not None else None
        self.texture, self.feature_texture = SlicedWasserstein(phases=network.scale), FeatureWasserstein()
        self.detail = SlicedWasserstein(3, scales=3, phases=network.scale, detail=True)
        self.checkerboard = Checkerboard(network.scale)
        recipe = self.recipe
        with seeded(settings.seed):
            discriminator = discriminators.build(recipe.discriminator, recipe.crop, recipe.discriminator_channels)
        self.discriminator = discriminator.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.computes_twice = footprint.needs_checkpointing(self.worker, self.discriminator, self.vgg, recipe, budget)
        if self.computes_twice:
            footprint.checkpoint_blocks(self.worker)
        betas = (recipe.betas[0], recipe.betas[1])
        self.optimisers = [
            Adam([(self.network.parameters(), recipe.learning_rate)], betas),
            Adam([(self.discriminator.parameters(), recipe.discriminator_rate)], betas),
        ]
        half = settings.precision == "fp16"
        self.scalers = [torch.amp.GradScaler(device.type, enabled=half) for _ in range(2)]
        # All noise and every choice of a crop is drawn on the CPU, so that a seed means the same on every device.
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.quality: dict[str, dict[str, float]] = {}  # of the last review
        self._bicubic = review.bicubic()
        self._start = review.quality(self._enlarge, noise=False)
        review.keep_start(self._enlarge)

    def settings(self) -> dict[str, Any]:
        return self._settings.as_dict()

    def begin(self) -> None:
        self.begun = True

    def step(self) -> Step:
        recipe = self.recipe
        self._set_rates()
        batch = self.source.draw(self.generator)
        lr = add_noise(batch.lr, recipe, self.network.noise_channels, self.generator)
        lr = lr.contiguous(memory_format=torch.channels_last)
        shift = self._draw_shift()
        fake = self._look(self.worker(lr).float(), shift)
        with torch.no_grad():
            real = self._look(batch.hr, shift)
        losses = self._supervised(fake, real, batch)
        if recipe.adversarial > 0 and self.iteration >= recipe.gan_from:
            losses["adv"] = self._fooling(fake, real)
        total = torch.stack([self._weight(name) * loss for name, loss in losses.items()]).sum()
        self._descend_generator(total)
        if recipe.adversarial > 0:
            losses["d"] = self._train_discriminator(fake.detach(), real)
        self.iteration += 1
        return Step({name: loss.item() for name, loss in losses.items()})

    def state(self) -> dict[str, Any]:
        return {
            "iteration": self.iteration,
            "phase": self.phase,
            "begun": self.begun,
            "network": self.network.state_dict(),
            "mean": self.mean,
            "discriminator": self.discriminator.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "scalers": [scaler.state_dict() for scaler in self.scalers],
            "generator": self.generator.get_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.iteration, self.phase, self.begun = state["iteration"], state["phase"], state["begun"]
        self.network.load_state_dict(state["network"])
        self.discriminator.load_state_dict(state["discriminator"])
        self._fill_worker(self.network.parameters())
        for mine, kept in zip(self.mean, state["mean"], strict=True):
            mine.copy_(kept)
        for name in ("optimisers", "scalers"):
            for part, kept in zip(getattr(self, name), state[name], strict=True):
                part.load_state_dict(kept)
        self.generator.set_state(state["generator"])

    def finite(self) -> bool:
        parameters = [*self.network.parameters(), *self.discriminator.parameters()]
        return all(bool(p.isfinite().all()) for p in parameters)

    def started(self) -> Event:
        return TrainingStarted(self._settings.name, self.iteration, self.totals[0])

    def reviewed(self) -> Iterable[Event]:
        """Measure and show the running mean, which is what will be written."""
        self._fill_worker(self.mean)
        try:
            now = self.review.quality(self._enlarge, noise=True)
            path = self.samples / f"iteration-{self.iteration:06}.png"
            self.review.write(self._enlarge, path)
        finally:
            self._fill_worker(self.network.parameters())
        psnr = {"bicubic": self._bicubic.psnr, "start": self._start.psnr, "now": now.psnr}
        texture = {"bicubic": self._bicubic.texture, "start": self._start.texture, "now": now.texture}
        self.quality = {"psnr": _rounded(psnr, 3), "texture": _rounded(texture, 5)}
        yield Reviewed(self.iteration, self.review.held_out, **self.quality, sample=path)

    def finished(self, seconds: float) -> Event:
        return TrainingFinished(self._settings.name, seconds)

    def weights(self) -> dict[str, Tensor]:
        """The running mean of the weights under the community's names."""
        names = [name for name, _ in self.network.named_parameters()]
        return dict(zip(names, self.mean, strict=True))

    def _draw_shift(self) -> Shift:
        """How VGG sees the crops moved around; as they are where, as in the papers, the perceptual loss alone looks through it."""
        if not feature_layers(self.recipe.replace(perceptual=0.0)):
            return 0, 0
        return draw_shift((self.recipe.crop, self.recipe.crop), self.generator)

    def _look(self, picture: Tensor, shift: Shift) -> Look:
        return Look(picture, maps_of(picture, self.vgg, shift, self._settings.precision))

    def _supervised(self, fake: Look, real: Look, batch: Batch) -> dict[str, Tensor]:
        """Every loss but the adversarial one whose weight is not zero and for which there are rows."""
        recipe, pairs = self.recipe, batch.pairs
        losses: dict[str, Tensor] = {}
        if recipe.pixel and pairs:
            losses["pixel"] = F.l1_loss(fake.picture[:pairs], real.picture[:pairs])
        if recipe.consistency:
            scale = self.network.scale
            coarse = torch.cat([bicubic(real.picture[:pairs], scale), batch.coarse])
            losses["consistency"] = consistency_loss(fake.picture, coarse, scale)
        comparable = batch.matched if self.aligned else pairs
        if recipe.perceptual and comparable:
            layers = PERCEPTUAL[recipe.perceptual_layers]
            losses["perceptual"] = perceptual_loss(fake.rows(comparable), real.rows(comparable), layers)
        if recipe.detail:
            losses["detail"] = self.detail(fake.picture, real.picture, self.generator)
        if recipe.texture:
            losses["texture"] = self.texture(fake.picture, real.picture, self.generator)
        if recipe.feature_texture:
            ours, theirs = (look.layers(TEXTURE_LAYERS) for look in (fake, real))
            losses["feature_texture"] = self.feature_texture(ours, theirs, self.generator)
        if recipe.checkerboard:
            losses["checkerboard"] = self.checkerboard(fake.picture, self.generator)
        return losses

    def _scores(self, look: Look) -> Tensor:
        with autocast(self.device, self._settings.precision):
            scores: Tensor = self.discriminator(look.maps if self.recipe.discriminator == "projected" else look.picture)
            return scores

    def _fooling(self, fake: Look, real: Look) -> Tensor:
        self.discriminator.requires_grad_(False)
        scores = self._scores(fake)
        with torch.no_grad():
            real_scores = self._scores(real) if self.recipe.gan == "ragan" else None
        return generator_loss(self.recipe.gan, real_scores, scores)

    def _train_discriminator(self, fake: Look, real: Look) -> Tensor:
        self.discriminator.requires_grad_(True)
        loss = discriminator_loss(self.recipe.gan, self._scores(real), self._scores(fake))
        optimiser, scaler = self.optimisers[1], self.scalers[1]
        optimiser.zero_grad()
        if math.isfinite(loss.item()):
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            scaler.step(optimiser)  # type: ignore[arg-type]
            scaler.update()
        return loss.detach()

    def _descend_generator(self, loss: Tensor) -> None:
        """Gradients of the copy at work, applied to the weights that are kept."""
        if not math.isfinite(loss.item()):
            # The caller sees the loss in its record and stops; the weights stay as they were.
            return
        optimiser, scaler = self.optimisers[0], self.scalers[0]
        self.worker.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        for kept, working in zip(self.network.parameters(), self.worker.parameters(), strict=True):
            kept.grad = None if working.grad is None else working.grad.to(kept.dtype)
        scaler.step(optimiser)  # type: ignore[arg-type]
        scaler.update()
        for mean, kept in zip(self.mean, self.network.parameters(), strict=True):
            mean.lerp_(kept.detach(), 1 - self.recipe.ema)
        self._fill_worker(self.network.parameters())

    def _make_worker(self) -> Upscaler:
        worker = copy.deepcopy(self.network)
        half = HALF.get(self._settings.precision)
        if half is not None:
            worker.to_mixed(half)
        return worker

    @torch.no_grad()
    def _fill_worker(self, parameters: Iterable[Tensor]) -> None:
        for working, kept in zip(self.worker.parameters(), parameters, strict=True):
            working.copy_(kept)

    @torch.no_grad()
    def _enlarge(self, lr: Tensor) -> Tensor:
        """One crop at a time, so that looking takes less memory than training."""
        made = [self.worker(one.to(self.device)).float().clamp(0, 1).cpu() for one in torch.split(lr, 1)]
        return torch.cat(made)

    def _weight(self, name: str) -> float:
        recipe = self.recipe
        return {
            "pixel": recipe.pixel,
            "consistency": recipe.consistency,
            "perceptual": recipe.perceptual,
            "texture": recipe.texture,
            "detail": recipe.detail,
            "feature_texture": recipe.feature_texture,
            "checkerboard": recipe.checkerboard,
            "adv": recipe.adversarial,
        }[name]

    def _set_rates(self) -> None:
        passed = sum(self.iteration >= milestone for milestone in self.recipe.milestones)
        rates = (self.recipe.learning_rate, self.recipe.discriminator_rate)
        for optimiser, rate in zip(self.optimisers, rates, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = rate * self.recipe.decay**passed


def _rounded(values: dict[str, float], digits: int) -> dict[str, float]:
    return {name: round(value, digits) for name, value in values.items()}
