"""Outer loop of every training: iterations, checkpoints, events, interruption, NaN.

A run is a sequence of phases (the scales of step 1; a super-resolution run has one), each of a number of iterations. The
log and, until the end, the checkpoint lie next to the output.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.causes import naming
from engine.errors import EngineError, InputError, Interrupted, ResumeError, option
from engine.interrupt import Flag, deferred_interrupt
from engine.training.run import checkpoint
from engine.training.run.events import CheckpointSaved, Event, Forecast, IterationDone, JsonLines
from engine.training.run.runtime import Runtime

Emit = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class IterationLosses:
    """Losses of one iteration."""

    values: dict[str, float]
    """Unweighted values by name."""

    def first_nonfinite(self) -> str | None:
        """Name of the first loss that is NaN or infinite."""
        return next((name for name, value in self.values.items() if not math.isfinite(value)), None)


class Trainer(ABC):
    """Networks and optimisers of a run, driven phase after phase, one iteration at a time.

    ``state`` holds everything that the rest of the run depends on (weights, optimisers, random generator): a restored run
    continues bit for bit on the same machine.
    """

    totals: tuple[int, ...]
    """Iterations of each phase."""
    phase: int = 0
    """Current phase, from 0."""
    iteration: int = 0
    """Finished iterations of the phase."""
    begun: bool = False
    """Whether ``begin`` has run in this phase."""
    phase_name: str
    """Name of a phase in messages."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything that decides the result; a checkpoint is resumed with equal settings only."""

    @abstractmethod
    def begin(self) -> None:
        """Set up the phase."""

    @abstractmethod
    def iterate(self) -> IterationLosses:
        """Run one iteration and count it."""

    def end(self) -> None:
        """Leave the phase for the next one."""
        self.phase, self.iteration, self.begun = self.phase + 1, 0, False

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Tensors and plain values for ``restore``."""

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Continue from ``state``."""

    @abstractmethod
    def is_finite(self) -> bool:
        """Whether no weight is NaN or infinite."""

    @abstractmethod
    def start_event(self) -> Event:
        """Event at the start of the phase."""

    @abstractmethod
    def finish_event(self, seconds: float) -> Event:
        """Event at the end of the phase, which took ``seconds``."""

    def validate(self) -> Iterable[Event]:
        """Events about the quality at a checkpoint; changes nothing that ``state`` holds."""
        return ()

    def position(self) -> str:
        """Current phase and iteration in words."""
        phase = f"{self.phase_name} {self.phase}, " if len(self.totals) > 1 else ""
        return f"{phase}iteration {self.iteration}"


def train(
    trainer: Trainer,
    out: Path,
    runtime: Runtime,
    forecast: Forecast,
    *,
    checkpoint_every: int,
    write: Callable[[], Event],
    prepared: Iterable[Event] = (),
) -> None:
    """Run to the end and write the result.

    Args:
        trainer: the run.
        out: file that ``write`` writes; log and checkpoint are named after it.
        runtime: resumption and callbacks.
        forecast: expected duration of the iterations of each phase.
        checkpoint_every: iterations between checkpoints.
        write: writes the result and returns the event about it.
        prepared: events that are logged first.

    Raises:
        Interrupted: a request to stop; the checkpoint was written.
        EngineError: a loss or a weight is NaN or infinite; the last good checkpoint stays.
        ResumeError: the checkpoint belongs to another run.
    """
    path = checkpoint.checkpoint_path(out)
    is_resumed = runtime.resume and path.exists()
    if is_resumed:
        trainer.restore(checkpoint.load(path, trainer.settings()))
    with (
        naming(out),
        JsonLines(out.with_name(out.name + ".log.jsonl"), append=is_resumed) as log,
        deferred_interrupt() as interrupted,
    ):
        emit = _both(log.write, runtime.on_event)
        run = _Run(trainer, path, checkpoint_every, interrupted, emit, Pace(forecast))
        for event in prepared:
            run.emit(event)
        run.run_to_end()
        written = write()
        run.emit(written)
        path.unlink(missing_ok=True)  # last, so that a run whose log cannot be written continues


