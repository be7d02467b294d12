"""Training of step 1, coarse to fine: patch-VAE scales 0..L, then patch-GAN scales to M.

Knows losses, optimisers and the order of things (Gur et al. 2020, algorithm 1; OUR-GAN, sec. 3.2). Does not know how
photographs are decoded (data), how runs are kept (checkpoint) or shown (log), nor what the networks look like inside.
"""

import copy
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.archs.hpvaegan import (
    BASE_WIDTH,
    LEAST_WIDTH,
    Config,
    Discriminator,
    Encoder,
    Noise,
    Structure,
    scale_sizes,
)
from engine.errors import EngineError, InputError, Interrupted, UsageError
from engine.training import checkpoint
from engine.training.data import Photo, open_photo, pyramid, write_row
from engine.training.log import (
    CheckpointSaved,
    Event,
    IterationDone,
    JsonLines,
    ScaleFinished,
    ScaleStarted,
    StructureSaved,
)

Precision = Literal["bf16", "fp16", "fp32"]
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}

LEARNING_RATE = 5e-4
VAE_DECAY = 0.2
RECONSTRUCTION = 10.0
PENALTY = 0.1
CLIP = 5.0
SIGMA = 0.05


@dataclass(frozen=True, slots=True)
class Settings:
    """All that decides the outcome of a run; a checkpoint only goes on with the same ones."""

    iterations: tuple[int, ...]
    config: Config
    base_width: int
    least_width: int
    precision: Precision
    batch: int
    seed: int
    photo: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Step:
    """The losses of one iteration, as plain numbers."""

    losses: dict[str, float]

    def bad(self) -> str | None:
        """The name of the first loss that is not finite."""
        return next((name for name, value in self.losses.items() if not math.isfinite(value)), None)


def train_structure(
    photo: Path,
    out: Path,
    *,
    iterations: int | Sequence[int] = 500,
    device: str = "cpu",
    precision: Precision = "bf16",
    seed: int = 0,
    resume: bool = False,
    config: Config | None = None,
    base_width: int = BASE_WIDTH,
    least_width: int = LEAST_WIDTH,
    batch: int = 1,
    checkpoint_every: int = 100,
    licence: str = "",
    source: str = "",
    on_event: Callable[[Event], None] = lambda event: None,
) -> Structure:
    """Train a structure on one photograph and write it to `out` (half-precision safetensors).

    `iterations` is one number for every scale or one number per scale. Next to `out` stand the log, the samples and,
    until the end, the checkpoint from which `resume` goes on.
    """
    config = config or Config()
    opened = open_photo(photo, base_width)
    settings = Settings(
        _per_scale(iterations, config), config, base_width, least_width, _known(precision), batch, seed, opened.digest
    )
    if batch < 1 or checkpoint_every < 1:
        raise UsageError(f"batch = {batch} and checkpoint_every = {checkpoint_every} must both be at least 1")
    if not out.parent.is_dir():
        raise InputError(f"{out.parent}: no such folder to write {out.name} to")
    facts = {
        "photo": {"name": photo.name, "width": opened.width, "height": opened.height, "sha256": opened.digest},
        "licence": licence,
        "source": source,
        "iterations": list(settings.iterations),
        "precision": precision,
        "seed": seed,
        "engine": version("ourgan-engine"),
    }
    started = time.monotonic()
    trainer = Trainer(settings, opened, facts, _device(device))
    path = checkpoint.checkpoint_path(out)
    if resume:
        trainer.restore(checkpoint.load(path, settings.as_dict()))
    log_path = out.with_name(out.name + ".log.jsonl")
    with JsonLines(log_path, append=resume) as log, _deferred_interrupt() as interrupted:
        run = _Run(trainer, out, path, checkpoint_every, interrupted, _both(log.write, on_event))
        run.to_the_end()
        structure = trainer.structure.cpu().requires_grad_(False)
        structure.to_file(out)
        path.unlink(missing_ok=True)
        run.emit(StructureSaved(out, out.stat().st_size, time.monotonic() - started))
    return structure


