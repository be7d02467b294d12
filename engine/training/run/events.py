"""What a training run says: small frozen events, and their record as JSON lines.

Knows nothing of networks; whoever shows progress turns the events into words.
"""

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from engine.errors import InputError


@dataclass(frozen=True, slots=True)
class ScaleStarted:
    """A scale begins (or goes on at `iteration`); `size` is (height, width)."""

    scale: int
    scales: int
    size: tuple[int, int]
    kind: str
    sigma: float
    iteration: int
    total: int


@dataclass(frozen=True, slots=True)
class TrainingStarted:
    """The training of a super-resolution network begins (or goes on at `iteration`); `name` says of which."""

    name: str
    iteration: int
    total: int


@dataclass(frozen=True, slots=True)
class Prepared:
    """Something that the training needs is there; `what` says it in words, `values` in numbers."""

    what: str
    values: dict[str, float]


@dataclass(frozen=True, slots=True)
class IterationDone:
    """`iteration` counts from 1 to `total` within the phase (a scale of step 1, or the whole of a super-resolution step);
    `eta` is for the whole run, a rough guess.
    """

    phase: int
    phases: int
    iteration: int
    total: int
    losses: dict[str, float]
    seconds: float
    eta: float


@dataclass(frozen=True, slots=True)
class ScaleFinished:
    """A scale is trained; `sample` shows the photograph, its reconstruction and fresh samples."""

    scale: int
    scales: int
    seconds: float
    sample: Path


@dataclass(frozen=True, slots=True)
class Reviewed:
    """How good the network is: PSNR in dB and texture distance (of 1.0) of a bicubic enlargement, of the start, and now
    (with the input noise of a render).

    Measured on a strip of the photograph that was not trained on, if `held_out`. `sample` shows the same in pictures.
    """

    iteration: int
    held_out: bool
    psnr: dict[str, float]
    texture: dict[str, float]
    sample: Path


@dataclass(frozen=True, slots=True)
class TrainingFinished:
    """A super-resolution network is trained."""

    name: str
    seconds: float


@dataclass(frozen=True, slots=True)
class CheckpointSaved:
    """A run that stops now can go on from here."""

    phase: int
    iteration: int
    path: Path


@dataclass(frozen=True, slots=True)
class StructureSaved:
    """The structure is written and its checkpoint gone."""

    path: Path
    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class WeightsSaved:
    """The weights of a super-resolution network are written and their checkpoint gone."""

    path: Path
    bytes: int
    seconds: float


Event = (
    ScaleStarted
    | TrainingStarted
    | Prepared
    | IterationDone
    | ScaleFinished
    | TrainingFinished
    | Reviewed
    | CheckpointSaved
    | StructureSaved
    | WeightsSaved
)


class JsonLines:
    """Appends events to a file, one JSON object a line; of the iterations only every tenth and the last."""

    def __init__(self, path: Path, *, append: bool, every: int = 10) -> None:
        self.path, self.every = path, every
        try:
            self._file: IO[str] = path.open("a" if append else "w", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{path}: the log cannot be written: {error.strerror}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, event: Event) -> None:
        if isinstance(event, IterationDone) and event.iteration % self.every and event.iteration != event.total:
            return
        record: dict[str, Any] = {"event": type(event).__name__, "time": round(time.time(), 3)}
        record |= dataclasses.asdict(event)
        self._file.write(json.dumps(record, default=str) + "\n")
        self._file.flush()
