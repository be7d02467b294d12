"""One iteration of step 1's training at a time: the networks, their losses and their optimisers.

Knows the order of things inside a scale (Gur et al. 2020, algorithm 1; OUR-GAN, sec. 3.2): patch-VAE scales 0..L,
then patch-GAN scales to M. Does not know files, events, or when to stop.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.archs.hpvaegan import BaseGenerator, Config, NoiseSource, scale_sizes
from engine.device.precision import Precision
from engine.io.photo import Photo
from engine.training.losses.features import Frame, Look, maps_of
from engine.training.losses.texture import TEXTURE_LAYERS, FeatureWasserstein
from engine.training.losses.vgg import VGGFeatures
from engine.training.photo import pyramid, write_row
from engine.training.run.adam import Adam
from engine.training.run.events import Event, ScaleFinished, ScaleStarted
from engine.training.run.loop import Step, Trainer
from engine.training.run.precision import autocast
from engine.training.run.seed import seeded
from engine.training.structure.losses import (
    Coherence,
    Losses,
    detail_distance,
    make_adversary,
    patch_distance,
    vae_patch_distance,
)
from engine.training.structure.networks import Encoder

# Work that an iteration costs however small the picture is, in pixels of a VAE scale (20 ms beside 6.6 us a pixel).
OVERHEAD = 3000
LEARNING_RATE = 5e-4
VAE_DECAY = 0.2
RECONSTRUCTION = 10.0
CLIP = 5.0


@dataclass(frozen=True, slots=True)
class Settings:
    """All that decides the outcome of a run; a checkpoint only goes on with the same ones."""

    iterations: tuple[int, ...]
    config: Config
    base_width: int
    least_width: int
    precision: Precision
    batch: int
    losses: Losses
    sigma: float
    ema: float
    seed: int
    photo: str
    vgg: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class StructureTrainer(Trainer):
    """The networks, the optimisers and the noise of a run; a phase is a scale.

    Beside the paper's losses a patch-GAN may have some of texture: the patches of its samples, and the vectors of VGG's maps of
    them, should be distributed as the photograph's, height by height (docs/decisions/0013 and 0014). And so may a patch-VAE,
    whose samples the paper leaves to themselves (docs/decisions/0018).

    A patch-GAN's block is left as the running mean of its last weights: from iteration to iteration colours swing, and the
    scales above would build upon the swing of the last one.
    """

    phase_name = "scale"

    def __init__(
        self,
        settings: Settings,
        photo: Photo,
        facts: dict[str, Any],
        samples: Path,
        device: torch.device,
        vgg: VGGFeatures | None = None,
    ) -> None:
        """`vgg`: has the layers that the settings' losses name, None if they name none."""
        self._settings, self.config, self.device, self.samples = settings, settings.config, device, samples
        self.totals = settings.iterations
        size = (photo.height, photo.width)
        sizes = scale_sizes(size, self.config.last, settings.base_width, settings.least_width)
        self.reals = tuple(
            real.to(device).contiguous(memory_format=torch.channels_last) for real in pyramid(photo, sizes)
        )
        # The networks draw their first weights from torch's global generator: seeded here, given back untouched.
        with seeded(settings.seed):
            self.structure = BaseGenerator(self.config, sizes, facts).to(device)
            self.encoder = Encoder(self.config).to(device)
            self.adversary = make_adversary(settings.losses.discriminator, self.config, settings.precision, device)
        self.discriminator = self.adversary.network
        self.vgg = vgg.to(device) if vgg is not None else None
        # All noise is drawn on the CPU, so that a seed means the same on every device.
        self.noise = torch.Generator().manual_seed(settings.seed)
        self._posterior: tuple[Tensor, Tensor] | None = None
        self._patches = [
            vae_patch_distance(size) if self.is_vae(m) else patch_distance(size) for m, size in enumerate(sizes)
        ]
        self._details = [detail_distance(size) for size in sizes]
        self._features, self._coherence = FeatureWasserstein(), Coherence()
        half = settings.precision == "fp16"
        self._scalers = [torch.amp.GradScaler(device.type, enabled=half) for _ in range(2)]
        self._optimisers: list[Adam] = []
        self._mean: list[Tensor] = []

    def is_vae(self, m: int) -> bool:
        return m <= self.config.last_vae

    def settings(self) -> dict[str, Any]:
        return self._settings.as_dict()

    def begin(self) -> None:
        """Set up what trains at this scale; unless it was begun before, copy the block and measure sigma."""
        m = self.phase
        if not self.begun and m >= 2:
            self.structure.blocks[m - 1].load_state_dict(self.structure.blocks[m - 2].state_dict())
        self._posterior = None if self.is_vae(m) else self._encode_frozen()
        if not self.begun and m >= 1:
            self.structure.sigmas[m] = self._settings.sigma * self._error_before_training()
        self._optimisers = self._make_optimisers()
        self._mean = [] if self.is_vae(m) else [p.detach().clone() for p in self.structure.blocks[m - 1].parameters()]
        self.begun = True

    def step(self) -> Step:
        """One iteration of this scale."""
        step = self._vae_step() if self.is_vae(self.phase) else self._gan_step()
        self.iteration += 1
        self._follow()
        return step

    def end(self) -> None:
        super().end()
        self._optimisers, self._mean = [], []

    def state(self) -> dict[str, Any]:
        return {
            "phase": self.phase,
            "iteration": self.iteration,
            "begun": self.begun,
            "structure": self.structure.state_dict(),
            "encoder": self.encoder.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self._optimisers],
            "scalers": [scaler.state_dict() for scaler in self._scalers],
            "mean": self._mean,
            "noise": self.noise.get_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.phase, self.iteration, self.begun = state["phase"], state["iteration"], state["begun"]
        for name in ("structure", "encoder", "discriminator"):
            cast(nn.Module, getattr(self, name)).load_state_dict(state[name])
        self.noise.set_state(state["noise"])
        if self.begun:
            self.begin()
            for optimiser, kept in zip(self._optimisers, state["optimisers"], strict=True):
                optimiser.load_state_dict(kept)
            for scaler, kept in zip(self._scalers, state["scalers"], strict=True):
                scaler.load_state_dict(kept)
            for mean, kept in zip(self._mean, state["mean"], strict=True):
                mean.copy_(kept)

    def started(self) -> Event:
        m = self.phase
        kind, sigma = "vae" if self.is_vae(m) else "gan", float(self.structure.sigmas[m])
        return ScaleStarted(m, len(self.totals), self._size(m), kind, sigma, self.iteration, self.totals[m])

    def finished(self, seconds: float) -> Event:
        sample = self.samples / f"scale-{self.phase}.png"
        write_row(self.show(self.phase), sample)
        return ScaleFinished(self.phase, len(self.totals), seconds, sample)

    def work(self, phase: int) -> float:
        """A pixel costs the same at every scale, four times as much at a GAN scale."""
        height, width = self._size(phase)
        return OVERHEAD + height * width * (1 if self.is_vae(phase) else 4)

    def finite(self) -> bool:
        """Whether every weight is still a number."""
        modules = (self.structure, self.encoder, self.discriminator)
        return all(bool(p.isfinite().all()) for module in modules for p in module.parameters())

    @torch.no_grad()
    def show(self, m: int, count: int = 3) -> list[Tensor]:
        """The photograph at scale m, its reconstruction from the mean code, and samples of fixed seeds; in [0, 1]."""
        with self._autocast():
            code = self._encode_frozen()[0]
            pictures = [self.reals[m][0], self._reconstruct(code, m)[0]]
            pictures += [self.structure.sample(seeded_noise(seed), last=m) * 2 - 1 for seed in range(count)]
        return [((picture.float().cpu() + 1) / 2).clamp(0, 1) for picture in pictures]

    def _vae_step(self) -> Step:
        """What G_0 makes and what this scale makes of it are trained together."""
        m, n, weights = self.phase, self._settings.batch, self._settings.losses
        with self._autocast():
            mean, log_variance = (t.float() for t in self.encoder(self.reals[0]))
            codes = [self._reparameterise(mean, log_variance)]
            if weights.vae_texture or weights.vae_coherence:
                codes.append(self._normal(*codes[0].shape))
            pictures = [self.structure.base(torch.cat(codes))]
            for k in range(1, m + 1):
                pictures.append(self.structure.refine(k, pictures[-1], self._size(k)))
        losses = {"kl": -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).mean()}
        for k in dict.fromkeys((0, m)):
            for name, loss in self._of_vae(k, pictures[k][:n], pictures[k][n:]).items():
                losses[name] = losses[name] + loss if name in losses else loss
        self._descend(0, [self._weighted(losses)], clip=True)
        return Step({name: loss.item() for name, loss in losses.items()})

    def _of_vae(self, k: int, reconstructed: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """The losses of scale k's pictures whose weight is not zero."""
        weights, real = self._settings.losses, self.reals[k].expand_as(reconstructed)
        found = {"rec": F.mse_loss(reconstructed, real)}
        if weights.vae_texture:
            found["vae_texture"] = self._patches[k]((fake + 1) / 2, (real + 1) / 2, self.noise)
        if weights.vae_coherence:
            found["vae_coherence"] = self._coherence((fake + 1) / 2, (real + 1) / 2)
        return found

    def _gan_step(self) -> Step:
        m, n, real = self.phase, self._settings.batch, self.reals[self.phase].expand(self._settings.batch, -1, -1, -1)
        with torch.no_grad(), self._autocast():
            entry = self._lower_pictures()
        with self._autocast():
            both = self.structure.refine(m, entry, self._size(m), self._fake_noise(m))
        reconstructed, fake = both[:n], both[n:]
        frame = Frame.draw(self._size(m), self.noise) if self.vgg is not None else Frame(0, 0, 0, 0)
        ours = self._look(fake, frame)
        with torch.no_grad():
            theirs = self._look(real, frame)

        self.discriminator.requires_grad_(True)
        critic: dict[str, float] = {}

        def critic_losses() -> Iterator[Tensor]:
            for name, weight, loss in self.adversary.losses(theirs, ours.detach(), self.noise):
                critic[name] = loss.item()
                yield weight * loss
                del loss  # and with it its graph

        self._descend(1, critic_losses(), clip=False)

        self.discriminator.requires_grad_(False)
        losses = {"rec": F.mse_loss(reconstructed, real), "adv": self.adversary.fooling(ours)}
        losses |= self._texture(ours, theirs, frame)
        self._descend(0, [self._weighted(losses)], clip=True)
        return Step({name: loss.item() for name, loss in losses.items()} | critic)

    def _look(self, picture: Tensor, frame: Frame) -> Look:
        if self.vgg is None:
            return Look(picture, {})
        return Look(picture, maps_of(frame.around((picture + 1) / 2), self.vgg, (0, 0), self._settings.precision))

    def _texture(self, ours: Look, theirs: Look, frame: Frame) -> dict[str, Tensor]:
        """The distances whose weight is not zero."""
        weights, m = self._settings.losses, self.phase
        fake, real = ((look.picture + 1) / 2 for look in (ours, theirs))
        found = {}
        if weights.texture:
            found["texture"] = self._patches[m](fake, real, self.noise)
        if weights.detail:
            found["detail"] = self._details[m](fake, real, self.noise)
        if weights.feature_texture:
            fakes, reals = (look.layers(TEXTURE_LAYERS) for look in (ours, theirs))
            heights = frame.heights(self._size(m)[0])
            found["feature_texture"] = self._features(fakes, reals, self.noise, heights=heights)
        return found

    def _weighted(self, losses: dict[str, Tensor]) -> Tensor:
        given = self._settings.losses
        weights = asdict(given) | {"rec": RECONSTRUCTION, "kl": 1.0, "adv": given.adversarial}
        return torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()

    def _descend(self, which: int, losses: Iterable[Tensor], *, clip: bool) -> None:
        """A step down the sum of the losses, whose graphs need not be alive together: one is asked for after the other."""
        optimiser, scaler = self._optimisers[which], self._scalers[which]
        optimiser.zero_grad()
        for loss in losses:
            if not math.isfinite(loss.item()):
                # The caller sees the loss in its record and stops; the weights stay as they were.
                return
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if clip:
            scaler.unscale_(optimiser)  # type: ignore[arg-type]
            nn.utils.clip_grad_norm_([p for group in optimiser.param_groups for p in group["params"]], CLIP)
        scaler.step(optimiser)  # type: ignore[arg-type]
        scaler.update()

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the running mean (at first the plain mean, so that the start has no weight); leave it in the block's
        place after the last iteration.
        """
        if not self._mean:
            return
        share = max(1 - self._settings.ema, 1 / self.iteration)
        last = self.iteration == self.totals[self.phase]
        for mean, weight in zip(self._mean, self.structure.blocks[self.phase - 1].parameters(), strict=True):
            mean.lerp_(weight, share)
            if last:
                weight.copy_(mean)

    def _make_optimisers(self) -> list[Adam]:
        """Thaw what trains at this scale, freeze the rest."""
        m = self.phase
        for module in (self.structure, self.encoder, self.discriminator):
            module.requires_grad_(False)
        groups: list[tuple[list[nn.Parameter], float]] = []
        if m > 0:
            groups.append((list(self.structure.blocks[m - 1].parameters()), LEARNING_RATE))
        if self.is_vae(m):
            base = [*self.encoder.parameters(), *self.structure.decoder.parameters()]
            groups.append((base, LEARNING_RATE * VAE_DECAY**m))
        for weights, _ in groups:
            for weight in weights:
                weight.requires_grad_(True)
        optimisers = [Adam(groups, (0.5, 0.999))]
        if not self.is_vae(m):
            self.discriminator.requires_grad_(True)
            of_critic = [(self.discriminator.parameters(), self.adversary.rate)]
            optimisers.append(Adam(of_critic, self.adversary.betas))
        return optimisers

    @torch.no_grad()
    def _lower_pictures(self) -> Tensor:
        """What G_m refines: a reconstruction (first half of the batch) and a sample (second half).

        The blocks below are frozen and normalise each sample alone, so both run as one batch.
        """
        n, (mean, log_variance) = self._settings.batch, cast(tuple[Tensor, Tensor], self._posterior)
        code = self._reparameterise(mean, log_variance)
        picture = self.structure.base(torch.cat([code, self._normal(n, self.config.latent, *self._size(0))]))
        for k in range(1, self.phase):
            picture = self.structure.refine(k, picture, self._size(k), self._fake_noise(k))
        return picture

    def _fake_noise(self, m: int) -> Tensor | None:
        """sigma_m z_m for the samples of the batch, zero for the reconstructions."""
        if self.is_vae(m):
            return None
        noise = self.structure.sigmas[m] * self._normal(self._settings.batch, 3, *self._size(m))
        return torch.cat([torch.zeros_like(noise), noise])

    def _reparameterise(self, mean: Tensor, log_variance: Tensor) -> Tensor:
        noise = self._normal(self._settings.batch, *mean.shape[1:])
        return mean + torch.exp(0.5 * log_variance) * noise

    @torch.no_grad()
    def _encode_frozen(self) -> tuple[Tensor, Tensor]:
        """Mean and log-variance without moving the power iteration of the spectral norm."""
        self.encoder.eval()
        with self._autocast():
            mean, log_variance = (t.float() for t in self.encoder(self.reals[0]))
        self.encoder.train()
        return mean, log_variance

    @torch.no_grad()
    def _error_before_training(self) -> Tensor:
        """RMSE between the photograph and its reconstruction through the block that is about to be trained."""
        with self._autocast():
            mean, log_variance = self._encode_frozen()
            z = mean + torch.exp(0.5 * log_variance) * self._normal(*mean.shape)
            picture = self._reconstruct(z, self.phase)
        return F.mse_loss(picture, self.reals[self.phase]).sqrt()

    def _reconstruct(self, z: Tensor, m: int) -> Tensor:
        picture = self.structure.base(z)
        for k in range(1, m + 1):
            picture = self.structure.refine(k, picture, self._size(k))
        return picture

    def _normal(self, *shape: int) -> Tensor:
        noise = torch.randn(shape, generator=self.noise).to(self.device)
        return noise.contiguous(memory_format=torch.channels_last)

    def _size(self, m: int) -> tuple[int, int]:
        return self.structure.sizes[m]

    def _autocast(self, enabled: bool = True) -> torch.autocast:
        return autocast(self.device, self._settings.precision, enabled)


def seeded_noise(seed: int) -> NoiseSource:
    """Normal values for `BaseGenerator.sample` that depend on the seed, the scale and the shape only."""

    def noise(m: int, shape: tuple[int, int, int]) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed * 1009 + m))

    return noise