class Trainer:
    """The networks, the optimisers and the noise of a run, one iteration at a time."""

    def __init__(self, settings: Settings, photo: Photo, facts: dict[str, Any], device: torch.device) -> None:
        self.settings, self.config, self.device = settings, settings.config, device
        size = (photo.height, photo.width)
        sizes = scale_sizes(size, self.config.last, settings.base_width, settings.least_width)
        self.reals = tuple(
            real.to(device).contiguous(memory_format=torch.channels_last) for real in pyramid(photo, sizes)
        )
        # The networks draw their first weights from torch's global generator: seeded here, given back untouched.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.structure = Structure(self.config, sizes, facts).to(device)
            self.encoder = Encoder(self.config).to(device)
            self.discriminator = Discriminator(self.config).to(device)
        # All noise is drawn on the CPU, so that a seed means the same on every device.
        self.noise = torch.Generator().manual_seed(settings.seed)
        self.scale = 0
        self.iteration = 0
        self._posterior: tuple[Tensor, Tensor] | None = None
        half = settings.precision == "fp16"
        self._scalers = [torch.amp.GradScaler(device.type, enabled=half) for _ in range(2)]
        self._optimisers: list[torch.optim.Adam] = []

    def is_vae(self, m: int) -> bool:
        return m <= self.config.last_vae

    def begin_scale(self) -> None:
        """Set up what trains at this scale; at its first iteration also copy the block and measure sigma."""
        m = self.scale
        if self.iteration == 0 and m >= 2:
            self.structure.blocks[m - 1].load_state_dict(self.structure.blocks[m - 2].state_dict())
        self._posterior = None if self.is_vae(m) else self._encode_frozen()
        if self.iteration == 0 and m >= 1:
            self.structure.sigmas[m] = SIGMA * self._error_before_training()
        self._optimisers = self._make_optimisers()

    def step(self) -> Step:
        """One iteration of this scale."""
        step = self._vae_step() if self.is_vae(self.scale) else self._gan_step()
        self.iteration += 1
        return step

    def end_scale(self) -> None:
        self.scale, self.iteration, self._optimisers = self.scale + 1, 0, []

    def state(self) -> dict[str, Any]:
        return {
            "scale": self.scale,
            "iteration": self.iteration,
            "structure": self.structure.state_dict(),
            "encoder": self.encoder.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self._optimisers],
            "scalers": [scaler.state_dict() for scaler in self._scalers],
            "noise": self.noise.get_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.scale, self.iteration = state["scale"], state["iteration"]
        for name in ("structure", "encoder", "discriminator"):
            cast(nn.Module, getattr(self, name)).load_state_dict(state[name])
        self.noise.set_state(state["noise"])
        if self.iteration:
            self.begin_scale()
            for optimiser, kept in zip(self._optimisers, state["optimisers"], strict=True):
                optimiser.load_state_dict(kept)
            for scaler, kept in zip(self._scalers, state["scalers"], strict=True):
                scaler.load_state_dict(kept)

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
        m, (real, smallest) = self.scale, (self.reals[self.scale], self.reals[0])
        with self._autocast():
            mean, log_variance = (t.float() for t in self.encoder(smallest))
            z = self._reparameterise(mean, log_variance)
            first = self.structure.base(z)
            picture = first
            for k in range(1, m + 1):
                picture = self.structure.refine(k, picture, self._size(k))
        reconstruction = F.mse_loss(first, smallest.expand_as(first))
        if m > 0:
            reconstruction = reconstruction + F.mse_loss(picture, real.expand_as(picture))
        divergence = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).mean()
        self._descend(0, RECONSTRUCTION * reconstruction + divergence, clip=True)
        return Step({"rec": reconstruction.item(), "kl": divergence.item()})

    def _gan_step(self) -> Step:
        m, n, real = self.scale, self.settings.batch, self.reals[self.scale].expand(self.settings.batch, -1, -1, -1)
        with torch.no_grad(), self._autocast():
            entry = self._lower_pictures()
        with self._autocast():
            both = self.structure.refine(m, entry, self._size(m), self._fake_noise(m))
        reconstructed, fake = both[:n], both[n:]

        self.discriminator.requires_grad_(True)
        with self._autocast():
            # One pass for both: nothing in the discriminator mixes the samples of a batch.
            scores = self.discriminator(torch.cat([real, fake.detach()])).float()
        distance = scores[n:].mean() - scores[:n].mean()
        penalty = self._gradient_penalty(real, fake.detach())
        self._descend(1, distance + PENALTY * penalty, clip=False)

        self.discriminator.requires_grad_(False)
        with self._autocast():
            adversarial = -self.discriminator(fake).float().mean()
        reconstruction = F.mse_loss(reconstructed, real)
        self._descend(0, RECONSTRUCTION * reconstruction + adversarial, clip=True)
        return Step(
            {
                "rec": reconstruction.item(),
                "adv": adversarial.item(),
                "critic": distance.item(),
                "penalty": penalty.item(),
            }
        )

    def _gradient_penalty(self, real: Tensor, fake: Tensor) -> Tensor:
        """(|gradient| - 1)^2, the norm taken over the three channels of each pixel.

        fp16 would overflow in the double backward, so it leaves autocast; bf16 has the range and stays.
        """
        mix = torch.rand((), generator=self.noise).item()
        between = (mix * real + (1 - mix) * fake).requires_grad_(True)
        with self._autocast(enabled=self.settings.precision == "bf16"):
            scores = self.discriminator(between).float().sum()
        (gradient,) = torch.autograd.grad(scores, between, create_graph=True)
        return ((torch.linalg.vector_norm(gradient.float(), dim=1) - 1) ** 2).mean()

    def _descend(self, which: int, loss: Tensor, *, clip: bool) -> None:
        if not math.isfinite(loss.item()):
            # The caller sees the loss in its record and stops; the weights stay as they were.
            return
        optimiser, scaler = self._optimisers[which], self._scalers[which]
        optimiser.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if clip:
            scaler.unscale_(optimiser)
            nn.utils.clip_grad_norm_([p for group in optimiser.param_groups for p in group["params"]], CLIP)
        scaler.step(optimiser)
        scaler.update()

    def _make_optimisers(self) -> list[torch.optim.Adam]:
        """Thaw what trains at this scale, freeze the rest."""
        m, adam = self.scale, {"betas": (0.5, 0.999)}
        for module in (self.structure, self.encoder, self.discriminator):
            module.requires_grad_(False)
        groups: list[dict[str, Any]] = []
        if m > 0:
            groups.append({"params": list(self.structure.blocks[m - 1].parameters()), "lr": LEARNING_RATE})
        if self.is_vae(m):
            base = [*self.encoder.parameters(), *self.structure.decoder.parameters()]
            groups.append({"params": base, "lr": LEARNING_RATE * VAE_DECAY**m})
        for group in groups:
            for parameter in group["params"]:
                parameter.requires_grad_(True)
        optimisers = [torch.optim.Adam(groups, **adam)]  # type: ignore[arg-type]
        if not self.is_vae(m):
            self.discriminator.requires_grad_(True)
            optimisers.append(torch.optim.Adam(self.discriminator.parameters(), lr=LEARNING_RATE, betas=(0.5, 0.999)))
        return optimisers

    @torch.no_grad()
    def _lower_pictures(self) -> Tensor:
        """What G_m refines: a reconstruction (first half of the batch) and a sample (second half).

        The blocks below are frozen and normalise each sample alone, so both run as one batch.
        """
        n, (mean, log_variance) = self.settings.batch, cast(tuple[Tensor, Tensor], self._posterior)
        code = self._reparameterise(mean, log_variance)
        picture = self.structure.base(torch.cat([code, self._normal(n, self.config.latent, *self._size(0))]))
        for k in range(1, self.scale):
            picture = self.structure.refine(k, picture, self._size(k), self._fake_noise(k))
        return picture

    def _fake_noise(self, m: int) -> Tensor | None:
        """sigma_m z_m for the samples of the batch, zero for the reconstructions."""
        if self.is_vae(m):
            return None
        noise = self.structure.sigmas[m] * self._normal(self.settings.batch, 3, *self._size(m))
        return torch.cat([torch.zeros_like(noise), noise])

    def _reparameterise(self, mean: Tensor, log_variance: Tensor) -> Tensor:
        noise = self._normal(self.settings.batch, *mean.shape[1:])
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
            picture = self._reconstruct(z, self.scale)
        return F.mse_loss(picture, self.reals[self.scale]).sqrt()

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
        half = _HALF.get(self.settings.precision)
        return torch.autocast(self.device.type, dtype=half or torch.bfloat16, enabled=enabled and half is not None)


