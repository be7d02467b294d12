"""Interface between ``export`` and the formats: a checked job with its size, its cost and its warnings.

The module matches options to a format. It knows no format, no Zarr and no image library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol, TypeVar

from engine.errors import UsageError, option
from engine.plan.print_size import DEFAULT_DPI

Progress = Callable[[int, int], None]
"""Called with (done, total) in the format's own unit: tiles for TIFF, rows for the others."""

OptionsT = TypeVar("OptionsT")


class ExportJob(Protocol):
    """An export that has passed every check that needs no pixels."""

    @property
    def width(self) -> int:
        """Width in pixels of the largest level."""
        ...

    @property
    def height(self) -> int:
        """Height in pixels of the largest level."""
        ...

    @property
    def levels(self) -> int:
        """Number of resolutions in the file."""
        ...

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
        raise UsageError(f"{refused}: does not apply to {suffix}; its options are {valid}")
    return options(**chosen)


def resolution(dpi: float | None, of_picture: tuple[float, float] | None) -> tuple[float, float]:
    """(horizontal, vertical) dots per inch of a file: as requested, else those of the picture that was enlarged."""
    return (dpi, dpi) if dpi is not None else of_picture or (DEFAULT_DPI, DEFAULT_DPI)


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Refuse a number outside [low, high]."""
    if not low <= value <= high:
        raise UsageError(f"{option(name)}: {value} is out of range; give {low} to {high}")
