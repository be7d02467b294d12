"""Pyramidal tiled TIFF, and OME-TIFF with the same tiles.

Pixels come cell by cell from a ``Pyramid``, and pages are the store's own levels, so memory does not depend on the size of
the image: the pyramid's cache, a few cells and one batch of tiles. docs/decisions/0002-tiff-writer.md says why tifffile
writes, not libvips.
"""

from __future__ import annotations

import importlib.util
import struct
import uuid
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from engine.errors import UsageError, option
from engine.exporters.about import description, software
from engine.exporters.job import Progress, check_print, check_range, parse_options, resolution, thread_count
from engine.exporters.pyramid import Pixels, Pyramid
from engine.exporters.view import View
from engine.geometry import Box, Grid
from engine.pixels import PixelFormat

_MIN_TILE = 64
"""Least side of a tile in pixels."""

COMPRESSIONS = ("deflate", "lzw", "jpeg", "none")

_EFFORT = 4
"""Level of deflate: three quarters of the default level's time by libdeflate, under half by zlib, for 1 to 2 % more bytes."""

_NEED_IMAGECODECS = ("jpeg", "lzw")

PRESETS: dict[str, dict[str, Any]] = {
    "print": {"compression": "deflate"},  # lossless, in the form that every reader knows
    "web": {"compression": "jpeg", "quality": 85},  # a tenth of the size
}
"""Purpose -> options that it stands for; options that are given change them."""

CLASSIC_LIMIT = 2**32
"""Largest classic TIFF in bytes: its offsets have 32 bits."""

CLASSIC_MARGIN = 32 << 20
"""Reserve for bytes other than pixels: deflate's growth on noise (1.3 MB in 4 GiB), 24 bytes per tile, tags."""

LOSSLESS_SLACK = 1.5
"""Upper bound of deflate (with a predictor) relative to the store's zstd: 0.4 to 0.8 on photographs, 1.2 on a gradient."""

DEFLATE_FLOOR = 512
"""Lower bound of deflate: 1/512 of the raw bytes. One colour shrinks to 1/900."""

JPEG_FRACTION = 0.5
"""Upper bound of JPEG relative to raw pixels: 0.09 on photographs at quality 90, 0.23 at 100 (1.4 on noise)."""

FULL_CHROMA_QUALITY = 90
"""Least JPEG quality without chroma subsampling, as in libvips."""

_REDUCED = {"subfiletype": 1, "software": False}
"""Tags of a page that is a reduced copy of the first."""

_SMALLEST_LEVEL = 512
"""Levels that the store lacks are added until the longer side has this many pixels at most."""

BATCH_TILES = 4
"""Tiles in flight per thread; tifffile's default is 512 MiB of tiles."""

_READERS = 2
"""Threads that read, each a cell of the store: a read waits for Zarr's own threads in turns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TiffOptions:
    """Options of TIFF and OME-TIFF."""

    preset: str | None = None
    """Purpose: print or web."""
    compression: str = "deflate"
    """deflate, lzw, jpeg or none."""
    quality: int = 90
    """JPEG quality, 1 to 100."""
    tile: int = 512
    """Side of a tile in pixels, a multiple of 16."""
    bigtiff: bool | None = None
    """Write BigTIFF or classic TIFF; None decides by size."""
    depth: int | None = None
    """Bits per channel, 8 or 16; None keeps the store's."""
    dpi: float | None = None
    """Resolution for print, in dots per inch; None: the picture's, or ``DEFAULT_DPI``."""
    width_mm: float | None = None
    """Width of the print in mm, in place of ``dpi``."""
    workers: int | None = None
    """Threads that compress; None uses one per core, up to 8."""

    def __post_init__(self) -> None:
        if self.compression not in COMPRESSIONS:
            choices = ", ".join(COMPRESSIONS)
            raise UsageError(f"{option('compression')}: {self.compression!r} is unknown; choose one of {choices}")
        check_range("quality", self.quality, 1, 100)
        check_range("tile", self.tile, _MIN_TILE, 4096)
        check_print(self.dpi, self.width_mm)
        check_range("workers", self.threads, 1, 256)
        if self.tile % 16:
            raise UsageError(f"{option('tile')}: {self.tile} is no multiple of 16, which TIFF demands; give e.g. 512")

    @property
    def threads(self) -> int:
        """``workers`` with its default filled in."""
        return thread_count(self.workers)


