"""From a finished OME-Zarr image to one file: ``export`` is all a caller needs.

Knows which module writes which suffix, and how a file appears whole or not at all. Knows no format: the modules are
imported when their suffix is asked for. Nothing here imports torch.
"""

from __future__ import annotations

import importlib
import os
import shutil
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import BudgetError, EngineError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from engine.exporters.job import Job

__all__ = ["FORMATS", "ExportResult", "export"]

FORMATS = {
    ".tif": "tiff",
    ".tiff": "tiff",
    ".ome.tif": "tiff",
    ".ome.tiff": "tiff",
    ".png": "preview",
    ".jpg": "preview",
    ".jpeg": "preview",
    ".webp": "preview",
}
"""Suffix -> module of this package, which offers ``prepare(pyramid, suffix, options) -> Job``."""


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What was written; ``notes`` are one-line warnings about the file."""

    path: Path
    bytes: int
    width: int
    height: int
    levels: int
    seconds: float
    notes: tuple[str, ...] = ()


def export(
    store: Path,
    out: Path,
    *,
    compression: str | None = None,
    quality: int | None = None,
    max_size: int | None = None,
    tile: int | None = None,
    bigtiff: bool | None = None,
    dpi: float | None = None,
    workers: int | None = None,
    allow_incomplete: bool = False,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> ExportResult:
    """Write the image in ``store`` to ``out``; None leaves an option to the format, which refuses those it lacks.

    ``out`` appears only when it is whole: until then there is ``<out>.part``, which any failure removes.
    """
    start, store, out = time.perf_counter(), Path(store), Path(out)
    options = {
        "compression": compression,
        "quality": quality,
        "max_size": max_size,
        "tile": tile,
        "bigtiff": bigtiff,
        "dpi": dpi,
        "workers": workers,
    }
    suffix = find_suffix(out)
    _check_target(out, overwrite=overwrite)
    from engine.exporters.pyramid import Pyramid

    pyramid = Pyramid(store, allow_incomplete=allow_incomplete)
    job: Job = importlib.import_module(f"{__name__}.{FORMATS[suffix]}").prepare(pyramid, suffix, options)
    check_space(job.estimate, shutil.disk_usage(out.parent).free, out)
    with _appearing(out) as part:
        job.write(part, on_progress or _ignore)
    size, seconds = out.stat().st_size, time.perf_counter() - start
    return ExportResult(out, size, job.width, job.height, job.levels, seconds, job.notes)


def find_suffix(out: Path) -> str:
    """The longest known suffix of the name, so that ``.ome.tif`` is not taken for ``.tif``."""
    found = [suffix for suffix in FORMATS if out.name.lower().endswith(suffix)]
    if not found:
        raise UsageError(f"{out.name}: no exporter for suffix {out.suffix!r}: choose one of {', '.join(FORMATS)}")
    return max(found, key=len)


def check_space(estimate: int, free: int, out: Path) -> None:
    """Refuse to start what would fill the disk."""
    if estimate > free:
        raise BudgetError(f"{out}: about {estimate} bytes needed, {free} free: free some, or choose another folder")


def _check_target(out: Path, *, overwrite: bool) -> None:
    if not out.parent.is_dir():
        raise UsageError(f"{out}: folder {out.parent} does not exist: create it first")
    if out.is_dir():
        raise UsageError(f"{out}: is a folder: give the name of a file")
    if out.exists() and not overwrite:
        raise UsageError(f"{out}: exists ({out.stat().st_size} bytes): pass overwrite=True or choose another name")


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A name to write to; it becomes ``out`` at the end, and vanishes on any failure, an interrupt included."""
    part = out.with_name(out.name + ".part")
    try:
        yield part
        os.replace(part, out)
    except OSError as error:
        raise EngineError(f"{out}: could not be written ({error}): check the disk and its permissions") from error
    finally:
        part.unlink(missing_ok=True)


def _ignore(done: int, total: int) -> None:
    """Progress that nobody follows."""
