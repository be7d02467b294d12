"""Trainer of step 1: networks, losses and optimisers of one scale after the other.

Patch-VAE scales 0..L come first, then patch-GAN scales up to M (Gur et al. 2020, algorithm 1; OUR-GAN, section 3.2).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.archs.hpvaegan import BaseGenerator, Config, NoiseSource, scale_sizes
from engine.device.precision import Precision
from engine.io.photo import Photo
from engine.training.losses.features import ImageFeatures, ReflectPad, draw_roll, maps_of
from engine.training.losses.vgg import VGGFeatures
from engine.training.photo import pyramid, write_row
from engine.training.run.ema import Ema
from engine.training.run.events import Event, ScaleFinished, ScaleStarted
from engine.training.run.loop import IterationLosses, Trainer
from engine.training.run.optimisation import Optimisation, make_scaler
from engine.training.run.precision import autocast
from engine.training.run.seed import seeded
from engine.training.structure.losses import DISCRIMINATOR_ADAM, LossWeights, SampleLosses, make_gan, to_unit
from engine.training.structure.networks import Encoder

LEARNING_RATE = 5e-4
VAE_DECAY = 0.2
"""Factor of the learning rate of encoder and decoder from scale to scale."""
RECONSTRUCTION = 10.0
"""Weight of the reconstruction loss."""
CLIP = 5.0
"""Largest norm of the generator's gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that decides the result; a checkpoint is resumed with equal settings only."""

    iterations: tuple[int, ...]
    """Iterations of each scale."""
    config: Config
    """Size and kind of the networks."""
    base_width: int
    """Width of the last scale, pixels."""
    least_width: int
    """Width of the first scale, pixels."""
    precision: Precision
    """Precision of the convolutions."""
    batch: int
    """Copies of the photograph in a batch."""
    losses: LossWeights
    """Weights of the losses, and the discriminator."""
    sigma: float
    """Noise of a patch-GAN, in RMSE of the reconstruction by the scales below."""
    ema: float
    """Decay of the EMA of a patch-GAN's weights."""
    seed: int
    """Seed of the initial weights and of all noise."""
    photo: str
    """SHA-256 of the photograph."""
    vgg: str | None = None
    """SHA-256 of VGG's weights; None without VGG."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return asdict(self)


class StructureTrainer(Trainer):
    """Networks, optimisers and noise of a run; a phase is a scale.

    In addition to the paper's losses, samples of patch-GANs (decisions 0013 and 0014) and patch-VAEs (0018) may be trained
    towards the photograph's texture. A patch-GAN is left as the EMA of its weights: colours swing from iteration to
    iteration, and the scales above would learn to correct the swing of the last one.

    Args:
        settings: settings of the run.
        photo: the photograph.
        provenance: metadata of the structure file.
        samples: folder of the sample images.
        device: device of the networks.
        vgg: network with the layers of ``settings.losses.layers``; None if there are none.
        wraps: whether sample images repeat along (rows, columns); with circular padding they always do.
    """

    phase_name = "scale"

    def __init__(
        self,
        settings: Settings,
        photo: Photo,
        provenance: dict[str, Any],
        samples: Path,
        device: torch.device,
        vgg: VGGFeatures | None = None,
        wraps: tuple[bool, bool] = (False, False),
    ) -> None:
        self._wraps = (True, True) if settings.config.padding == "circular" else wraps
        self._settings, self.config, self.device, self.samples = settings, settings.config, device, samples
        self.totals = settings.iterations
        size = (photo.height, photo.width)
        sizes = scale_sizes(size, self.config.last, settings.base_width, settings.least_width)
        self.reals = tuple(
            real.to(device).contiguous(memory_format=torch.channels_last) for real in pyramid(photo, sizes)
        )
        with seeded(settings.seed):
            self.structure = BaseGenerator(self.config, sizes, provenance).to(device)
            self.encoder = Encoder(self.config).to(device)
            self.gan = make_gan(settings.losses.discriminator, self.config, settings.precision, device)
        self.discriminator = self.gan.discriminator
        self.vgg = vgg.to(device) if vgg is not None else None
        # Noise is drawn on the CPU, so that a seed means the same on every device.
        self.rng = torch.Generator().manual_seed(settings.seed)
        self._posterior: tuple[Tensor, Tensor] | None = None
        self._sample_losses = SampleLosses(settings.losses, sizes, self.config.last_vae)
        self._scalers = [make_scaler(device, settings.precision) for _ in range(2)]
        self._optimisations: list[Optimisation] = []
        self._ema: Ema | None = None

    def is_vae(self, scale: int) -> bool:
        """Whether a scale is a patch-VAE's."""
        return scale <= self.config.last_vae

    def settings(self) -> dict[str, Any]:
        return self._settings.as_dict()

    def begin(self) -> None:
        """Set up the training of this scale. A new patch starts as a copy of the one below, and its sigma is measured."""
        m = self.phase
        if not self.begun and m >= 2:
            self.structure.blocks[m - 1].load_state_dict(self.structure.blocks[m - 2].state_dict())
        self._posterior = None if self.is_vae(m) else self._encode()
        if not self.begun and m >= 1:
            self.structure.sigmas[m] = self._settings.sigma * self._error_before_training()
        self._optimisations = self._make_optimisations()
        self._ema = None if self.is_vae(m) else Ema(self.structure.blocks[m - 1].parameters())
        self.begun = True

    def iterate(self) -> IterationLosses:
        losses = self._vae_iteration() if self.is_vae(self.phase) else self._gan_iteration()
        self.iteration += 1
        self._update_ema()
        return losses

    def end(self) -> None:
        super().end()
        self._optimisations, self._ema = [], None

    def state(self) -> dict[str, Any]:
        return {
            "phase": self.phase,
            "iteration": self.iteration,
            "begun": self.begun,
            "structure": self.structure.state_dict(),
            "encoder": self.encoder.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "optimisers": [optimisation.adam.state_dict() for optimisation in self._optimisations],
            "scalers": [scaler.state_dict() for scaler in self._scalers],
            "mean": [] if self._ema is None else self._ema.values,
            "noise": self.rng.get_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.phase, self.iteration, self.begun = state["phase"], state["iteration"], state["begun"]
        for name in ("structure", "encoder", "discriminator"):
            cast(nn.Module, getattr(self, name)).load_state_dict(state[name])
        self.rng.set_state(state["noise"])
        if not self.begun:
            return
        self.begin()
        for optimisation, saved in zip(self._optimisations, state["optimisers"], strict=True):
            optimisation.adam.load_state_dict(saved)
        for scaler, saved in zip(self._scalers, state["scalers"], strict=True):
            scaler.load_state_dict(saved)
        if self._ema is not None:
            self._ema.load(state["mean"])

    def start_event(self) -> Event:
        m = self.phase
        kind, sigma = "vae" if self.is_vae(m) else "gan", float(self.structure.sigmas[m])
        return ScaleStarted(m, len(self.totals), self._size(m), kind, sigma, self.iteration, self.totals[m])

    def finish_event(self, seconds: float) -> Event:
        sample = self.samples / f"scale-{self.phase}.png"
        write_row(self.sample_images(self.phase), sample)
        return ScaleFinished(self.phase, len(self.totals), seconds, sample)

    def is_finite(self) -> bool:
        modules = (self.structure, self.encoder, self.discriminator)
        return all(bool(p.isfinite().all()) for module in modules for p in module.parameters())

    @torch.no_grad()
    def sample_images(self, scale: int, count: int = 3) -> list[Tensor]:
        """The photograph, its reconstruction from the mean code, and ``count`` samples of fixed seeds, [3, H, W] in [0, 1]."""
        with self._autocast():
            code = self._encode()[0]
            images = [self.reals[scale][0], self._reconstruct(code, scale)[0]]
            generator = self.structure.wrapped(self._wraps)
            images += [generator.sample(seeded_noise(seed), last=scale) * 2 - 1 for seed in range(count)]
        return [to_unit(image.float().cpu()).clamp(0, 1) for image in images]

    def _vae_iteration(self) -> IterationLosses:
        """Train the decoder and this scale's block together."""
        m, n, weights = self.phase, self._settings.batch, self._settings.losses
        with self._autocast():
            mean, log_variance = (t.float() for t in self.encoder(self.reals[0]))
            codes = [self._reparameterise(mean, log_variance)]
            if weights.vae_texture or weights.vae_coherence:
                codes.append(self._normal(*codes[0].shape))
            images = [self.structure.base(torch.cat(codes))]
            for k in range(1, m + 1):
                images.append(self.structure.refine(k, images[-1], self._size(k)))
        losses = {"kl": -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).mean()}
        for k in dict.fromkeys((0, m)):
            real = self.reals[k].expand_as(images[k][:n])
            scale_losses = {"rec": F.mse_loss(images[k][:n], real)}
            scale_losses |= self._sample_losses.vae(k, *self._moved(images[k][n:], real), self.rng)
            for name, loss in scale_losses.items():
                losses[name] = losses[name] + loss if name in losses else loss
        self._optimisations[0].descend([self._weighted_sum(losses)])
        return IterationLosses({name: loss.item() for name, loss in losses.items()})

    def _gan_iteration(self) -> IterationLosses:
        """Train the discriminator, then this scale's block."""
        m, n = self.phase, self._settings.batch
        real = self.reals[m].expand(n, -1, -1, -1)
        with torch.no_grad(), self._autocast():
            below = self._images_below()
        with self._autocast():
            both = self.structure.refine(m, below, self._size(m), self._fake_noise(m))
        reconstructed, (fake, moved) = both[:n], self._moved(both[n:], real)
        pad = ReflectPad.draw(self._size(m), self.rng) if self.vgg is not None else ReflectPad(0, 0, 0, 0)
        fake_features = self._features(fake, pad)
        with torch.no_grad():
            real_features = self._features(moved, pad)
        critic = self.gan.train_discriminator(self._optimisations[1], real_features, fake_features, self.rng)
        losses = {
            "rec": F.mse_loss(reconstructed, real),
            "adv": self.gan.generator_loss(real_features, fake_features),
        }
        heights = pad.heights(self._size(m)[0])
        losses |= self._sample_losses.gan(m, fake_features, real_features, heights, self.rng)
        self._optimisations[0].descend([self._weighted_sum(losses)])
        return IterationLosses({name: loss.item() for name, loss in losses.items()} | critic)

    def _moved(self, fake: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Samples and photograph as the losses see them: where they repeat, both begin at the same random pixel."""
        if self.config.padding != "circular":
            return fake, real
        roll = draw_roll((real.shape[2], real.shape[3]), self.rng)
        return fake.roll(roll, (2, 3)), real.roll(roll, (2, 3))

    def _features(self, image: Tensor, pad: ReflectPad) -> ImageFeatures:
        if self.vgg is None:
            return ImageFeatures(image, {})
        return ImageFeatures(image, maps_of(pad(to_unit(image)), self.vgg, (0, 0), self._settings.precision))

    def _weighted_sum(self, losses: dict[str, Tensor]) -> Tensor:
        weights = self._settings.losses
        by_name = asdict(weights) | {"rec": RECONSTRUCTION, "kl": 1.0, "adv": weights.adversarial}
        return torch.stack([by_name[name] * loss for name, loss in losses.items()]).sum()

    def _update_ema(self) -> None:
        """Update the EMA (first a plain mean, so that the start has no weight); after the last iteration it replaces the
        block's weights.
        """
        if self._ema is None:
            return
        self._ema.update(max(1 - self._settings.ema, 1 / self.iteration))
        if self.iteration == self.totals[self.phase]:
            self._ema.copy_to_weights()

    def _make_optimisations(self) -> list[Optimisation]:
        """Optimisations of the generator and, at a patch-GAN scale, the discriminator; all other weights are frozen."""
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
        optimisations = [Optimisation(groups, (0.5, 0.999), self._scalers[0], clip=CLIP)]
        if not self.is_vae(m):
            rate, betas = DISCRIMINATOR_ADAM[self._settings.losses.discriminator]
            optimisations.append(Optimisation([(self.discriminator.parameters(), rate)], betas, self._scalers[1]))
        return optimisations

    @torch.no_grad()
    def _images_below(self) -> Tensor:
        """Input of this scale's block: reconstructions (first half of the batch) and samples (second half).

        Both run as one batch: the blocks below are frozen and normalise each sample alone.
        """
        n, (mean, log_variance) = self._settings.batch, cast(tuple[Tensor, Tensor], self._posterior)
        code = self._reparameterise(mean, log_variance)
        image = self.structure.base(torch.cat([code, self._normal(n, self.config.latent, *self._size(0))]))
        for k in range(1, self.phase):
            image = self.structure.refine(k, image, self._size(k), self._fake_noise(k))
        return image

    def _fake_noise(self, m: int) -> Tensor | None:
        """Zeros for the reconstructions of a batch and sigma_m z_m for its samples; None at a patch-VAE scale."""
        if self.is_vae(m):
            return None
        noise = self.structure.sigmas[m] * self._normal(self._settings.batch, 3, *self._size(m))
        return torch.cat([torch.zeros_like(noise), noise])

    def _reparameterise(self, mean: Tensor, log_variance: Tensor) -> Tensor:
        noise = self._normal(self._settings.batch, *mean.shape[1:])
        return mean + torch.exp(0.5 * log_variance) * noise

    @torch.no_grad()
    def _encode(self) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the code; the power iteration of the spectral norm does not advance."""
        self.encoder.eval()
        with self._autocast():
            mean, log_variance = (t.float() for t in self.encoder(self.reals[0]))
        self.encoder.train()
        return mean, log_variance

    @torch.no_grad()
    def _error_before_training(self) -> Tensor:
        """RMSE between the photograph and its reconstruction by this scale's untrained block."""
        with self._autocast():
            mean, log_variance = self._encode()
            z = mean + torch.exp(0.5 * log_variance) * self._normal(*mean.shape)
            image = self._reconstruct(z, self.phase)
        return F.mse_loss(image, self.reals[self.phase]).sqrt()

    def _reconstruct(self, z: Tensor, scale: int) -> Tensor:
        image = self.structure.base(z)
        for k in range(1, scale + 1):
            image = self.structure.refine(k, image, self._size(k))
        return image

    def _normal(self, *shape: int) -> Tensor:
        noise = torch.randn(shape, generator=self.rng).to(self.device)
        return noise.contiguous(memory_format=torch.channels_last)

    def _size(self, scale: int) -> tuple[int, int]:
        return self.structure.sizes[scale]

    def _autocast(self) -> torch.autocast:
        return autocast(self.device, self._settings.precision)


def seeded_noise(seed: int) -> NoiseSource:
    """Noise for ``BaseGenerator.sample`` that depends on the seed, the scale and the shape only."""

    def noise(m: int, shape: tuple[int, int, int]) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed * 1009 + m))

    return noise
