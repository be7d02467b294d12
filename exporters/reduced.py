"""A view at a smaller size: libvips reduces the smallest sufficient level, into memory or a temporary file without a name.

Every format then reads it as a level of the store. Levels below halve it.
"""

from __future__ import annotations

import threading
from typing import Any

import pyvips

from engine.errors import UsageError, option
from engine.exporters.job import check_range
from engine.exporters.pyramid import Level
from engine.exporters.stream import LevelStream, vips_interpretation
from engine.exporters.view import IN_MEMORY, SQUARE, Plane, View
from engine.pixels import PixelFormat

_LARGEST = 1 << 31
"""Largest side in pixels that is accepted as a limit."""


class ReducedView(View):
    """A view whose first level has another size than any of the store.

    Args:
        base: the store, or a part of it.
        width, height: size in pixels, at most that of ``base``.
    """

    def __init__(self, base: View, width: int, height: int) -> None:
        self._base = base
        self.pyramid, self.folder, self.pixels, self.is_whole = base.pyramid, base.folder, base.pixels, False
        self._first, self._boxes, self._computed, self._lock = 0, [], {}, threading.RLock()
        self.levels = (Level("0", height, width, (SQUARE, SQUARE)),)
        self._source = choose_level(base.levels, max(width, height))

    def stored_bytes(self, level: int) -> int:
        """Bytes of the level in a store, from those of the level that is reduced."""
        share = self.levels[level].bounds.area / self._base.levels[self._source].bounds.area
        return int(self._base.stored_bytes(self._source) * share)

    def close(self) -> None:
        """Free the levels."""
        super().close()
        self._base.close()

    def _compute(self, level: int) -> Plane:
        if level:
            return super()._compute(level)
        size = (self.height, self.width)
        plane = Plane(size, self.pixels, self.folder, IN_MEMORY)
        stream, position = LevelStream(self._base, self._source, lambda rows: None), 0

        def take(data: bytes) -> int:
            nonlocal position
            try:
                plane.write_bytes(position, data)
            except BaseException as error:
                stream.stop(error)
                return -1
            position += len(data)
            return len(data)

        def work(image: pyvips.Image) -> None:
            target = pyvips.TargetCustom()
            target.on_write(take)
            _reduced(image, self.width, self.height, self.pixels).rawsave_target(target)

        try:
            stream.process(work, self.folder, "reduce the picture")
        except BaseException:
            plane.close()
            raise
        return plane


def reduced(view: View, size: tuple[int, int] | None, max_size: int | None) -> View:
    """The view itself, or at a smaller size.

    Args:
        view: the store, or a part of it.
        size: (width, height) in pixels.
        max_size: limit in pixels of the longest side, in place of ``size``.

    Raises:
        UsageError: the size enlarges or distorts the picture, or both are given.
    """
    if size is not None and max_size is not None:
        raise UsageError(f"{option('size')} and {option('max_size')}: exclude each other; give one of them")
    if max_size is not None:
        check_range("max_size", max_size, 1, _LARGEST)
    full = view.levels[0]
    width, height = size or target_size(full, max_size)
    if size is not None:
        check_aspect(full, width, height)
    for index, level in enumerate(view.levels):
        if (level.width, level.height) == (width, height):
            return view.drop(index)
    return ReducedView(view, width, height)


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


def _reduced(image: pyvips.Image, width: int, height: int, pixels: PixelFormat) -> pyvips.Image:
    """The image at a smaller size; by premultiplied colours, so that transparent ones do not bleed."""
    image = image.copy(interpretation=vips_interpretation(pixels))
    across, down = width / image.width, height / image.height
    if not pixels.has_alpha:
        return image.resize(across, vscale=down)
    largest: dict[str, Any] = {"max_alpha": pixels.white}
    return image.premultiply(**largest).resize(across, vscale=down).unpremultiply(**largest).rint().cast(image.format)
