"""What every format hands back before it writes: a job with its size, its cost and its warnings.

Knows how options are matched to a format. Knows no format, no Zarr and no image library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol, TypeVar

from engine.errors import UsageError

Progress = Callable[[int, int], None]
"""Called with (done, total); the unit is the format's own: tiles for TIFF, rows for the others."""

OptionsT = TypeVar("OptionsT")


class Job(Protocol):
    """An export that has passed every check which needs no pixels."""

    @property
    def width(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def levels(self) -> int: ...
    @property
    def estimate(self) -> int:
        """Bytes that the file is expected to take."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """One-line warnings that concern the reader of the file."""
        ...

    def write(self, path: Path, on_progress: Progress) -> None: ...


def pick(options: type[OptionsT], given: Mapping[str, Any], suffix: str) -> OptionsT:
    """The options of one format from those given (not None); an option that it lacks is refused, not ignored."""
    known = [field.name for field in fields(options)]  # type: ignore[arg-type]
    chosen = {name: value for name, value in given.items() if value is not None}
    foreign = sorted(set(chosen) - set(known))
    if foreign:
        raise UsageError(f"{', '.join(foreign)} does not apply to {suffix}: its options are {', '.join(known)}")
    return options(**chosen)


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Refuse a number outside [low, high]."""
    if not low <= value <= high:
        raise UsageError(f"{name} is {value}: it must lie between {low} and {high}")
