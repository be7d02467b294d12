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
from engine.exporters.job import Progress, check_print, check_range, parse_options, resolution
from engine.exporters.pyramid import Level
from engine.exporters.stream import LevelStream
from engine.exporters.view import View
from engine.pixels import PixelFormat
from engine.plan.print_size import MM_PER_INCH


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
    has_alpha: bool = True
    """Whether it holds transparency."""
    has_grey: bool = True
    """Whether it holds grey as such."""


JPEG = VipsFormat("JPEG", "jpegsave", 65_535, 8, 0.5, has_alpha=False)
# PNG's header allows 2**31 - 1 per side; libvips stops earlier.
PNG = VipsFormat("PNG", "pngsave", 100_000_000, 16, 1.0)
WEBP = VipsFormat("WebP", "webpsave", 16_383, 8, 0.5, has_grey=False)
VIPS_FORMATS = {".jpg": JPEG, ".jpeg": JPEG, ".png": PNG, ".webp": WEBP}


@dataclass(frozen=True, slots=True, kw_only=True)
class PreviewOptions:
    """Options of the flat formats."""

    max_size: int | None = None
    """Limit in pixels of the longest side; None keeps the full size."""
    size: tuple[int, int] | None = None
    """(width, height) in pixels; None keeps the full size."""
    dpi: float | None = None
    """Resolution for print, in dots per inch; None: the picture's, or ``DEFAULT_DPI``."""
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
        pixels = self.pyramid.pixels
        sample_bytes = min(self.vips_format.bits, pixels.depth) // 8
        return int(self.width * self.height * pixels.channels * sample_bytes * self.vips_format.fraction)

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
        pixels, profile = self.pyramid.pixels, self.pyramid.profile
        grey, rgb = ("b-w", "srgb") if pixels.depth == 8 else ("grey16", "rgb16")
        image = image.copy(interpretation=grey if pixels.colours == 1 else rgb)
        if (image.width, image.height) != (self.width, self.height):
            image = _resized(image, self.width, self.height, pixels)
        if pixels.has_alpha and not self.vips_format.has_alpha:
            image = image.flatten(background=pixels.white)
        if self.vips_format.bits == 8 and pixels.depth == 16:
            image = (image / 257).rint().cast("uchar").copy(interpretation="b-w" if pixels.colours == 1 else "srgb")
        dpi = resolution(self.options.dpi, self.options.width_mm, self.width, self.pyramid.dpi)
        across, down = (n / MM_PER_INCH for n in dpi)
        image = image.copy(xres=across, yres=down)
        if profile is not None:
            image.set_type(pyvips.GValue.blob_type, "icc-profile-data", profile)
            if pixels.colours == 1 and not self.vips_format.has_grey:
                image = image.icc_transform("srgb", embedded=True, intent="relative", depth=8)
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
    level, notes = choose_level(pyramid.levels, max(width, height)), check_pixels(suffix, options, pyramid.pixels)
    return PreviewJob(pyramid, options, vips_format, level, width, height, notes=notes)


def checked_options(suffix: str, values: Mapping[str, Any]) -> PreviewOptions:
    """The options of a format. Raises UsageError for one that is out of range or that the format lacks."""
    return parse_options(PngOptions if VIPS_FORMATS[suffix] is PNG else LossyOptions, values, suffix)


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


def check_pixels(suffix: str, options: PreviewOptions, pixels: PixelFormat) -> tuple[str, ...]:
    """A sentence about each part of these pixels that a format does not hold."""
    vips_format, notes = VIPS_FORMATS[suffix], []
    if pixels.depth > vips_format.bits:
        notes.append(f"{vips_format.name} has {vips_format.bits} bits: the {pixels.depth} of the image are rounded")
    if pixels.has_alpha and not vips_format.has_alpha:
        notes.append(f"{vips_format.name} has no transparency: it is flattened on white")
    return tuple(notes)


def _resized(image: pyvips.Image, width: int, height: int, pixels: PixelFormat) -> pyvips.Image:
    """The image reduced; by premultiplied colours, so that transparent ones do not bleed."""
    across, down = width / image.width, height / image.height
    if not pixels.has_alpha:
        return image.resize(across, vscale=down)
    largest = {"max_alpha": pixels.white}
    return image.premultiply(**largest).resize(across, vscale=down).unpremultiply(**largest).rint().cast(image.format)


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
