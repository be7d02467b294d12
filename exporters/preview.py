"""Flat pictures for viewers and browsers: PNG, JPEG and WebP, at full size or smaller.

Rows go to encoders of strips (``rows``, ``flat``), in memory that grows neither with the width nor with the height. WebP is
libvips' alone (``stream``): its encoder holds the whole picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyvips

from engine.causes import naming
from engine.errors import UsageError, option
from engine.exporters.about import describe, short_description
from engine.exporters.flat import JpegEncoder, PngEncoder
from engine.exporters.job import Progress, check_print, check_range, parse_options, resolution
from engine.exporters.rows import Encoder, RowReader, RowWriter
from engine.exporters.stream import LevelStream, vips_interpretation
from engine.exporters.view import View
from engine.pixels import PixelFormat
from engine.plan.print_size import MM_PER_INCH


@dataclass(frozen=True, slots=True)
class FlatFormat:
    """A format of one picture."""

    name: str
    """Name for messages."""
    side: int
    """Largest width and height in pixels."""
    bits: int
    """Largest depth per channel."""
    fraction: float
    """Expected size, as a fraction of the raw bytes."""
    has_alpha: bool = True
    """Whether it holds transparency."""


JPEG = FlatFormat("JPEG", 65_535, 8, 0.5, has_alpha=False)
# PNG's header allows 2**31 - 1 per side; libvips reads less.
PNG = FlatFormat("PNG", 100_000_000, 16, 1.0)
WEBP = FlatFormat("WebP", 16_383, 8, 0.5)
FLAT_FORMATS = {".jpg": JPEG, ".jpeg": JPEG, ".png": PNG, ".webp": WEBP}


@dataclass(frozen=True, slots=True, kw_only=True)
class PreviewOptions:
    """Options of the flat formats."""

    dpi: float | None = None
    """Resolution for print, in dots per inch; None: the picture's, or ``DEFAULT_DPI``."""
    width_mm: float | None = None
    """Width of the print in mm, in place of ``dpi``."""

    def __post_init__(self) -> None:
        check_print(self.dpi, self.width_mm)


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

    view: View
    options: PreviewOptions
    format: FlatFormat
    notes: tuple[str, ...] = ()

    @property
    def estimate(self) -> int:
        return int(self.view.width * self.view.height * self.view.pixels.bytes * self.format.fraction)

    @property
    def _dpi(self) -> tuple[float, float]:
        return resolution(self.options.dpi, self.options.width_mm, self.view.width, self.view.dpi)

    def write(self, path: Path, on_progress: Progress) -> None:
        """Write the picture."""
        if isinstance(self.options, LossyOptions) and self.format is WEBP:
            quality = self.options.quality
            stream = LevelStream(self.view, 0, lambda rows: on_progress(rows, self.view.height))
            stream.process(lambda image: self._described(image).webpsave(str(path), Q=quality), path, "write it")
            return
        encoder, reader = self._encoder(), RowReader(self.view, 0)
        try:
            with naming(path), path.open("wb") as file, RowWriter(file, encoder) as writer:
                for top in range(0, self.view.height, encoder.rows):
                    bottom = min(top + encoder.rows, self.view.height)
                    writer.put(reader.read(top, bottom))
                    on_progress(bottom, self.view.height)
                writer.finish()
        finally:
            reader.close()

    def _encoder(self) -> Encoder:
        about: dict[str, Any] = {
            "profile": self.view.profile,
            "dpi": self._dpi,
            "about": short_description(self.view.provenance),
        }
        if isinstance(self.options, LossyOptions):
            return JpegEncoder(
                self.view.width, self.view.height, self.view.pixels, quality=self.options.quality, **about
            )
        return PngEncoder(self.view.width, self.view.height, self.view.pixels, **about)

    def _described(self, image: pyvips.Image) -> pyvips.Image:
        """An image of libvips with profile, resolution and description, in colours where the format has no grey."""
        pixels, profile = self.view.pixels, self.view.profile
        across, down = (n / MM_PER_INCH for n in self._dpi)
        image = image.copy(interpretation=vips_interpretation(pixels), xres=across, yres=down)
        if profile is not None:
            image.set_type(pyvips.GValue.blob_type, "icc-profile-data", profile)
            if pixels.colours == 1:
                image = image.icc_transform("srgb", embedded=True, intent="relative", depth=8)
        describe(image, self.view.provenance)
        return image


def prepare(view: View, suffix: str, values: Mapping[str, Any]) -> PreviewJob:
    """Check the options against the view and the format's limits. Nothing is written yet.

    Raises:
        UsageError: an option is unknown or out of range, or the picture exceeds the format's limits.
    """
    options = checked_options(suffix, values)
    check_size(suffix, view.width, view.height)
    notes = check_pixels(suffix, options, view.pyramid.pixels)
    view.keep(1)
    return PreviewJob(view, options, FLAT_FORMATS[suffix], notes)


def checked_options(suffix: str, values: Mapping[str, Any]) -> PreviewOptions:
    """The options of a format. Raises UsageError for one that is out of range or that the format lacks."""
    return parse_options(PngOptions if FLAT_FORMATS[suffix] is PNG else LossyOptions, values, suffix)


def view_depth(suffix: str, depth: int | None) -> int | None:
    """Bits per channel that are read."""
    return depth if FLAT_FORMATS[suffix] is PNG else 8


def check_size(suffix: str, width: int, height: int) -> None:
    """Refuse a picture that exceeds the format's limits, or a format that this libvips lacks. Raises UsageError."""
    format = FLAT_FORMATS[suffix]
    name, side = format.name, format.side
    if format is WEBP and not pyvips.type_find("VipsOperation", "webpsave"):
        raise UsageError(f"{suffix}: this build of libvips writes no {name}; choose another suffix, e.g. .png")
    if max(width, height) > side:
        raise UsageError(
            f"{width} x {height} pixels exceed {name} ({side} per side); give {option('max_size', side)}, or export a .tif"
        )


def check_pixels(suffix: str, options: PreviewOptions, pixels: PixelFormat) -> tuple[str, ...]:
    """A sentence about each part of these pixels that a format does not hold."""
    format, notes = FLAT_FORMATS[suffix], []
    if pixels.depth > format.bits:
        notes.append(f"{format.name} has {format.bits} bits: the {pixels.depth} of the image are rounded")
    if pixels.has_alpha and not format.has_alpha:
        notes.append(f"{format.name} has no transparency: it is flattened on white")
    return tuple(notes)
