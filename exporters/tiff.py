"""Pyramidal tiled TIFF, and OME-TIFF with the same tiles.

Knows TIFF: pages, tiles, compression, BigTIFF, tags. Takes its pixels tile by tile from a ``Pyramid`` and copies the
store's own levels, so memory does not depend on the size of the image: the pyramid's cache and one batch of tiles.
Why tifffile writes and not libvips: docs/decisions/0002-tiff-writer.md.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import struct
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from engine.errors import UsageError
from engine.exporters.colour import srgb_profile
from engine.exporters.job import Progress, check_range, pick
from engine.exporters.pyramid import Pixels, Pyramid
from engine.geometry import Grid

COMPRESSIONS = ("deflate", "jpeg", "none")

CLASSIC_LIMIT = 2**32
"""Offsets of a classic TIFF are 32 bits wide."""

CLASSIC_MARGIN = 32 << 20
"""For what is not pixels: deflate's growth on noise (5 bytes in 16 KB: 1.3 MB in 4 GiB), 24 bytes a tile, tags."""

LOSSLESS_SLACK = 1.5
"""Deflate with a predictor against the store's zstd: 0.4 to 0.8 of its bytes on photographs, 1.2 on a gradient."""

DEFLATE_FLOOR = 512
"""Deflate shrinks one colour to 1/900 of its bytes and no further."""

JPEG_FRACTION = 0.5
"""JPEG against raw pixels: a photograph takes 0.09 at quality 90 and 0.23 at 100. (Noise at 100 takes 1.4.)"""

FULL_CHROMA_QUALITY = 90
"""From this JPEG quality on colour is not subsampled, as in libvips."""

_REDUCED = {"subfiletype": 1, "software": False}
"""Tags of a page that is a smaller copy of the first."""

BATCH_TILES = 4
"""Tiles in flight for each thread; tifffile's default is 512 MiB of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """``bigtiff`` None decides by size; ``workers`` None uses every core, up to 8."""

    compression: str = "deflate"
    quality: int = 90
    tile: int = 512
    bigtiff: bool | None = None
    dpi: float = 300.0
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.compression not in COMPRESSIONS:
            raise UsageError(f"compression {self.compression!r} is unknown: choose one of {', '.join(COMPRESSIONS)}")
        check_range("quality", self.quality, 1, 100)
        check_range("tile", self.tile, 64, 4096)
        check_range("dpi", self.dpi, 1, 100_000)
        check_range("workers", self.threads, 1, 256)
        if self.tile % 16:
            raise UsageError(f"tile is {self.tile}: TIFF demands a multiple of 16, e.g. 512")

    @property
    def threads(self) -> int:
        return min(8, os.cpu_count() or 1) if self.workers is None else self.workers


@dataclass(frozen=True, slots=True)
class TiffJob:
    """A checked export to one TIFF file."""

    pyramid: Pyramid
    options: Options
    ome: bool
    levels: int

    @property
    def width(self) -> int:
        return self.pyramid.levels[0].width

    @property
    def height(self) -> int:
        return self.pyramid.levels[0].height

    @property
    def raw(self) -> int:
        """Bytes of all tiles uncompressed, those at the border filled up."""
        tile_bytes = self.options.tile**2 * 3 * self.pyramid.dtype.itemsize
        return sum(len(self._grid(index)) for index in range(self.levels)) * tile_bytes

    @property
    def estimate(self) -> int:
        if self.options.compression == "jpeg":
            return int(self.raw * JPEG_FRACTION)
        if self.options.compression == "deflate":
            stored = sum(self.pyramid.stored_bytes(index) for index in range(self.levels))
            return min(self.raw, int(stored * LOSSLESS_SLACK) + self.raw // DEFLATE_FLOOR)
        return self.raw

    @property
    def bigtiff(self) -> bool:
        return needs_bigtiff(self.raw) if self.options.bigtiff is None else self.options.bigtiff

    @property
    def notes(self) -> tuple[str, ...]:
        if not self.bigtiff:
            return ()
        return (f"BigTIFF, for {self.raw} bytes of pixels (classic: {CLASSIC_LIMIT}): some print software refuses it",)

    def write(self, path: Path, on_progress: Progress) -> None:
        """Write every level; pages follow each other from the largest to the smallest."""
        total = sum(len(self._grid(index)) for index in range(self.levels))
        done = 0

        def tiles(index: int) -> Iterator[Pixels]:
            nonlocal done
            for tile in self._tiles(index):
                done += 1  # before the tile goes: nobody asks again after the last one
                on_progress(done, total)
                yield tile

        try:
            with tifffile.TiffWriter(path, bigtiff=self.bigtiff, ome=self.ome) as writer:
                for index in range(self.levels):
                    writer.write(tiles(index), **self._page(index))
        except struct.error as error:  # an offset that does not fit 32 bits
            why = f"the file passes {CLASSIC_LIMIT} bytes, the limit of classic TIFF: pass bigtiff=True"
            raise UsageError(why) from error

    def _grid(self, index: int) -> Grid:
        level = self.pyramid.levels[index]
        return Grid(level.height, level.width, self.options.tile)

    def _tiles(self, index: int) -> Iterator[Pixels]:
        """Tiles of a level in file order. The border is repeated: black there would ring into a JPEG's last pixels."""
        grid, size = self._grid(index), self.options.tile
        for row, column in grid.indices():
            pixels = self.pyramid.read(index, grid.box(row, column))
            height, width, _ = pixels.shape
            if (height, width) != (size, size):
                pixels = np.pad(pixels, ((0, size - height), (0, size - width), (0, 0)), mode="edge")
            yield pixels

    def _page(self, index: int) -> dict[str, Any]:
        level, size = self.pyramid.levels[index], self.options.tile
        dpi = (self.options.dpi * level.width / self.width, self.options.dpi * level.height / self.height)
        page: dict[str, Any] = {
            "shape": (level.height, level.width, 3),
            "dtype": self.pyramid.dtype,
            "tile": (size, size),
            "photometric": "rgb",
            "iccprofile": srgb_profile(),
            "resolution": dpi,
            "resolutionunit": "inch",
            "maxworkers": self.options.threads,
            "buffersize": size * size * 3 * self.pyramid.dtype.itemsize * BATCH_TILES * self.options.threads,
        }
        return page | self._codec() | self._plain() | (self._head() if index == 0 else _REDUCED)

    def _codec(self) -> dict[str, Any]:
        if self.options.compression == "deflate":
            return {"compression": "adobe_deflate", "predictor": "horizontal"}
        if self.options.compression == "jpeg":
            chroma = (1, 1) if self.options.quality >= FULL_CHROMA_QUALITY else (2, 2)
            return {"compression": "jpeg", "compressionargs": {"level": self.options.quality}, "subsampling": chroma}
        return {}

    def _head(self) -> dict[str, Any]:
        """What only the first page carries: who made it, from what, and in OME-TIFF its reduced levels."""
        about = description(self.pyramid.provenance)
        if self.ome:
            # tifffile draws a random UUID; from the provenance, the same store makes the same file.
            mark = str(uuid.uuid5(uuid.NAMESPACE_URL, about))
            metadata = {"axes": "YXS", "Description": about, "Creator": software(), "UUID": mark}
            return {"software": software(), "metadata": metadata, "subifds": self.levels - 1}
        return {"software": software(), "description": about}

    def _plain(self) -> dict[str, Any]:
        """Without this tifffile describes the array's shape in a tag of its own dialect."""
        return {} if self.ome else {"metadata": None}


