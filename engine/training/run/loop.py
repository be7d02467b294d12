"""The outer loop of every training run: iterations, checkpoints, events, interruption, NaN.

Knows no network: what an iteration does is the trainer's affair, behind `Trainer`. A run is a sequence of phases (step
1's scales; a super-resolution run has one), each of a number of iterations. Next to the output stand its log and, until
the end, its checkpoint.
"""

import math
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import EngineError, InputError, Interrupted, ResumeError, UsageError
from engine.training.run import checkpoint
from engine.training.run.events import CheckpointSaved, Event, IterationDone, JsonLines

Emit = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class Step:
    """The losses of one iteration, as plain numbers."""

    losses: dict[str, float]

    def bad(self) -> str | None:
        """The name of the first loss that is not finite."""
        return next((name for name, value in self.losses.items() if not math.isfinite(value)), None)


class Trainer(ABC):
    """What the loop drives: phase after phase, one iteration at a time.

    `state` holds all that the rest of a run depends on (weights, optimisers, the random generator): a run restored from
    it continues bit for bit on the same machine.
    """

    totals: tuple[int, ...]  # iterations of each phase
    phase: int = 0
    iteration: int = 0  # finished, within the phase
    begun: bool = False
    phase_name: str  # what a phase is called in messages

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """All that decides the outcome; a checkpoint goes on only with the same."""

    @abstractmethod
    def begin(self) -> None:
        """Set up the phase."""

    @abstractmethod
    def step(self) -> Step:
        """One iteration. It raises `iteration` by one."""

    def end(self) -> None:
        """Leave the phase."""
        self.phase, self.iteration, self.begun = self.phase + 1, 0, False

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Tensors and plain values for `restore`."""

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""

    @abstractmethod
    def finite(self) -> bool:
        """Whether every weight is still a number."""

    @abstractmethod
    def started(self) -> Event:
        """The event that announces the phase."""

    def work(self, phase: int) -> float:
        """What an iteration of a phase costs, in any unit that all phases share."""
        return 1.0

    def reviewed(self) -> Iterable[Event]:
        """What is looked at when a checkpoint is due; must not touch what `state` holds."""
        return ()

    @abstractmethod
    def finished(self, seconds: float) -> Event:
        """The event that closes the phase."""

    def place(self) -> str:
        """Where the run is, in words."""
        phase = f"{self.phase_name} {self.phase}, " if len(self.totals) > 1 else ""
        return f"{phase}iteration {self.iteration}"


def train(
    trainer: Trainer,
    out: Path,
    *,
    checkpoint_every: int,
    resume: bool,
    on_event: Emit,
    write: Callable[[], Event],
    prepared: Iterable[Event] = (),
) -> None:
    """Run to the end and then `write` the result, which says so by its event. `prepared` is logged first. `resume`: go on
    from the checkpoint, if there is one.

    Raises:
        Interrupted: on Ctrl-C, after the checkpoint was written.
        EngineError: a loss or a weight is NaN or infinite; the last good checkpoint stays.
        ResumeError: the checkpoint belongs to another run.
    """
    path = checkpoint.checkpoint_path(out)
    resumed = resume and path.exists()
    if resumed:
        trainer.restore(checkpoint.load(path, trainer.settings()))
    with JsonLines(out.with_name(out.name + ".log.jsonl"), append=resumed) as log, _deferred_interrupt() as interrupted:
        run = _Run(trainer, path, checkpoint_every, interrupted, _both(log.write, on_event))
        for event in prepared:
            run.emit(event)
        run.to_the_end()
        done = write()
        path.unlink(missing_ok=True)
        run.emit(done)


def check_every(checkpoint_every: int) -> None:
    if checkpoint_every < 1:
        raise UsageError(f"checkpoint_every = {checkpoint_every}: must be at least 1")


def check_out(out: Path, resume: bool) -> None:
    """Find out now, not after an hour of training, that the result has no place."""
    if not out.parent.is_dir():
        raise InputError(f"{out.parent}: no such folder to write {out.name} to")
    if out.is_dir():
        raise InputError(f"{out}: is a folder: name a file to write to")
    unfinished = (path := checkpoint.checkpoint_path(out)).exists()
    if unfinished and not resume:
        raise ResumeError(f"{path}: a run to {out.name} is unfinished: resume it or delete that file")
    if resume and out.exists() and not unfinished:
        raise ResumeError(
            f"{out}: is finished: there is nothing to resume; train anew without resume, or to another file"
        )


class _Run:
    """Phases, checkpoints and events around a trainer."""

    def __init__(self, trainer: Trainer, path: Path, every: int, interrupted: threading.Event, emit: Emit) -> None:
        self.trainer, self.path, self.every = trainer, path, every
        self.interrupted, self.emit = interrupted, emit
        self.saved: str | None = None
        self.whole = True
        self.pace: float | None = None

    def to_the_end(self) -> None:
        try:
            while self.trainer.phase < len(self.trainer.totals):
                self._phase()
        except KeyboardInterrupt:
            # A second Ctrl-C can hit in the middle of an iteration: that state is not worth keeping.
            if self.whole and self.trainer.finite():
                self._save()
            raise Interrupted(f"stopped at {self.trainer.place()}: resume goes on from {self._last_good()}") from None

    def _phase(self) -> None:
        trainer, started = self.trainer, time.monotonic()
        total = trainer.totals[trainer.phase]
        if not trainer.begun:
            self.whole = False
            trainer.begin()
            self._save()
            self.whole = True
        self.emit(trainer.started())
        for _ in range(trainer.iteration, total):
            self._iteration(total)
            if trainer.iteration % self.every == 0 and trainer.iteration < total:
                self._save()
                self._review()
            if self.interrupted.is_set():
                raise KeyboardInterrupt
        self._review()
        done = trainer.finished(time.monotonic() - started)
        trainer.end()
        self.emit(done)

    def _iteration(self, total: int) -> None:
        trainer, started = self.trainer, time.monotonic()
        self.whole = False
        step = trainer.step()
        if bad := step.bad():
            raise EngineError(
                f"training stopped at {trainer.place()}: the loss {bad!r} is {step.losses[bad]}; "
                f"last good checkpoint: {self._last_good()}; try fp32 or another seed"
            )
        self.whole = True
        seconds = time.monotonic() - started
        self.emit(
            IterationDone(
                trainer.phase, len(trainer.totals), trainer.iteration, total, step.losses, seconds, self._eta(seconds)
            )
        )

    def _save(self) -> None:
        trainer = self.trainer
        if not trainer.finite():
            raise EngineError(
                f"training stopped at {trainer.place()}: a weight is NaN or infinite; "
                f"last good checkpoint: {self._last_good()}; try fp32 or another seed"
            )
        checkpoint.save(self.path, trainer.settings(), trainer.state())
        self.saved = f"{self.path} ({trainer.place()})"
        self.emit(CheckpointSaved(trainer.phase, trainer.iteration, self.path))

    def _review(self) -> None:
        for event in self.trainer.reviewed():
            self.emit(event)

    def _eta(self, seconds: float) -> float:
        """What is left, if an iteration costs what the trainer says of its phase, at the pace of the last ones."""
        trainer, now = self.trainer, self.trainer.phase
        pace = seconds / trainer.work(now)
        self.pace = pace if self.pace is None else 0.9 * self.pace + 0.1 * pace
        left = (trainer.totals[now] - trainer.iteration) * trainer.work(now)
        left += sum(trainer.totals[p] * trainer.work(p) for p in range(now + 1, len(trainer.totals)))
        return self.pace * left

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


def _both(first: Emit, second: Emit) -> Emit:
    def emit(event: Event) -> None:
        first(event)
        second(event)

    return emit