@dataclass(frozen=True, slots=True)
class TiffJob:
    """A checked export to one TIFF file."""

    view: View
    options: TiffOptions
    ome: bool
    """Whether to write OME-TIFF: levels in SubIFDs, and OME-XML."""

    @property
    def raw(self) -> int:
        """Bytes of all tiles uncompressed, with padding at the border."""
        tile_bytes = self.options.tile**2 * self.view.pixels.bytes
        return sum(len(self._grid(index)) for index in range(len(self.view.levels))) * tile_bytes

    @property
    def estimate(self) -> int:
        if self.options.compression == "jpeg":
            return int(self.raw * JPEG_FRACTION)
        if self.options.compression in ("deflate", "lzw"):
            stored = sum(self.view.stored_bytes(index) for index in range(len(self.view.levels)))
            return min(
                self.raw,
                int(stored * LOSSLESS_SLACK * (2 if self.options.compression == "lzw" else 1))
                + self.raw // DEFLATE_FLOOR,
            )
        return self.raw

    @property
    def bigtiff(self) -> bool:
        """Whether to write BigTIFF."""
        return needs_bigtiff(self.raw) if self.options.bigtiff is None else self.options.bigtiff

    @property
    def notes(self) -> tuple[str, ...]:
        if not self.bigtiff:
            return ()
        return (f"BigTIFF, for {self.raw} bytes of pixels (classic: {CLASSIC_LIMIT}); some print software refuses it",)

    def write(self, path: Path, on_progress: Progress) -> None:
        """Write every level, from the largest to the smallest."""
        total = sum(len(self._grid(index)) for index in range(len(self.view.levels)))
        done = 0

        def tiles(index: int) -> Iterator[Pixels]:
            nonlocal done
            for tile in self._tiles(index):
                done += 1  # before the yield: tifffile does not ask again after the last tile
                on_progress(done, total)
                yield tile

        try:
            with tifffile.TiffWriter(path, bigtiff=self.bigtiff, ome=self.ome) as writer:
                for index in range(len(self.view.levels)):
                    writer.write(tiles(index), **self._page(index))
        except struct.error as error:  # an offset that does not fit 32 bits
            raise UsageError(
                f"the file passes {CLASSIC_LIMIT} bytes, the limit of classic TIFF; give {option('bigtiff', True)}"
            ) from error

    def _grid(self, index: int) -> Grid:
        level = self.view.levels[index]
        return Grid(level.height, level.width, (self.options.tile, self.options.tile))

    def _tiles(self, index: int) -> Iterator[Pixels]:
        """Tiles of a level in file order. Threads read the next ones while tifffile's compress the ones before."""
        level, size = self.view.levels[index], self.options.tile
        blocks = Grid(level.height, level.width, (size, max(1, level.cell[1] // size) * size))
        pending: deque[Future[list[Pixels]]] = deque()
        with ThreadPoolExecutor(_READERS) as readers:
            try:
                for at in blocks.indices():
                    pending.append(readers.submit(self._read_tiles, index, blocks.box(*at)))
                    if len(pending) > _READERS:
                        yield from pending.popleft().result()
                while pending:
                    yield from pending.popleft().result()
            finally:
                readers.shutdown(wait=True, cancel_futures=True)

    def _read_tiles(self, index: int, block: Box) -> list[Pixels]:
        """Tiles of a block, padded by repeating the border: black would ring into a JPEG's last pixels."""
        pixels, grid, size = self.view.read(index, block), self._grid(index), self.options.tile
        tiles = []
        for at in grid.indices(block):
            tile = pixels[grid.box(*at).relative_to(block).slices]
            height, width, _ = tile.shape
            if (height, width) != (size, size):
                tile = np.pad(tile, ((0, size - height), (0, size - width), (0, 0)), mode="edge")
            tiles.append(tile if tile.shape[2] > 1 else tile[..., 0])
        return tiles

    def _page(self, index: int) -> dict[str, Any]:
        level, size, pixels = self.view.levels[index], self.options.tile, self.view.pixels
        across, down = resolution(self.options.dpi, self.options.width_mm, self.view.width, self.view.dpi)
        dpi = (across * level.width / self.view.width, down * level.height / self.view.height)
        page: dict[str, Any] = {
            "shape": (level.height, level.width, pixels.channels)[: 2 + (pixels.channels > 1)],
            "dtype": self.view.dtype,
            "tile": (size, size),
            "photometric": "minisblack" if pixels.colours == 1 else "rgb",
            "planarconfig": "contig" if pixels.channels > 1 else None,
            "extrasamples": ["unassalpha"] if pixels.has_alpha else [],
            "iccprofile": self.view.profile,
            "resolution": dpi,
            "resolutionunit": "inch",
            "maxworkers": self.options.threads,
            "buffersize": size * size * pixels.bytes * BATCH_TILES * self.options.threads,
        }
        return page | self._codec() | self._plain() | (self._head() if index == 0 else _REDUCED)

    def _codec(self) -> dict[str, Any]:
        if self.options.compression == "deflate":
            return {"compression": "adobe_deflate", "predictor": "horizontal", "compressionargs": {"level": _EFFORT}}
        if self.options.compression == "lzw":
            return {"compression": "lzw", "predictor": "horizontal"}
        if self.options.compression == "jpeg":
            chroma = (1, 1) if self.options.quality >= FULL_CHROMA_QUALITY else (2, 2)
            codec = {"compression": "jpeg", "compressionargs": {"level": self.options.quality}}
            return codec if self.view.pixels.colours == 1 else codec | {"subsampling": chroma}
        return {}

    def _head(self) -> dict[str, Any]:
        """Tags of the first page alone: software, provenance, and in OME-TIFF the number of reduced levels."""
        about = description(self.view.provenance)
        if self.ome:
            # tifffile draws a random UUID. One from the provenance gives the same file for the same store.
            identifier = str(uuid.uuid5(uuid.NAMESPACE_URL, about))
            axes = "YX" if self.view.pixels.channels == 1 else "YXS"
            metadata = {"axes": axes, "Description": about, "Creator": software(), "UUID": identifier}
            return {"software": software(), "metadata": metadata, "subifds": len(self.view.levels) - 1}
        return {"software": software(), "description": about}

    def _plain(self) -> dict[str, Any]:
        """Keep tifffile from writing a description in its own JSON dialect."""
        return {} if self.ome else {"metadata": None}


def prepare(view: View, suffix: str, values: Mapping[str, Any]) -> TiffJob:
    """Check the options against the view. Nothing is written yet.

    Raises:
        UsageError: an option is unknown or out of range, or does not fit the view.
    """
    options = checked_options(suffix, values)
    side = max(view.height, view.width)
    # libvips refuses tiles that are several times as large as the image.
    options = replace(options, tile=min(options.tile, max(_MIN_TILE, -(-side // 16) * 16)))
    check_pixels(suffix, options, view.pixels)
    view.extend(max(options.tile, _SMALLEST_LEVEL))
    view.keep(count_levels(view, options.tile))
    job = TiffJob(view, options, ".ome." in suffix)
    if options.compression == "none" and not job.bigtiff and job.raw > CLASSIC_LIMIT:
        raise UsageError(
            f"{job.raw} bytes of pixels exceed classic TIFF ({CLASSIC_LIMIT}); leave {option('bigtiff')} unset, or compress"
        )
    return job


def checked_options(suffix: str, values: Mapping[str, Any]) -> TiffOptions:
    """The options of a TIFF. Raises UsageError for one that is unknown, out of range, or contradicts another."""
    preset = values.get("preset")
    if preset is not None and preset not in PRESETS:
        raise UsageError(f"{option('preset')}: {preset!r} is unknown; choose one of {', '.join(PRESETS)}")
    chosen = {name: value for name, value in values.items() if value is not None}
    options = parse_options(TiffOptions, PRESETS.get(preset or "", {}) | chosen, suffix)
    if options.compression in _NEED_IMAGECODECS and importlib.util.find_spec("imagecodecs") is None:
        raise UsageError(
            f"{option('compression')}: {options.compression} needs imagecodecs; pip install 'ourgan-engine[jpeg]', "
            "or use deflate"
        )
    if options.compression != "jpeg" and values.get("quality") is not None:
        raise UsageError(
            f"{option('quality')}: {options.compression} is lossless; give "
            f"{option('compression', 'jpeg')}, or leave it out"
        )
    return options


def check_size(suffix: str, width: int, height: int) -> None:
    """Accept any size: BigTIFF has no limit that matters."""


def needs_bigtiff(raw: int) -> bool:
    """Whether ``raw`` bytes of uncompressed tiles might not fit a classic TIFF.

    Compression is not considered: its result is known when the file is written, which is too late.
    """
    return raw > CLASSIC_LIMIT - CLASSIC_MARGIN


def count_levels(view: View | Pyramid, tile: int) -> int:
    """Number of levels down to the first that fits one tile; smaller ones save a reader nothing."""
    for count, level in enumerate(view.levels, start=1):
        if max(level.height, level.width) <= tile:
            return count
    return len(view.levels)


def check_pixels(suffix: str, options: TiffOptions, pixels: PixelFormat) -> tuple[str, ...]:
    """What a file loses of these pixels: nothing. Raises UsageError for compression by JPEG that cannot hold them."""
    depth = options.depth or pixels.depth
    if options.compression == "jpeg" and (depth != 8 or pixels.has_alpha):
        advice = "use deflate" if pixels.has_alpha else f"use deflate, or give {option('depth', 8)}"
        raise UsageError(
            f"{option('compression')}: jpeg holds 8 bits and no alpha, the image is {replace(pixels, depth=depth)}; {advice}"
        )
    return ()
