"""Export of a finished OME-Zarr image to a file or a folder, through one function: ``export``.

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
from engine.exporters.place import ArchivePlace, DeepZoomPlace, FilePlace, FolderPlace, PagePlace, Place
from engine.geometry import Region, parse_box, parse_size

if TYPE_CHECKING:
    from engine.exporters.job import ExportJob
    from engine.pixels import PixelFormat

__all__ = ["FORMATS", "PICTURES", "ExportResult", "check_target", "export", "names_export", "names_picture"]


@dataclass(frozen=True, slots=True)
class Format:
    """A format of ``export``."""

    module: str
    """Module of this package. It offers ``prepare(view, suffix, options) -> ExportJob``, ``checked_options`` and
    ``check_size``, and ``view_depth`` where it does not read the depth that is asked for."""
    place: type[Place] = FilePlace
    """Kind of place that it fills."""
    is_picture: bool = False
    """Whether it is one picture that carries its description, so that a render can end in it. Its module offers
    ``check_pixels``."""


_TIFF, _FLAT = Format("tiff", is_picture=True), Format("preview", is_picture=True)

FORMATS = {
    ".tif": _TIFF,
    ".tiff": _TIFF,
    ".ome.tif": _TIFF,
    ".ome.tiff": _TIFF,
    ".png": _FLAT,
    ".jpg": _FLAT,
    ".jpeg": _FLAT,
    ".webp": _FLAT,
    ".dzi": Format("deepzoom", DeepZoomPlace),
    ".dzi.zip": Format("deepzoom", ArchivePlace),
    ".iiif": Format("iiif", FolderPlace),
    ".html": Format("html", PagePlace),
    ".html.zip": Format("html", ArchivePlace),
    ".ozx": Format("ozx"),
    ".exr": Format("exr"),
}
"""Suffix -> format. The module is imported when its suffix is requested."""

PICTURES = tuple(suffix for suffix, each in FORMATS.items() if each.is_picture)
"""Suffixes of pictures that a render can end in."""


@dataclass(frozen=True, slots=True)
class ExportResult:
    """Summary of a written file."""

    path: Path
    """The file or folder."""
    bytes: int
    """Size on the disk, of all files."""
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
    format: str | None = None,
    preset: str | None = None,
    compression: str | None = None,
    quality: int | None = None,
    max_size: int | None = None,
    level: int | None = None,
    roi: Region | None = None,
    size: tuple[int, int] | str | None = None,
    depth: int | None = None,
    tile: int | None = None,
    tiles: str | None = None,
    data: bool | None = None,
    url: str | None = None,
    title: str | None = None,
    bigtiff: bool | None = None,
    dpi: float | None = None,
    width_mm: float | None = None,
    workers: int | None = None,
    allow_incomplete: bool = False,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> ExportResult:
    """Write the image in ``store`` to ``out``, which appears whole or not at all.

    Args:
        store: folder of an OME-Zarr image, or an open ``Store``.
        out: file or folder to write; its suffix chooses the format (``FORMATS``).
        format: format, as a suffix without its dot, whatever the name's own suffix.
        preset: TIFF for a purpose: print or web; other options change it.
        compression: TIFF's compression: deflate, lzw, jpeg or none; OpenEXR's: zip, zips, piz or none.
        quality: quality of JPEG and WebP, 1 to 100.
        max_size: limit in pixels of the longest side; larger images are reduced.
        level: level of the store that is exported as the full size; 0 is the largest.
        roi: region to export, in pixels of level 0.
        size: (width, height) in pixels: smaller, and of the same shape.
        depth: bits per channel: 8 or 16; OpenEXR: 16 (half) or 32 (float).
        tile: side in pixels of a tile.
        tiles: format of the tiles of Deep Zoom, IIIF and a web page: jpg, png or webp.
        data: OpenEXR with the values as they are, for maps that hold no colours.
        url: address of the folder that will hold an IIIF export.
        title: title of a web page; by default the store's name.
        bigtiff: write BigTIFF or classic TIFF; by default the size decides.
        dpi: resolution for print, in dots per inch; by default that of the picture that was enlarged, or 300.
        width_mm: width of the print in mm, in place of ``dpi``.
        workers: threads that compress tiles; by default one per core, up to 8.
        allow_incomplete: export a render that is not finished; missing shards are black.
        overwrite: replace an existing export.
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
        "preset": preset,
        "compression": compression,
        "quality": quality,
        "depth": depth,
        "tile": tile,
        "tiles": tiles,
        "data": data,
        "url": url,
        "title": title,
        "bigtiff": bigtiff,
        "dpi": dpi,
        "width_mm": width_mm,
        "workers": workers,
    }
    region = None if roi is None else parse_box(roi)
    suffix = find_suffix(out, format)
    place = FORMATS[suffix].place(out)
    module = _format(suffix)
    module.checked_options(suffix, options)
    _check_place(place, overwrite=overwrite)
    if source.resolve() in out.resolve().parents:
        raise UsageError(f"{out}: lies in the store; choose a place outside {source}")
    from engine.exporters.pyramid import Pyramid
    from engine.exporters.reduced import reduced
    from engine.exporters.view import View

    read_depth = module.view_depth(suffix, depth) if hasattr(module, "view_depth") else depth
    pyramid, folder = Pyramid(source, allow_incomplete=allow_incomplete), _nearest_folder(out)
    region_view = View(pyramid, level=level or 0, roi=region, depth=read_depth, folder=folder)
    view = reduced(region_view, None if size is None else parse_size(size), max_size)
    job: ExportJob = module.prepare(view, suffix, options)
    check_space(job.estimate + view.scratch, shutil.disk_usage(folder).free, out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with place.publish() as part:
            job.write(part, on_progress or _ignore)
            pyramid.check_unchanged()
    except OSError as error:
        if error.filename not in (None, str(out)) and not _is_beside(error.filename, out):  # of the store
            raise
        reason = error.strerror or error
        raise EngineError(f"{out}: could not be written ({reason}); check the disk and its permissions") from error
    finally:
        view.close()
    seconds = time.perf_counter() - start
    return ExportResult(out, place.size(), view.width, view.height, len(view.levels), seconds, job.notes)


def names_picture(path: Path) -> bool:
    """Whether a name ends in a suffix of ``PICTURES``."""
    return path.name.lower().endswith(PICTURES)


def names_export(path: Path) -> bool:
    """Whether a name ends in a suffix of ``FORMATS``."""
    return path.name.lower().endswith(tuple(FORMATS))


def find_suffix(out: Path, format: str | None = None) -> str:
    """The suffix of a format, or the longest known one of a file's name, so that ``.ome.tif`` is not taken for ``.tif``."""
    if format is not None:
        suffix = f".{format.lower().removeprefix('.')}"
        if suffix not in FORMATS:
            names = ", ".join(each.removeprefix(".") for each in FORMATS)
            raise UsageError(f"{option('format')}: {format!r} is unknown; choose one of {names}")
        return suffix
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
    """Sentences about what the format of a picture does not hold of an image. Raises UsageError where options exclude it."""
    suffix = find_suffix(out)
    module = _format(suffix)
    notes: tuple[str, ...] = module.check_pixels(suffix, module.checked_options(suffix, options), pixels)
    return notes


def check_target(out: Path, *, size: tuple[int, int] | None = None, overwrite: bool) -> None:
    """Refuse a file that could not be written, before the work for it.

    Args:
        out: file or folder to write.
        size: (height, width) of the picture, if it is known.
        overwrite: accept an export that exists.

    Raises:
        UsageError: an unknown suffix, or a picture beyond its format.
        InputError: the file exists, or something else is in its place.
    """
    suffix = find_suffix(out)
    if size is not None:
        _format(suffix).check_size(suffix, size[1], size[0])
    _check_place(FORMATS[suffix].place(out), overwrite=overwrite)


def _check_place(place: Place, *, overwrite: bool) -> None:
    folder = _nearest_folder(place.out)
    if not folder.is_dir():
        raise InputError(f"{place.out}: {folder} is not a folder; choose another name")
    place.check(overwrite=overwrite)


def _format(suffix: str) -> Any:  # noqa: ANN401 (modules have no common type)
    """The module of a suffix."""
    return importlib.import_module(f"{__name__}.{FORMATS[suffix].module}")


def _nearest_folder(out: Path) -> Path:
    """The nearest parent that exists."""
    return next(p for p in out.absolute().parents if p.exists())


def _is_beside(name: str | bytes | int, out: Path) -> bool:
    """Whether a path lies in the output or in a temporary folder of it."""
    path = Path(str(name)).absolute()
    parent = out.absolute().parent
    return path == parent or (
        parent in path.parents and path.relative_to(parent).parts[0].startswith(f".{out.name[:20]}")
    )


def _ignore(done: int, total: int) -> None:
    """Progress without a listener."""
