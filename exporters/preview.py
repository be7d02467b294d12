"""Flat pictures for eyes and browsers: PNG, JPEG and WebP, at full size or smaller.

Knows the limits of these formats and how libvips saves them. Reads the one level that is just large enough and streams
it through libvips; see ``stream``. Memory grows with the width of that level, not with its height: one band (a row
of cells, normally 512 rows) and the pyramid's cache. WebP is the exception: its encoder holds the whole picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyvips

from engine.errors import EngineError, Interrupted, UsageError
from engine.exporters.colour import srgb_profile
from engine.exporters.job import Progress, check_range, pick
from engine.exporters.pyramid import Level, Pyramid
from engine.exporters.stream import LevelStream

MM_PER_INCH = 25.4


@dataclass(frozen=True, slots=True)
class Kind:
    """A format of libvips: its saver, the most pixels a side it can say, its depth, and bytes it takes of raw ones."""

    name: str
    saver: str
    side: int
    bits: int
    fraction: float


JPEG = Kind("JPEG", "jpegsave", 65_535, 8, 0.5)
# PNG could say 2**31 - 1 a side; libvips ends before.
PNG = Kind("PNG", "pngsave", 100_000_000, 16, 1.0)
WEBP = Kind("WebP", "webpsave", 16_383, 8, 0.5)
KINDS = {".jpg": JPEG, ".jpeg": JPEG, ".png": PNG, ".webp": WEBP}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """``max_size`` bounds the longest side in pixels; None keeps the full size. PNG is lossless at any ``quality``."""

    max_size: int | None = None
    quality: int = 90
    dpi: float = 300.0

    def __post_init__(self) -> None:
        check_range("quality", self.quality, 1, 100)
        check_range("dpi", self.dpi, 1, 100_000)
        if self.max_size is not None:
            check_range("max_size", self.max_size, 1, PNG.side)


@dataclass(frozen=True, slots=True)
class PreviewJob:
    """A checked export of one level to one flat picture."""

    pyramid: Pyramid
    options: Options
    kind: Kind
    level: int
    width: int
    height: int
    levels: int = 1
    notes: tuple[str, ...] = ()

    @property
    def estimate(self) -> int:
        deep = min(self.kind.bits, 8 * self.pyramid.dtype.itemsize) // 8
        return int(self.width * self.height * 3 * deep * self.kind.fraction)

    def write(self, path: Path, on_progress: Progress) -> None:
        """Save in a thread, so that an interrupt reaches this one: it ends the stream, and libvips gives up."""
        total = self.pyramid.levels[self.level].height
        stream = LevelStream(self.pyramid, self.level, lambda rows: on_progress(rows, total))
        with ThreadPoolExecutor(1) as thread:
            try:
                thread.submit(self._save, stream, path).result()
            except pyvips.Error as error:
                stream.check()  # the cause, where it was ours
                raise EngineError(f"{path}: libvips could not write it: {' '.join(str(error).split())}") from error
            except BaseException:
                stream.stop(Interrupted("export stopped"))
                raise
        stream.check()

    def _save(self, stream: LevelStream, path: Path) -> None:
        image = pyvips.Image.new_from_source(stream.source(), "", access="sequential", fail_on="error")
        save = getattr(self._finish(image), self.kind.saver)
        quality = {} if self.kind is PNG else {"Q": self.options.quality}
        save(str(path), **quality)

    def _finish(self, image: pyvips.Image) -> pyvips.Image:
        """Size, depth, profile and resolution; lazy, as everything in libvips."""
        if (image.width, image.height) != (self.width, self.height):
            image = image.resize(self.width / image.width, vscale=self.height / image.height)
        if self.kind.bits == 8 and image.format != "uchar":
            image = (image >> 8).cast("uchar")
        per_mm = self.options.dpi / MM_PER_INCH
        image = image.copy(interpretation="srgb" if image.format == "uchar" else "rgb16", xres=per_mm, yres=per_mm)
        image.set_type(pyvips.GValue.blob_type, "icc-profile-data", srgb_profile())
        return image


def prepare(pyramid: Pyramid, suffix: str, given: Mapping[str, Any]) -> PreviewJob:
    """Check the options against the pyramid and the format's limits; nothing is written yet."""
    options, kind = pick(Options, given, suffix), KINDS[suffix]
    if not pyvips.type_find("VipsOperation", kind.saver):
        raise UsageError(f"this build of libvips writes no {kind.name}: choose another suffix, e.g. .png")
    width, height = target_size(pyramid.levels[0], options.max_size)
    if max(width, height) > kind.side:
        raise UsageError(
            f"{width} x {height} pixels, limit of {kind.name} {kind.side} a side: "
            f"pass max_size={kind.side}, or export a .tif"
        )
    return PreviewJob(pyramid, options, kind, pick_level(pyramid.levels, max(width, height)), width, height)


def target_size(full: Level, max_size: int | None) -> tuple[int, int]:
    """(width, height) with the longest side at most ``max_size``; never enlarged, never below one pixel."""
    longest = max(full.width, full.height)
    if max_size is None or longest <= max_size:
        return full.width, full.height
    return max(1, round(full.width * max_size / longest)), max(1, round(full.height * max_size / longest))


def pick_level(levels: tuple[Level, ...], longest: int) -> int:
    """The smallest level that need not be enlarged."""
    return max(index for index, level in enumerate(levels) if max(level.height, level.width) >= longest)
