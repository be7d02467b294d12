"""`train_structure`: a photograph becomes a structure file.

Knows what a run is put together from; what happens within an iteration is the trainer's affair, the iterations' sequence
the loop's, how photographs are decoded data's.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from engine.archs.hpvaegan import BASE_WIDTH, LEAST_WIDTH, BaseGenerator, Config
from engine.device.precision import Precision
from engine.errors import UsageError
from engine.io.photo import open_photo
from engine.model.structure_file import write_structure
from engine.training.losses.vgg import VGGFeatures, absent, open_vgg
from engine.training.run import loop
from engine.training.run.events import Event, StructureSaved
from engine.training.run.precision import known_device, known_precision
from engine.training.structure.losses import Losses
from engine.training.structure.trainer import Settings, StructureTrainer


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
    losses: Losses | None = None,
    vgg: Path | None = None,
    sigma: float = 0.05,
    ema: float = 0.0,
    checkpoint_every: int = 100,
    licence: str = "",
    source: str = "",
    on_event: Callable[[Event], None] = lambda event: None,
) -> BaseGenerator:
    """Train a structure on one photograph and write it to `out` (half-precision safetensors).

    `iterations` is one number for every scale or one number per scale. `losses`: those of the patch-GANs, by default the
    paper's; `vgg`: a file with the weights of VGG-16 or VGG-19 for those that look through it. `sigma`: the noise that a
    patch-GAN makes its detail of, in RMSEs of what the scales below leave to it (Gur et al. 2020: 0.05). `ema`: each patch-GAN
    is left as the running mean of its weights, with this decay (0: the last ones, as in the paper). Next to `out` stand the
    log, the samples and, until the end, the checkpoint from which `resume` goes on.

    Raises InputError for a file that cannot be used or weights of VGG that are not there, and as `loop.train`.
    """
    config, losses = config or Config(), losses or Losses()
    opened = open_photo(photo, base_width)
    features = _features(vgg, losses)
    settings = Settings(
        _per_scale(iterations, config),
        config,
        base_width,
        least_width,
        known_precision(precision),
        batch,
        losses,
        sigma,
        ema,
        seed,
        opened.digest,
        features.digest if features is not None else None,
    )
    if batch < 1:
        raise UsageError(f"batch = {batch}: must be at least 1")
    if not 0 <= sigma < math.inf:
        raise UsageError(f"sigma = {sigma}: must be a number of at least 0")
    if not 0 <= ema < 1:
        raise UsageError(f"ema = {ema}: must lie in 0..1, below 1")
    loop.check_every(checkpoint_every)
    loop.check_out(out, resume)
    facts = {
        "photo": {"name": photo.name, "width": opened.width, "height": opened.height, "sha256": opened.digest},
        "licence": licence,
        "source": source,
        "iterations": list(settings.iterations),
        "precision": precision,
        **asdict(losses),
        "sigma": sigma,
        "ema": ema,
        "seed": seed,
        "engine": version("ourgan-engine"),
    }
    started = time.monotonic()
    samples = out.with_name(out.stem + "-samples")
    if features is not None:
        facts["vgg"] = {"network": features.name, "sha256": features.digest}
    trainer = StructureTrainer(settings, opened, facts, samples, known_device(device), features)

    def write() -> Event:
        write_structure(trainer.structure.cpu().requires_grad_(False), out)
        return StructureSaved(out, out.stat().st_size, time.monotonic() - started)

    loop.train(trainer, out, checkpoint_every=checkpoint_every, resume=resume, on_event=on_event, write=write)
    return trainer.structure


def _features(path: Path | None, losses: Losses) -> VGGFeatures | None:
    """The network that the losses look through, if any does."""
    if not losses.layers:
        return None
    found = open_vgg(path, losses.layers)
    if found is None:
        raise absent()
    return found


def _per_scale(iterations: int | Sequence[int], config: Config) -> tuple[int, ...]:
    scales = config.last + 1
    given = (iterations,) if isinstance(iterations, int) else tuple(iterations)
    numbers = given * scales if len(given) == 1 else given
    if len(numbers) != scales or min(numbers) < 1:
        raise UsageError(f"iterations = {iterations}: give one number, or {scales} numbers, each at least 1")
    return numbers
