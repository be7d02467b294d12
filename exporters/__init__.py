"""Export of a finished OME-Zarr image to one file, through one function: ``export``.

The package knows which module writes which suffix, and imports a module only when its suffix is requested. It never imports
torch.
"""

from __future__ import annotations

import importlib
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import BudgetError, EngineError, InputError, UsageError, option
from engine.io.files import replacing

if TYPE_CHECKING:
    from engine.exporters.job import ExportJob
    from engine.pixels import PixelFormat

__all__ = ["FORMATS", "ExportResult", "check_target", "export", "names_picture"]

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
"""Suffix -> module of this package, which offers ``prepare(pyramid, suffix, options) -> ExportJob``, ``checked_options``,
``check_size`` and ``check_pixels``."""


@dataclass(frozen=True, slots=True)
class ExportResult:
    """Summary of a written file."""

    path: Path
    """The file."""
    bytes: int
    """Size of the file."""
    width: int
    """Width in pixels of the largest level."""
    height: int
    """Height in pixels of the largest level."""
    levels: int
    """Number of resolutions in the file."""
    seconds: float
    """Wall-clock time of the export."""
    notes: tuple[str, ...] = ()
    """One-line warnings about the file."""


def export(
    store: str | PathLike[str],
    out: str | PathLike[str],
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
    """Write the image in ``store`` to ``out``, which appears whole or not at all.

    Args:
        store: folder of an OME-Zarr image, or an open ``Store``.
        out: file to write; its suffix chooses the format (``FORMATS``).
        compression: TIFF's compression: deflate, jpeg or none.
        quality: quality of JPEG and WebP, 1 to 100.
        max_size: limit in pixels of a flat picture's longest side.
        tile: side in pixels of TIFF's tiles, a multiple of 16.
        bigtiff: write BigTIFF or classic TIFF; by default the size decides.
        dpi: resolution for print, in dots per inch; by default that of the picture that was enlarged, or 300.
        workers: threads that compress TIFF tiles; by default one per core, up to 8.
        allow_incomplete: export a render that is not finished; missing shards are black.
        overwrite: replace an existing file.
        on_progress: called with (done, total) in the format's own unit.

    ``None`` leaves an option to the format. An option that the format lacks is refused.

    Raises:
        UsageError: an option does not fit the format or the image, or the file would lie in the store.
        InputError: the store cannot be read or is not finished, or the file exists or cannot be made.
        BudgetError: the disk has too little space.
        EngineError: writing failed.
    """
    start, source, out = time.perf_counter(), Path(store), Path(out)
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
    check_target(out, overwrite=overwrite)
    if source.resolve() in out.resolve().parents:
        raise UsageError(f"{out}: lies in the store; choose a place outside {source}")
    from engine.exporters.pyramid import Pyramid

    pyramid = Pyramid(source, allow_incomplete=allow_incomplete)
    job: ExportJob = _format(suffix).prepare(pyramid, suffix, options)
    check_space(job.estimate, shutil.disk_usage(_nearest_folder(out)).free, out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as part:
            job.write(part, on_progress or _ignore)
            pyramid.check_unchanged()
    except OSError as error:
        if error.filename not in (None, str(out)):  # of the store, not of the output
            raise
        reason = error.strerror or error
        raise EngineError(f"{out}: could not be written ({reason}); check the disk and its permissions") from error
    size, seconds = out.stat().st_size, time.perf_counter() - start
    return ExportResult(out, size, job.width, job.height, job.levels, seconds, job.notes)


def names_picture(path: Path) -> bool:
    """Whether a name ends in a suffix of ``FORMATS``."""
    return path.name.lower().endswith(tuple(FORMATS))


def find_suffix(out: Path) -> str:
    """The longest known suffix of a file's name, so that ``.ome.tif`` is not taken for ``.tif``."""
    matches = [suffix for suffix in FORMATS if out.name.lower().endswith(suffix)]
    if not matches:
        raise UsageError(f"{out.name}: no exporter for suffix {out.suffix!r}; choose one of {', '.join(FORMATS)}")
    return max(matches, key=len)


def check_space(estimate: int, free: int, out: Path) -> None:
    """Refuse an export that would fill the disk. ``estimate`` and ``free`` are bytes."""
    if estimate > free:
        raise BudgetError(f"{out}: about {estimate} bytes needed, {free} free; make room, or choose another folder")


def check_options(out: Path, options: Mapping[str, Any]) -> None:
    """Refuse options of ``export`` that the format of a file lacks, or that are out of range. Raises UsageError."""
    suffix = find_suffix(out)
    _format(suffix).checked_options(suffix, options)


def check_pixels(out: Path, options: Mapping[str, Any], pixels: PixelFormat) -> tuple[str, ...]:
    """Sentences about what the format of a file does not hold of an image. Raises UsageError where options exclude it."""
    suffix = find_suffix(out)
    module = _format(suffix)
    notes: tuple[str, ...] = module.check_pixels(suffix, module.checked_options(suffix, options), pixels)
    return notes


def check_target(out: Path, *, size: tuple[int, int] | None = None, overwrite: bool) -> None:
    """Refuse a file that could not be written, before the work for it.

    Args:
        out: file to write.
        size: (height, width) of the picture, if it is known.
        overwrite: accept a file that exists.

    Raises:
        UsageError: an unknown suffix, or a picture beyond its format.
        InputError: the file exists, or something else is in its place.
    """
    suffix = find_suffix(out)
    if size is not None:
        _format(suffix).check_size(suffix, size[1], size[0])
    folder = _nearest_folder(out)
    if not folder.is_dir():
        raise InputError(f"{out}: {folder} is not a folder; choose another name")
    if out.is_dir():
        raise InputError(f"{out}: is a folder; give the name of a file")
    if out.exists() and not overwrite:
        raise InputError(f"{out}: exists; give {option('overwrite', True)} or choose another name")


def _format(suffix: str) -> Any:  # noqa: ANN401 (modules have no common type)
    """The module of a suffix."""
    return importlib.import_module(f"{__name__}.{FORMATS[suffix]}")


def _nearest_folder(out: Path) -> Path:
    """The nearest parent that exists."""
    return next(p for p in out.absolute().parents if p.exists())


def _ignore(done: int, total: int) -> None:
    """Progress without a listener."""
