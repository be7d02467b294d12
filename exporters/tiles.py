"""Pictures cut into small files for viewers in browsers: what Deep Zoom and IIIF have in common.

Tiles are the store's own levels, cut on a grid without overlap. Each thread reads a block of pixels, encodes its tiles and
writes them. So the memory depends neither on the width nor on the height: the pyramid's cache, and a block for each thread.
"""

from __future__ import annotations

import threading
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, features

from engine.causes import naming
from engine.errors import UsageError, option
from engine.exporters.encode import encode
from engine.exporters.job import Progress, check_range, parse_options, thread_count
from engine.exporters.pyramid import Pixels
from engine.exporters.view import View
from engine.geometry import Box, Grid
from engine.io.icc import load_profile

FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
"""Suffix of a tile -> Pillow's name of its format."""

FULL_CHROMA_QUALITY = 90
"""Least JPEG quality without chroma subsampling, as in libvips."""

_THREADS_PER_WORKER = 2
"""One waits for its block, which Zarr's own threads decode, while another encodes."""

_IN_FLIGHT = 3
"""Blocks per worker that wait or are not collected."""

_FRACTION = {"jpg": 0.5, "webp": 0.5, "png": 1.0}
"""Expected size as a fraction of the raw pixels, with room for noise."""

_FILE_BYTES = 4096
"""Least bytes that a file takes on the disk."""

_EPOCH = (1980, 1, 1, 0, 0, 0)
"""Time of the files in an archive: the same pixels give the same bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TileOptions:
    """Options of formats with tiles."""

    tiles: str | None = None
    """Format of the tiles: jpg, png or webp; None: jpg, and png for pictures with transparency."""
    quality: int | None = None
    """Quality of JPEG and WebP, 1 to 100; None: 85."""
    tile: int = 512
    """Side of a tile in pixels."""
    workers: int | None = None
    """Threads that encode; None uses one per core, up to 8."""

    def __post_init__(self) -> None:
        if self.tiles is not None and self.tiles not in FORMATS:
            raise UsageError(f"{option('tiles')}: {self.tiles!r} is unknown; choose one of {', '.join(FORMATS)}")
        if self.tiles == "png" and self.quality is not None:
            raise UsageError(f"{option('quality')}: png is lossless; give {option('tiles', 'jpg')}, or leave it out")
        if self.tiles == "webp" and not features.check("webp"):
            raise UsageError(f"{option('tiles')}: this build of Pillow writes no WebP; choose jpg or png")
        check_range("quality", self.quality or 85, 1, 100)
        check_range("tile", self.tile, 64, 4096)
        check_range("workers", self.threads, 1, 256)

    @property
    def threads(self) -> int:
        """``workers`` with its default filled in."""
        return thread_count(self.workers)

    def for_view(self, view: View) -> str:
        """Format of the tiles of a picture. Raises UsageError for one that does not hold its pixels."""
        if self.tiles == "webp" and view.pixels.colours == 1 and view.profile is not None:
            raise UsageError(
                f"{option('tiles')}: webp holds no grey, whose profile this picture has; choose jpg or png"
            )
        if not view.pixels.has_alpha:
            return self.tiles or "jpg"
        if self.tiles == "jpg":
            raise UsageError(
                f"{option('tiles')}: jpg holds no transparency, which this picture has; choose png or webp"
            )
        return self.tiles or "png"


class FolderSink:
    """Files below a folder, written by the threads that encode them."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folders: set[str] = set()

    def put(self, name: str, data: bytes) -> tuple[str, bytes]:
        """Write a file, from any thread."""
        path = self._root / name
        folder = name.rpartition("/")[0]
        with naming(path):
            if folder not in self._folders:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._folders.add(folder)
            path.write_bytes(data)
        return name, b""

    def collect(self, files: list[tuple[str, bytes]]) -> None:
        """Nothing is left to do."""


