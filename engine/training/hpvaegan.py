"""`train_structure`: a photograph becomes a structure file.

Knows the outer loop of step 1's training: scales, checkpoints, samples, events, interruption. What happens within an
iteration is the trainer's affair, how photographs are decoded is data's.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import cast

import torch

from engine.archs.hpvaegan import BASE_WIDTH, LEAST_WIDTH, Config, Structure
from engine.errors import EngineError, InputError, Interrupted, ResumeError, UsageError
from engine.training import checkpoint
from engine.training.data import open_photo, write_row
from engine.training.log import (
    CheckpointSaved,
    Event,
    IterationDone,
    JsonLines,
    ScaleFinished,
    ScaleStarted,
    StructureSaved,
)
from engine.training.trainer import Precision, Settings, Trainer

# Work that an iteration costs however small the picture is, in pixels of a VAE scale (20 ms beside 6.6 us a pixel).
OVERHEAD = 3000


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
    path = checkpoint.checkpoint_path(out)
    _check_out(out, path, resume)
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
        if not trainer.begun:
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
        """What is left, if a pixel costs the same at every scale (four times as much at a GAN scale)."""
        now = self.trainer.scale

        def work(m: int) -> float:
            height, width = self.trainer.structure.sizes[m]
            return OVERHEAD + height * width * (1 if self.trainer.is_vae(m) else 4)

        left = (self.totals[now] - self.trainer.iteration) * work(now)
        left += sum(self.totals[m] * work(m) for m in range(now + 1, len(self.totals)))
        return seconds * left / work(now)

    def _place(self) -> str:
        return f"scale {self.trainer.scale}, iteration {self.trainer.iteration}"

    def _last_good(self) -> str:
        return self.saved or "none"


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


def _check_out(out: Path, checkpoint_file: Path, resume: bool) -> None:
    """Find out now, not after an hour of training, that the result has no place."""
    if not out.parent.is_dir():
        raise InputError(f"{out.parent}: no such folder to write {out.name} to")
    if out.is_dir():
        raise InputError(f"{out}: is a folder: name a file to write the structure to")
    if checkpoint_file.exists() and not resume:
        raise ResumeError(f"{checkpoint_file}: a run to {out.name} is unfinished: resume it or delete that file")


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