class _Run:
    """The outer loop: scales, checkpoints, samples and events around a trainer."""

    def __init__(
        self,
        trainer: Trainer,
        out: Path,
        checkpoint_file: Path,
        every: int,
        interrupted: threading.Event,
        emit: Callable[[Event], None],
    ) -> None:
        self.trainer, self.out, self.path, self.every = trainer, out, checkpoint_file, every
        self.interrupted, self.emit = interrupted, emit
        self.saved: str | None = None
        self.totals = trainer.settings.iterations
        self.whole = True

    def to_the_end(self) -> None:
        try:
            while self.trainer.scale < len(self.totals):
                self._scale()
        except KeyboardInterrupt:
            # A second Ctrl-C can hit in the middle of an iteration: that state is not worth keeping.
            if self.whole and self.trainer.finite():
                self._save()
            raise Interrupted(f"stopped at {self._place()}: resume goes on from {self._last_good()}") from None

    def _scale(self) -> None:
        trainer, m = self.trainer, self.trainer.scale
        total, started = self.totals[m], time.monotonic()
        if trainer.iteration == 0:
            self.whole = False
            trainer.begin_scale()
            self._save()
            self.whole = True
        self.emit(self._announcement())
        for _ in range(trainer.iteration, total):
            self._iteration(total)
            if trainer.iteration % self.every == 0 and trainer.iteration < total:
                self._save()
            if self.interrupted.is_set():
                raise KeyboardInterrupt
        sample = self.out.with_name(self.out.stem + "-samples") / f"scale-{m}.png"
        write_row(trainer.show(m), sample)
        trainer.end_scale()
        self.emit(ScaleFinished(m, len(self.totals), time.monotonic() - started, sample))

    def _iteration(self, total: int) -> None:
        started, m = time.monotonic(), self.trainer.scale
        self.whole = False
        step = self.trainer.step()
        if bad := step.bad():
            raise EngineError(
                f"training stopped at {self._place()}: the loss {bad!r} is {step.losses[bad]}; "
                f"last good checkpoint: {self._last_good()}; try fp32 or another seed"
            )
        self.whole = True
        seconds = time.monotonic() - started
        eta = self._eta(seconds)
        self.emit(IterationDone(m, len(self.totals), self.trainer.iteration, total, step.losses, seconds, eta))

    def _save(self) -> None:
        if not self.trainer.finite():
            raise EngineError(
                f"training stopped at {self._place()}: a weight is NaN or infinite; "
                f"last good checkpoint: {self._last_good()}; try fp32 or another seed"
            )
        checkpoint.save(self.path, self.trainer.settings.as_dict(), self.trainer.state())
        self.saved = f"{self.path} (scale {self.trainer.scale}, iteration {self.trainer.iteration})"
        self.emit(CheckpointSaved(self.trainer.scale, self.trainer.iteration, self.path))

    def _announcement(self) -> ScaleStarted:
        trainer, m = self.trainer, self.trainer.scale
        kind = "vae" if trainer.is_vae(m) else "gan"
        sigma = float(trainer.structure.sigmas[m])
        size = trainer.structure.sizes[m]
        return ScaleStarted(m, len(self.totals), size, kind, sigma, trainer.iteration, self.totals[m])

    def _eta(self, seconds: float) -> float:
        """What is left, if an iteration costs as much a pixel at every scale (four times at a GAN scale)."""
        now = self.trainer.scale

        def work(m: int) -> float:
            height, width = self.trainer.structure.sizes[m]
            return height * width * (1 if self.trainer.is_vae(m) else 4)

        left = (self.totals[now] - self.trainer.iteration) * work(now)
        left += sum(self.totals[m] * work(m) for m in range(now + 1, len(self.totals)))
        return seconds * left / work(now)

    def _place(self) -> str:
        return f"scale {self.trainer.scale}, iteration {self.trainer.iteration}"

    def _last_good(self) -> str:
        return self.saved or "none"