class ZipSink:
    """Files of a ZIP archive, not compressed again."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive

    def put(self, name: str, data: bytes) -> tuple[str, bytes]:
        """Keep a file until ``collect``: archives have one writer and one order."""
        return name, data

    def collect(self, files: list[tuple[str, bytes]]) -> None:
        """Write files."""
        for name, data in files:
            self._archive.writestr(zipfile.ZipInfo(name, _EPOCH), data)


@dataclass(frozen=True, slots=True)
class Tiles:
    """The tiles of a view."""

    view: View
    options: TileOptions

    @property
    def suffix(self) -> str:
        """jpg, png or webp."""
        return self.options.for_view(self.view)

    @property
    def count(self) -> int:
        """Number of tiles of all levels."""
        return sum(len(self.grid(index)) for index in range(len(self.view.levels)))

    @property
    def estimate(self) -> int:
        """Expected bytes of all tiles on a disk."""
        pixels = sum(level.bounds.area for level in self.view.levels)
        return int(pixels * self.view.pixels.channels * _FRACTION[self.suffix]) + self.count * _FILE_BYTES

    def grid(self, level: int) -> Grid:
        """Tiles of a level."""
        size = self.view.levels[level]
        return Grid(size.height, size.width, (self.options.tile, self.options.tile))

    def write(self, sink: FolderSink | ZipSink, name: Callable[[int, Box], str], on_progress: Progress) -> None:
        """Write every tile, from the largest level to the smallest.

        Args:
            sink: receiver of the files.
            name: name of the file of a level and a tile's pixels.
            on_progress: called with (done, total) in tiles.
        """
        done, total, workers = 0, self.count, self.options.threads
        encode_tile = self._encoder()
        reading = threading.Semaphore(workers + 1)  # more would add nothing but their blocks in memory

        def finish(level: int, block: Box) -> list[tuple[str, bytes]]:
            with reading:
                pixels = self.view.read(level, block)
            grid = self.grid(level)
            boxes = (grid.box(*at) for at in grid.indices(block))
            return [sink.put(name(level, box), encode_tile(pixels[box.relative_to(block).slices])) for box in boxes]

        pending: deque[Future[list[tuple[str, bytes]]]] = deque()

        def take() -> None:
            nonlocal done
            files = pending.popleft().result()
            sink.collect(files)
            done += len(files)
            on_progress(done, total)

        with ThreadPoolExecutor(workers * _THREADS_PER_WORKER) as pool:
            try:
                for level, block in self._blocks():
                    pending.append(pool.submit(finish, level, block))
                    while len(pending) > workers * _IN_FLIGHT:
                        take()
                while pending:
                    take()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _blocks(self) -> Iterator[tuple[int, Box]]:
        """Every level and its blocks: whole tiles, as many as a cell of the store holds, or one."""
        tile = self.options.tile
        for index, level in enumerate(self.view.levels):
            rows, columns = (max(1, side // tile) * tile for side in level.cell)
            blocks = Grid(level.height, level.width, (rows, columns))
            yield from ((index, blocks.box(*at)) for at in blocks.indices())

    def _encoder(self) -> Callable[[Pixels], bytes]:
        """Function from pixels to the bytes of a picture."""
        suffix, quality = self.suffix, self.options.quality or 85
        settings: dict[str, Any] = {"format": FORMATS[suffix]}
        if suffix == "jpg":
            settings |= {"quality": quality, "subsampling": 0 if quality >= FULL_CHROMA_QUALITY else 2}
        elif suffix == "webp":
            settings |= {"quality": quality}
        else:
            settings |= {"compress_level": 6}
        profile = self.view_profile()
        if profile is not None:
            settings["icc_profile"] = profile

        def encode_tile(pixels: Pixels) -> bytes:
            return encode(Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels), **settings)

        return encode_tile

    def view_profile(self) -> bytes | None:
        """ICC profile of every tile; None for sRGB, which browsers assume: 480 bytes less a tile."""
        profile = self.view.profile
        return None if profile == load_profile("srgb") else profile


def tile_options(suffix: str, values: Mapping[str, Any]) -> TileOptions:
    """The options of a format with tiles. Raises UsageError as ``parse_options`` does."""
    return parse_options(TileOptions, values, suffix)


def new_archive(path: Path) -> zipfile.ZipFile:
    """A ZIP archive to write, without compression, that may exceed 4 GiB."""
    return zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True)
