"""Flat pictures for viewers and browsers: PNG, JPEG and WebP, at full size or smaller.

The smallest sufficient level is streamed through libvips (``stream``). Memory grows with the width of that level, not with
its height: one band (a row of cells, normally 512 rows) and the pyramid's cache. WebP is the exception: its encoder holds
the whole picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyvips

from engine.causes import naming, raise_if_exhausted
from engine.errors import EngineError, Interrupted, UsageError, option
from engine.exporters.about import describe
from engine.exporters.colour import srgb_profile
from engine.exporters.job import MM_PER_INCH, Progress, check_print, check_range, parse_options, print_dpi
from engine.exporters.pyramid import Level
from engine.exporters.stream import LevelStream
from engine.exporters.view import View


@dataclass(frozen=True, slots=True)
class VipsFormat:
    """A format that libvips saves."""

    name: str
    """Name for messages."""
    saver: str
    """Method of ``pyvips.Image`` that saves it."""
    side: int
    """Largest width and height in pixels."""
    bits: int
    """Largest depth per channel."""
    fraction: float
    """Expected size, as a fraction of the raw bytes."""


JPEG = VipsFormat("JPEG", "jpegsave", 65_535, 8, 0.5)
# PNG's header allows 2**31 - 1 per side; libvips stops earlier.
PNG = VipsFormat("PNG", "pngsave", 100_000_000, 16, 1.0)
WEBP = VipsFormat("WebP", "webpsave", 16_383, 8, 0.5)
VIPS_FORMATS = {".jpg": JPEG, ".jpeg": JPEG, ".png": PNG, ".webp": WEBP}


@dataclass(frozen=True, slots=True, kw_only=True)
class PreviewOptions:
    """Options of the flat formats."""

    max_size: int | None = None
    """Limit in pixels of the longest side; None keeps the full size."""
    size: tuple[int, int] | None = None
    """(width, height) in pixels; None keeps the full size."""
    dpi: float | None = None
    """Resolution for print, in dots per inch; None: 300."""
    width_mm: float | None = None
    """Width of the print in mm, in place of ``dpi``."""

    def __post_init__(self) -> None:
        check_print(self.dpi, self.width_mm)
        if self.size is not None and self.max_size is not None:
            raise UsageError(f"{option('size')} and {option('max_size')}: exclude each other; give one of them")
        if self.max_size is not None:
            check_range("max_size", self.max_size, 1, PNG.side)


@dataclass(frozen=True, slots=True, kw_only=True)
class PngOptions(PreviewOptions):
    """Options of PNG."""

    depth: int | None = None
    """Bits per channel, 8 or 16; None keeps the store's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossyOptions(PreviewOptions):
    """Options of JPEG and WebP."""

    quality: int = 90
    """1 to 100."""

    def __post_init__(self) -> None:
        PreviewOptions.__post_init__(self)  # super() does not find the class that slots make
        check_range("quality", self.quality, 1, 100)


@dataclass(frozen=True, slots=True)
class PreviewJob:
    """A checked export of one level to one flat picture."""

    pyramid: View
    options: PreviewOptions
    vips_format: VipsFormat
    level: int
    """Index of the level that is read."""
    width: int
    height: int
    levels: int = 1
    notes: tuple[str, ...] = ()

    @property
    def estimate(self) -> int:
        sample_bytes = min(self.vips_format.bits, 8 * self.pyramid.dtype.itemsize) // 8
        return int(self.width * self.height * 3 * sample_bytes * self.vips_format.fraction)

    def write(self, path: Path, on_progress: Progress) -> None:
        """Save in another thread, so that an interrupt reaches this one: it ends the stream, and libvips gives up."""
        total = self.pyramid.levels[self.level].height
        stream = LevelStream(self.pyramid, self.level, lambda rows: on_progress(rows, total))
        try:
            with ThreadPoolExecutor(1) as thread:
                try:
                    thread.submit(self._save, stream, path).result()
                except pyvips.Error as error:
                    stream.check()  # raises the cause, if reading the pyramid failed
                    with naming(path):
                        raise_if_exhausted(error)
                    reason = " ".join(str(error).split())
                    raise EngineError(
                        f"{path}: libvips could not write it ({reason}); look at the memory and the disk, then repeat the command"
                    ) from error
                except BaseException:
                    stream.stop(Interrupted("export stopped"))
                    raise
        finally:
            stream.close()
        stream.check()

    def _save(self, stream: LevelStream, path: Path) -> None:
        image = pyvips.Image.new_from_source(stream.source(), "", access="sequential", fail_on="error")
        save = getattr(self._finish(image), self.vips_format.saver)
        quality = {"Q": self.options.quality} if isinstance(self.options, LossyOptions) else {}
        save(str(path), **quality)

    def _finish(self, image: pyvips.Image) -> pyvips.Image:
        """Set size, depth, profile, resolution and description; libvips computes lazily."""
        if (image.width, image.height) != (self.width, self.height):
            image = image.resize(self.width / image.width, vscale=self.height / image.height)
        if self.vips_format.bits == 8 and image.format != "uchar":
            image = (image >> 8).cast("uchar")
        per_mm = print_dpi(self.options.dpi, self.options.width_mm, self.width) / MM_PER_INCH
        image = image.copy(interpretation="srgb" if image.format == "uchar" else "rgb16", xres=per_mm, yres=per_mm)
        image.set_type(pyvips.GValue.blob_type, "icc-profile-data", srgb_profile())
        describe(image, self.pyramid.provenance)
        return image