def seeded_noise(seed: int) -> Noise:
    """Normal values for `Structure.sample` that depend on the seed, the scale and the shape only."""

    def noise(m: int, shape: tuple[int, int, int]) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(copy.copy(seed) * 1009 + m))

    return noise


@contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """Turns the first Ctrl-C into a flag that is read between iterations; the second one interrupts at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.getsignal(signal.SIGINT)

    def remember(number: int, frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    signal.signal(signal.SIGINT, remember)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def _both(first: Callable[[Event], None], second: Callable[[Event], None]) -> Callable[[Event], None]:
    def emit(event: Event) -> None:
        first(event)
        second(event)

    return emit


def _per_scale(iterations: int | Sequence[int], config: Config) -> tuple[int, ...]:
    scales = config.last + 1
    numbers = (iterations,) * scales if isinstance(iterations, int) else tuple(iterations)
    if len(numbers) != scales or min(numbers) < 1:
        raise UsageError(f"iterations = {iterations}: give one number, or {scales} numbers, each at least 1")
    return numbers


def _known(precision: str) -> Precision:
    if precision not in ("bf16", "fp16", "fp32"):
        raise UsageError(f"precision {precision!r} is unknown: choose bf16, fp16 or fp32")
    return cast(Precision, precision)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise UsageError(f"device {name!r} cannot be used: {first}") from None
    return device
