"""OpenEXR for 3D programs: tiles of half or single floats, and mip maps down to one pixel.

Colours become linear light, as renderers expect; data such as normals and roughness keep their values (``data``).
OpenImageIO writes, because it takes tiles one by one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import EngineError, UsageError, option
from engine.exporters.about import description, software
from engine.exporters.job import Progress, check_range, parse_options, thread_count
from engine.exporters.pyramid import Pixels
from engine.exporters.view import View
from engine.geometry import Grid
from engine.io.icc import load_profile

COMPRESSIONS = ("zip", "piz", "zips", "none")

DEPTHS: dict[int, tuple[str, np.dtype[Any]]] = {16: ("half", np.dtype(np.float16)), 32: ("float", np.dtype(np.float32))}

CHANNELS = {1: ("Y",), 2: ("Y", "A"), 3: ("R", "G", "B"), 4: ("R", "G", "B", "A")}

SRGB_CHROMATICITIES = (0.64, 0.33, 0.30, 0.60, 0.15, 0.06, 0.3127, 0.3290)
"""x, y of red, green, blue and white."""

MAX_SIDE = (1 << 31) - 1
"""Largest width and height in pixels: the format's windows have 32 bits with a sign."""

_BLOCK = 512
"""Side in pixels of the squares that are read and written at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExrOptions:
    """Options of OpenEXR."""

    compression: str = "zip"
    """zip, zips, piz (all lossless) or none."""
    tile: int = 64
    """Side of a tile in pixels, a power of two up to 512; renderers load textures by tiles of 64."""
    depth: int = 16
    """Bits per channel: 16 for half floats, 32 for single."""
    data: bool = False
    """Keep values, from 0 to 1, in place of a conversion to linear light."""
    workers: int | None = None
    """Threads that compress; None uses one per core, up to 8."""

    def __post_init__(self) -> None:
        if self.compression not in COMPRESSIONS:
            choices = ", ".join(COMPRESSIONS)
            raise UsageError(f"{option('compression')}: {self.compression!r} is unknown; choose one of {choices}")
        if self.depth not in DEPTHS:
            raise UsageError(f"{option('depth')}: {self.depth} is unknown; give 16 for half floats or 32 for single")
        if self.tile not in (16, 32, 64, 128, 256, 512):
            raise UsageError(
                f"{option('tile')}: {self.tile} is no power of two from 16 to 512, which textures want; give 64"
            )
        check_range("workers", self.threads, 1, 256)

    @property
    def threads(self) -> int:
        """``workers`` with its default filled in."""
        return thread_count(self.workers)


@dataclass(frozen=True, slots=True)
class ExrJob:
    """A checked export to one OpenEXR file."""

    view: View
    options: ExrOptions
    notes: tuple[str, ...] = ()

    @property
    def estimate(self) -> int:
        side = self.options.tile
        tiles = sum(len(Grid(level.height, level.width, (side, side))) for level in self.view.levels)
        return tiles * (side**2 * self.view.pixels.channels * self.options.depth // 8 + 64)

    def write(self, path: Path, on_progress: Progress) -> None:
        """Write every level, from the largest to the smallest."""
        import OpenImageIO as oiio  # noqa: N813

        oiio.attribute("exr_threads", self.options.threads)
        out: Any = oiio.ImageOutput.create("openexr")
        if out is None:
            raise EngineError(
                f"{path}: this build of OpenImageIO writes no OpenEXR ({oiio.geterror()}); install its wheel"
            )
        table = self._table()
        squares = [Grid(level.height, level.width, (_BLOCK, _BLOCK)) for level in self.view.levels]
        done, total = 0, sum(len(grid) for grid in squares)
        try:
            for index, grid in enumerate(squares):
                spec = self._spec(oiio, index)
                _check(out, path, out.open(str(path), spec, "AppendMIPLevel" if index else "Create"))
                for at in grid.indices():
                    box = grid.box(*at)
                    values = self._floats(self.view.read(index, box), table)
                    _check(out, path, out.write_tiles(box.x0, box.x1, box.y0, box.y1, 0, 1, values))
                    done += 1
                    on_progress(done, total)
            _check(out, path, out.close())
        finally:
            del out  # closes the file

    def _spec(self, oiio: Any, index: int) -> Any:  # noqa: ANN401 (OpenImageIO's types)
        level, first = self.view.levels[index], self.view.levels[0]
        channels = CHANNELS[self.view.pixels.channels]
        spec = oiio.ImageSpec(level.width, level.height, len(channels), DEPTHS[self.options.depth][0])
        spec.tile_width = spec.tile_height = self.options.tile
        spec.channelnames = channels
        if self.view.pixels.has_alpha:
            spec.alpha_channel = len(channels) - 1
        spec.attribute("compression", self.options.compression)
        spec.attribute("textureformat", "Plain Texture")
        spec.attribute("openexr:levelmode", 1)  # mip maps
        spec.attribute("openexr:roundingmode", 1)  # sizes rounded up, as the store's
        spec.attribute("openexr:lineOrder", "randomY")  # otherwise tiles wait in memory for those before them
        spec.attribute("Software", software())
        spec.attribute("ImageDescription", description(self.view.provenance))
        if not self.options.data:
            spec.attribute("oiio:ColorSpace", "lin_rec709_scene")
            spec.attribute("chromaticities", "float[8]", SRGB_CHROMATICITIES)
        assert first.bounds.cover(2**index) == level.bounds
        return spec

    def _table(self) -> NDArray[Any]:
        """Float of every integer value."""
        values = np.linspace(0, 1, self.view.pixels.white + 1)
        if not self.options.data:
            values = linear(values)
        return values.astype(DEPTHS[self.options.depth][1])

    def _floats(self, pixels: Pixels, table: NDArray[Any]) -> NDArray[Any]:
        """Pixels as floats; colours are multiplied by their opacity, as the format demands."""
        values = table[pixels]
        if self.view.pixels.has_alpha:
            alpha = pixels[..., -1:] / np.float32(self.view.pixels.white)
            values[..., :-1] *= alpha.astype(values.dtype)
            values[..., -1:] = alpha
        return values


def linear(values: NDArray[Any]) -> NDArray[Any]:
    """Linear light of sRGB values from 0 to 1 (IEC 61966-2-1)."""
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def prepare(view: View, suffix: str, values: Mapping[str, Any]) -> ExrJob:
    """Check the options against the view. Nothing is written yet.

    Raises UsageError for an option, or for colours of another profile than sRGB.
    """
    options = checked_options(suffix, values)
    check_size(suffix, view.levels[0].width, view.levels[0].height)
    if not options.data and view.profile not in (None, load_profile("srgb")):
        raise UsageError(
            f"{suffix}: colours of another profile than sRGB become no linear light; give {option('data', True)} to keep their "
            f"values, or enlarge the picture with {option('profile', 'srgb')}"
        )
    view.extend(1, exact=True)
    return ExrJob(view, options)


def checked_options(suffix: str, values: Mapping[str, Any]) -> ExrOptions:
    """The options of OpenEXR. Raises UsageError for one that is unknown or out of range."""
    options = parse_options(ExrOptions, values, suffix)
    if importlib.util.find_spec("OpenImageIO") is None:
        raise UsageError(f"{suffix}: OpenEXR needs OpenImageIO; pip install 'ourgan-engine[exr]'")
    return options


def view_depth(suffix: str, depth: int | None) -> None:
    """The store's own bits are read: ``depth`` is that of the floats."""


def check_size(suffix: str, width: int, height: int) -> None:
    """Refuse a picture beyond the format's limits. Raises UsageError."""
    if max(width, height) > MAX_SIDE:
        raise UsageError(f"{width} x {height} pixels exceed OpenEXR ({MAX_SIDE} per side); export a .tif")


def _check(out: Any, path: Path, is_done: bool) -> None:  # noqa: ANN401 (OpenImageIO's type)
    """Raise EngineError with OpenImageIO's reason unless a call succeeded."""
    if not is_done:
        reason = " ".join(str(out.geterror()).replace(str(path), path.name).split())
        raise EngineError(f"{path}: could not be written ({reason}); check the disk and its permissions")
