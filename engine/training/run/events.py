"""Events of a training, and their log as JSON lines. Class names and fields are the names and keys in the log."""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from engine.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Expected work of one part of a training, from measured iterations."""

    name: str
    """The part, such as "step 2"."""
    iterations: tuple[int, ...]
    """Iterations of each phase."""
    seconds: tuple[float, ...]
    """Duration of an iteration of each phase."""
    preparation: float = 0.0
    """Seconds before the first iteration."""
    position: tuple[int, int] = (0, 0)
    """Phase and finished iterations of it at the start; above 0 for a resumed part."""
    result_bytes: int = 0
    """Size of the result on the disk."""
    work_bytes: int = 0
    """Largest size of the files that are deleted at the end."""

    @property
    def total(self) -> float:
        """Seconds from ``position`` to the end."""
        return self.preparation + self.left(*self.position)

    def left(self, phase: int, iteration: int) -> float:
        """Seconds of all iterations after a finished one."""
        later = range(phase + 1, len(self.iterations))
        rest = sum(self.iterations[p] * self.seconds[p] for p in later)
        if phase < len(self.iterations):
            rest += (self.iterations[phase] - iteration) * self.seconds[phase]
        return rest


@dataclass(frozen=True, slots=True)
class Forecasted:
    """All checks of a training passed, and its duration was measured on a few iterations."""

    parts: tuple[Forecast, ...]
    """Unfinished parts in their order."""


@dataclass(frozen=True, slots=True)
class ScaleStarted:
    """A scale of step 1 starts or continues."""

    scale: int
    """Number of the scale, from 0."""
    scales: int
    """Number of scales."""
    size: tuple[int, int]
    """(height, width), pixels."""
    kind: str
    """"vae" or "gan"."""
    sigma: float
    """Amplitude of the scale's noise."""
    iteration: int
    """Finished iterations."""
    total: int
    """Iterations of the scale."""


@dataclass(frozen=True, slots=True)
class TrainingStarted:
    """The training of a super-resolution network starts or continues."""

    name: str
    """The network, such as "step 2"."""
    iteration: int
    """Finished iterations."""
    total: int
    """Iterations of the training."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """An input of the training is ready."""

    what: str
    """Name of the input."""
    values: dict[str, float]
    """Its properties by name."""


@dataclass(frozen=True, slots=True)
class IterationDone:
    """An iteration is finished."""

    phase: int
    """Scale of step 1, from 0; 0 for super-resolution."""
    phases: int
    """Number of phases."""
    iteration: int
    """Number within the phase, from 1."""
    total: int
    """Iterations of the phase."""
    losses: dict[str, float]
    """Unweighted losses by name."""
    seconds: float
    """Duration of the iteration."""
    eta: float
    """Estimated seconds to the end of the run."""


@dataclass(frozen=True, slots=True)
class ScaleFinished:
    """A scale of step 1 is trained."""

    scale: int
    """Number of the scale, from 0."""
    scales: int
    """Number of scales."""
    seconds: float
    """Duration since its start or the resumption."""
    sample: Path
    """PNG of the photograph, its reconstruction and samples."""


@dataclass(frozen=True, slots=True)
class Validated:
    """The EMA of a super-resolution network was measured. The log calls this event ``Reviewed``.

    The keys of the measures are "bicubic" (enlargement), "start" (weights before the training) and "now".
    """

    iteration: int
    """Finished iterations."""
    held_out: bool
    """Whether the crops lie in a strip of the photograph without training."""
    psnr: dict[str, float]
    """PSNR in dB; "now" with the input noise of a render."""
    texture: dict[str, float]
    """Sliced Wasserstein distance of patches, of pixel values in [0, 1]."""
    sample: Path
    """PNG of the crops."""


@dataclass(frozen=True, slots=True)
class TrainingFinished:
    """A super-resolution network is trained."""

    name: str
    """The network, such as "step 2"."""
    seconds: float
    """Duration since the start or the resumption."""


@dataclass(frozen=True, slots=True)
class CheckpointSaved:
    """A checkpoint was written."""

    phase: int
    """Phase, from 0."""
    iteration: int
    """Finished iterations of the phase."""
    path: Path
    """The file."""


@dataclass(frozen=True, slots=True)
class StructureSaved:
    """The structure file was written and its checkpoint removed."""

    path: Path
    """The file."""
    bytes: int
    """Its size."""
    seconds: float
    """Duration since the start or the resumption."""


@dataclass(frozen=True, slots=True)
class WeightsSaved:
    """The weights of a super-resolution network were written and their checkpoint removed."""

    path: Path
    """The file."""
    bytes: int
    """Its size."""
    seconds: float
    """Duration since the start or the resumption."""


Event = (
    Forecasted
    | ScaleStarted
    | TrainingStarted
    | Prepared
    | IterationDone
    | ScaleFinished
    | TrainingFinished
    | Validated
    | CheckpointSaved
    | StructureSaved
    | WeightsSaved
)

_LOG_NAMES: dict[type, str] = {Validated: "Reviewed"}
"""Names in the log that differ from the class's: existing logs and their readers depend on them."""


class JsonLines:
    """Log file with one JSON object per line: the event's name, the time and the event's fields.

    Args:
        path: the file.
        append: continue the file instead of replacing it.
        every: iterations per logged iteration; the last one of a phase is always logged.

    Raises:
        InputError: the file cannot be written.
    """

    def __init__(self, path: Path, *, append: bool, every: int = 10) -> None:
        self.path, self.every = path, every
        try:
            self._file: IO[str] = path.open("a" if append else "w", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror}); choose another output") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, event: Event) -> None:
        """Append an event and flush the file."""
        if isinstance(event, IterationDone) and event.iteration % self.every and event.iteration != event.total:
            return
        name = _LOG_NAMES.get(type(event), type(event).__name__)
        record: dict[str, Any] = {"event": name, "time": round(time.time(), 3)}
        record |= dataclasses.asdict(event)
        self._file.write(json.dumps(record, default=str) + "\n")
        self._file.flush()