def prepare(pyramid: Pyramid, suffix: str, given: Mapping[str, Any]) -> TiffJob:
    """Check the options against the pyramid; nothing is written yet."""
    options = pick(Options, given, suffix)
    if options.compression == "jpeg":
        _check_jpeg(pyramid)
    job = TiffJob(pyramid, options, ".ome." in suffix, count_levels(pyramid, options.tile))
    if options.compression == "none" and not job.bigtiff and job.raw > CLASSIC_LIMIT:
        raise UsageError(f"{job.raw} bytes of pixels, limit of TIFF {CLASSIC_LIMIT}: leave bigtiff unset, or compress")
    return job


def needs_bigtiff(raw: int) -> bool:
    """Whether ``raw`` bytes of uncompressed tiles might not fit a classic TIFF. Never asks how well they compress:
    that is known when the file is written, which is too late."""
    return raw > CLASSIC_LIMIT - CLASSIC_MARGIN


def count_levels(pyramid: Pyramid, tile: int) -> int:
    """Levels down to the first that fits one tile: a smaller one saves a reader nothing."""
    for count, level in enumerate(pyramid.levels, start=1):
        if max(level.height, level.width) <= tile:
            return count
    return len(pyramid.levels)


def description(provenance: Mapping[str, Any]) -> str:
    """The store's provenance in one line of ASCII JSON."""
    plan = provenance.get("plan")
    known = {**(plan if isinstance(plan, dict) else {}), **provenance}
    about = {key: known[key] for key in ("seed", "model_digest", "licences") if key in known}
    return json.dumps({"software": software(), **about})


def software() -> str:
    try:
        return f"ourgan-engine {importlib.metadata.version('ourgan-engine')}"
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that was never installed
        return "ourgan-engine"


def _check_jpeg(pyramid: Pyramid) -> None:
    if pyramid.dtype != np.uint8:
        raise UsageError(f"compression jpeg holds 8 bits, the store has {pyramid.dtype}: use deflate")
    if importlib.util.find_spec("imagecodecs") is None:
        raise UsageError("compression jpeg needs imagecodecs: pip install 'ourgan-engine[jpeg]', or use deflate")