def check_out(out: Path, runtime: Runtime) -> None:
    """Check before the training that the result can be written.

    Raises:
        InputError: the folder of ``out`` does not exist, or ``out`` is a folder, or a file that is not to be replaced.
        ResumeError: an unfinished run without ``resume``, or a finished one with it.
    """
    if not out.parent.is_dir():
        raise InputError(f"{out.parent}: no such folder; create it or choose another output")
    if out.is_dir():
        raise InputError(f"{out}: is a folder; name a file")
    path = checkpoint.checkpoint_path(out)
    if path.exists() and not runtime.resume:
        raise ResumeError(f"{path}: belongs to an unfinished run; give {option('resume', True)} or delete it")
    if path.exists() or not out.exists():  # an unfinished run may replace a file: its start was allowed to
        return
    if runtime.resume:
        raise ResumeError(f"{out}: the run is finished; leave {option('resume')} out or choose another output")
    if not runtime.overwrite:
        raise InputError(f"{out}: exists; give {option('overwrite', True)} to replace it, or another {option('out')}")


class Pace:
    """Ratio of the real to the forecast duration of recent work, checkpoints and validations included.

    Args:
        forecast: expected duration of each phase's iterations.
        clock: returns seconds.
    """

    def __init__(self, forecast: Forecast, clock: Callable[[], float] = time.monotonic) -> None:
        self._forecast, self._clock = forecast, clock
        self._horizon = max(forecast.total / 5, 1e-9)
        # The forecast itself counts at first: a single iteration says little.
        self._expected = self._real = self._horizon / 20
        self._last = clock()

    def seconds_left(self, phase: int, iteration: int) -> float:
        """Take an iteration into account that has just finished, and estimate the seconds to the end of the run."""
        now, expected = self._clock(), self._forecast.seconds[phase]
        kept = math.exp(-expected / self._horizon)
        self._expected = kept * self._expected + expected
        self._real = kept * self._real + now - self._last
        self._last = now
        return self._real / self._expected * self._forecast.left(phase, iteration)


class _Run:
    """Phases, checkpoints and events of one call of ``train``."""

    def __init__(self, trainer: Trainer, path: Path, every: int, interrupted: Flag, emit: Emit, pace: Pace) -> None:
        self.trainer, self.path, self.every = trainer, path, every
        self.interrupted, self.emit, self.pace = interrupted, emit, pace
        self.saved: str | None = None
        self.is_consistent = True  # False within an iteration

    def run_to_end(self) -> None:
        try:
            while self.trainer.phase < len(self.trainer.totals):
                self._run_phase()
        except KeyboardInterrupt:
            # The second Ctrl-C may come within an iteration, whose state is not worth saving.
            if self.is_consistent and self.trainer.is_finite():
                self._save()
            raise Interrupted(
                f"training: stopped at {self.trainer.position()} (last checkpoint: {self._last_checkpoint()}); "
                f"continue with {option('resume', True)}"
            ) from None

    def _run_phase(self) -> None:
        trainer, started = self.trainer, time.monotonic()
        total = trainer.totals[trainer.phase]
        if not trainer.begun:
            self.is_consistent = False
            trainer.begin()
            self._save()
            self.is_consistent = True
        self.emit(trainer.start_event())
        for _ in range(trainer.iteration, total):
            self._iterate(total)
            if trainer.iteration % self.every == 0 and trainer.iteration < total:
                self._save()
                self._validate()
            if self.interrupted.is_set():
                raise KeyboardInterrupt
        self._validate()
        finished = trainer.finish_event(time.monotonic() - started)
        trainer.end()
        self.emit(finished)

    def _iterate(self, total: int) -> None:
        trainer, started = self.trainer, time.monotonic()
        self.is_consistent = False
        losses = trainer.iterate()
        if name := losses.first_nonfinite():
            raise self._divergence(f"loss {name} is {losses.values[name]}")
        self.is_consistent = True
        seconds = time.monotonic() - started
        phase, phases = trainer.phase, len(trainer.totals)
        eta = self.pace.seconds_left(phase, trainer.iteration)
        self.emit(IterationDone(phase, phases, trainer.iteration, total, losses.values, seconds, eta))

    def _save(self) -> None:
        trainer = self.trainer
        if not trainer.is_finite():
            raise self._divergence("a weight is NaN or infinite")
        checkpoint.save(self.path, trainer.settings(), trainer.state())
        self.saved = f"{self.path}, {trainer.position()}"
        self.emit(CheckpointSaved(trainer.phase, trainer.iteration, self.path))

    def _validate(self) -> None:
        for event in self.trainer.validate():
            self.emit(event)

    def _divergence(self, problem: str) -> EngineError:
        return EngineError(
            f"training: {problem} at {self.trainer.position()} (last good checkpoint: {self._last_checkpoint()}); "
            f"use {option('precision', 'fp32')} or another {option('seed')}"
        )

    def _last_checkpoint(self) -> str:
        return self.saved or "none"


def _both(first: Emit, second: Emit) -> Emit:
    def emit(event: Event) -> None:
        first(event)
        second(event)

    return emit
