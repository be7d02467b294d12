"""Interface between ``export`` and the formats: a checked job with its size, its cost and its warnings.

The module matches options to a format. It knows no format, no Zarr and no image library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol, TypeVar

from engine.container import cpu_count
from engine.errors import UsageError, option
from engine.plan.print_size import DEFAULT_DPI, MM_PER_INCH

Progress = Callable[[int, int], None]
"""Called with (done, total) in the format's own unit: tiles, rows, or bytes."""

OptionsT = TypeVar("OptionsT")


class ExportJob(Protocol):
    """An export that has passed every check that needs no pixels."""

    @property
    def estimate(self) -> int:
        """Expected size of the file in bytes."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """One-line warnings for the reader of the file."""
        ...

    def write(self, path: Path, on_progress: Progress) -> None:
        """Write the file."""
        ...


def parse_options(options: type[OptionsT], values: Mapping[str, Any], suffix: str) -> OptionsT:
    """The options of one format from all values that are not None.

    Raises:
        UsageError: a value belongs to an option that the format lacks.
    """
    names = [field.name for field in fields(options)]  # type: ignore[arg-type]
    chosen = {name: value for name, value in values.items() if value is not None}
    if foreign := sorted(set(chosen) - set(names)):
        refused, valid = (", ".join(option(name) for name in group) for group in (foreign, names))
        advice = f"its options are {valid}" if valid else "it has no options"
        raise UsageError(f"{refused}: does not apply to {suffix}; {advice}")
    return options(**chosen)


def thread_count(workers: int | None) -> int:
    """Threads that encode: as many as requested, or by default those of the processors, at most 8."""
    return min(8, cpu_count()) if workers is None else workers


def check_print(dpi: float | None, width_mm: float | None) -> None:
    """Refuse a resolution or a width that no print has, and both at the same time. Raises UsageError."""
    if dpi is not None:
        check_range("dpi", dpi, 1, 100_000)
    if width_mm is not None:
        check_range("width_mm", width_mm, 0.1, 10_000_000)
        if dpi is not None:
            raise UsageError(f"{option('dpi')} and {option('width_mm')}: exclude each other; give one of them")


def resolution(
    dpi: float | None, width_mm: float | None, width: int, of_picture: tuple[float, float] | None
) -> tuple[float, float]:
    """(horizontal, vertical) dots per inch of a file.

    Args:
        dpi, width_mm: as requested.
        width: of the file, in pixels.
        of_picture: resolution of the picture that was enlarged, which holds where none is requested.
    """
    wanted = width * MM_PER_INCH / width_mm if width_mm is not None else dpi
    return (wanted, wanted) if wanted is not None else of_picture or (DEFAULT_DPI, DEFAULT_DPI)


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Refuse a number outside [low, high]."""
    if not low <= value <= high:
        raise UsageError(f"{option(name)}: {value} is out of range; give {low} to {high}")