def prepare(pyramid: View, suffix: str, values: Mapping[str, Any]) -> PreviewJob:
    """Check the options against the pyramid and the format's limits. Nothing is written yet.

    Raises:
        UsageError: an option is unknown or out of range, or the picture exceeds the format's limits.
    """
    vips_format = VIPS_FORMATS[suffix]
    options = checked_options(suffix, values)
    width, height = options.size or target_size(pyramid.levels[0], options.max_size)
    if options.size is not None:
        check_aspect(pyramid.levels[0], width, height)
    check_size(suffix, width, height)
    return PreviewJob(pyramid, options, vips_format, choose_level(pyramid.levels, max(width, height)), width, height)


def checked_options(suffix: str, values: Mapping[str, Any]) -> PreviewOptions:
    """The options of a format. Raises UsageError for one that is out of range or that the format lacks."""
    return parse_options(PngOptions if VIPS_FORMATS[suffix] is PNG else LossyOptions, values, suffix)


def view_depth(suffix: str, depth: int | None) -> int | None:
    """Bits per channel that are read: 8 for JPEG and WebP."""
    return depth if VIPS_FORMATS[suffix].bits > 8 else 8


def check_size(suffix: str, width: int, height: int) -> None:
    """Refuse a picture that exceeds the format's limits, or a format that this libvips lacks. Raises UsageError."""
    vips_format = VIPS_FORMATS[suffix]
    name, side = vips_format.name, vips_format.side
    if not pyvips.type_find("VipsOperation", vips_format.saver):
        raise UsageError(f"{suffix}: this build of libvips writes no {name}; choose another suffix, e.g. .png")
    if max(width, height) > side:
        raise UsageError(
            f"{width} x {height} pixels exceed {name} ({side} per side); give {option('max_size', side)}, or export a .tif"
        )


def target_size(full: Level, max_size: int | None) -> tuple[int, int]:
    """(width, height) with the longest side at most ``max_size``: never enlarged, never below one pixel."""
    longest = max(full.width, full.height)
    if max_size is None or longest <= max_size:
        return full.width, full.height
    return max(1, round(full.width * max_size / longest)), max(1, round(full.height * max_size / longest))


def check_aspect(full: Level, width: int, height: int) -> None:
    """Refuse a size that enlarges the picture or distorts it by more than a pixel. Raises UsageError."""
    if width > full.width or height > full.height:
        raise UsageError(
            f"{option('size')}: {width}x{height} enlarges the picture ({full.width} x {full.height} pixels); render it "
            "larger, or give a smaller size"
        )
    fitting = max(1, round(full.height * width / full.width))
    if abs(height - fitting) > 1 and abs(width - full.width * height / full.height) > 1:
        raise UsageError(
            f"{option('size')}: {width}x{height} distorts the picture ({full.width} x {full.height} pixels); give "
            f"{width}x{fitting}, or cut it by {option('roi')}"
        )


def choose_level(levels: tuple[Level, ...], longest: int) -> int:
    """Index of the smallest level whose longest side has at least ``longest`` pixels."""
    return max(index for index, level in enumerate(levels) if max(level.height, level.width) >= longest)
