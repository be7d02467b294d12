"""Input of every exporter: an OME-Zarr image as levels of interleaved pixels.

Any rectangle can be read, and a sweep decodes no chunk twice. The module does not know file formats or rendering.

Memory, whatever the size of the image: the requested rectangle, the cache (``CACHE_BYTES``), and one cell twice while it
is read (``CELL_BYTES`` each, or one chunk where a chunk is larger; at most ``CHUNK_LIMIT``).
"""

from __future__ import annotations

import json
import mimetypes
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from cachetools import LRUCache
from numpy.typing import NDArray

from engine.causes import raise_if_exhausted
from engine.errors import InputError, counted, option
from engine.geometry import Box
from engine.io.about_picture import stored_dpi, stored_profile
from engine.io.durable import open_root, stamp_of
from engine.io.icc import load_profile
from engine.io.objects import Place
from engine.io.provenance import ATTRIBUTE, is_same_store
from engine.io.shards import is_present, present_shards, raise_unless_damage, shard_path
from engine.pixels import PLAIN, PixelFormat, pixels_of

Pixels = NDArray[Any]
"""[H, W, C], uint8 or uint16: 1 grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha."""

CELL_ROWS = 512
"""Least height of a cell: one row of export tiles, so that a sweep along the row finishes with it."""

CELL_BYTES = 4 << 20
"""Target size of a cell: five 512-pixel chunks of uint8 RGB, decoded in one call by Zarr's threads."""

CACHE_BYTES = 32 << 20
"""Size of the cache: twice the four cells that a rectangle across a corner touches."""

CHUNK_LIMIT = 256 << 20
"""Largest chunk. A chunk is decoded whole, so a store with larger ones must be rechunked."""

DTYPES = ("uint8", "uint16")


@dataclass(frozen=True, slots=True)
class Level:
    """One resolution of the image."""

    path: str
    """Path of the array in the store."""
    height: int
    """Height in pixels."""
    width: int
    """Width in pixels."""
    cell: tuple[int, int]
    """(rows, columns) that are read at once, a multiple of the chunk."""
    chunk: tuple[int, int] = (0, 0)
    """(rows, columns) that are decoded at once."""
    shard: tuple[int, int] = (0, 0)
    """(rows, columns) of a file of the store, before the image's border cuts it."""

    @property
    def bounds(self) -> Box:
        """The whole level."""
        return Box(0, 0, self.height, self.width)

    def cells(self, box: Box) -> Iterator[Box]:
        """Every cell that meets ``box``, row by row."""
        rows, columns = self.cell
        for y in range(box.y0 // rows * rows, box.y1, rows):
            for x in range(box.x0 // columns * columns, box.x1, columns):
                yield Box(y, x, y + rows, x + columns).clip(self.bounds)


class Pyramid:
    """An open store.

    Args:
        store: folder or URL of an OME-Zarr image with the axes c,y,x and 8 or 16 bits: of this engine, or with three channels.
        allow_incomplete: accept a render of this engine that is not finished; its missing shards are black.
        cache_bytes: size of the cache of decoded cells; the newest cell is always kept.

    Attributes:
        levels: resolutions from full size downwards.
        dtype: uint8 or uint16.
        pixels: channels and depth.
        profile: ICC profile to embed: the store's own, or sRGB for RGB; None for grey without a profile.
        dpi: (horizontal, vertical) resolution of the picture that was enlarged, in dots per inch; None if it is not known.
        provenance: attributes that this engine recorded in the store; empty for stores of other software.

    Raises:
        InputError: the store is no such image, is damaged, or is not finished.
    """

    def __init__(self, store: Place, *, allow_incomplete: bool = False, cache_bytes: int = CACHE_BYTES) -> None:
        self.store = store
        self._stamp = _stamp(store)
        group = _open(store)
        attributes = group.attrs.asdict()
        provenance = attributes.get(ATTRIBUTE)
        self.provenance: Mapping[str, Any] = provenance if isinstance(provenance, dict) else {}
        self._arrays = _arrays(store, group, attributes, _channels(self.provenance))
        self.dtype: np.dtype[Any] = self._arrays[0].dtype
        self.pixels = PixelFormat(self._arrays[0].shape[0], 8 * self.dtype.itemsize)
        self.profile = stored_profile(self.provenance) or (load_profile("srgb") if self.pixels.colours == 3 else None)
        self.dpi = stored_dpi(self.provenance)
        self.levels = tuple(_level(array) for array in self._arrays)
        _check_sizes(store, self.levels, exact=provenance is not None)
        complete = self.provenance.get("complete") is True
        self._is_whole = complete or (provenance is not None and not allow_incomplete)
        if provenance is not None and not allow_incomplete:
            _check_complete(store, self._arrays, complete=complete)
        self.limit_cache(cache_bytes)
        self._lock = threading.Lock()  # of the cache: exporters, dask and viewers read from several threads
        self._decoding = [threading.Lock() for _ in range(16)]

    def read(self, level: int, box: Box) -> Pixels:
        """Pixels of ``box``, which lies inside the level."""
        assert self.levels[level].bounds.contains(box), f"{box} leaves {self.levels[level]}"
        pixels = np.empty((*box.shape, self.pixels.channels), self.dtype)  # [H, W, C]
        for cell in self.levels[level].cells(box):
            part = cell.clip(box)
            pixels[part.relative_to(box).slices] = self._cell(level, cell)[part.relative_to(cell).slices]
        return pixels

    def read_once(self, level: int, box: Box) -> Pixels:
        """The same pixels, which must not be changed. Those of one whole cell are neither copied nor kept for another read."""
        if next(self.levels[level].cells(box)) != box:
            return self.read(level, box)
        with self._lock:
            kept = self._cache.get((level, box.y0, box.x0))
        return self._decode(level, box) if kept is None else kept

    def band(self, level: int, y0: int, y1: int) -> Pixels:
        """Rows y0 to y1 over the whole width."""
        return self.read(level, Box(y0, 0, y1, self.levels[level].width))

    def decode(self, level: int, box: Box) -> Pixels:
        """Pixels of ``box`` of finished shards, read now and past the cache. Several threads may call it.

        Raises:
            InputError: a shard is missing or damaged.
        """
        return self._decode(level, box, strict=True)

    def limit_cache(self, cache_bytes: int) -> None:
        """Start with an empty cache of this size, or of one cell where a cell is larger."""
        largest = max(_cell_bytes(level, self.pixels) for level in self.levels)
        self._cache: LRUCache[tuple[int, int, int], Pixels] = LRUCache(
            max(cache_bytes, largest), getsizeof=lambda pixels: pixels.nbytes
        )

    def check_unchanged(self) -> None:
        """Raise InputError unless the folder of this name is still the store that was opened."""
        try:
            stamp = _stamp(self.store)
            if stamp == self._stamp:
                return
            root = json.loads((self.store / "zarr.json").read_bytes())
            is_same = not self.provenance or is_same_store(self.provenance, root["attributes"][ATTRIBUTE])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            is_same = False
        if not is_same:
            raise InputError(f"{self.store}: removed, renamed or replaced while it was read; repeat this command")
        self._stamp = stamp

    def stored_bytes(self, level: int) -> int:
        """Bytes of the level in the store: a measure of how well its pixels compress."""
        return int(self._arrays[level].nbytes_stored())

    def _cell(self, level: int, cell: Box) -> Pixels:
        key = (level, cell.y0, cell.x0)
        with self._lock:
            pixels = self._cache.get(key)
        if pixels is not None:
            return pixels
        with self._decoding[hash(key) % len(self._decoding)]:  # no other thread decodes the same cell
            with self._lock:
                pixels = self._cache.get(key)
            if pixels is None:
                pixels = self._decode(level, cell)
                with self._lock:
                    self._cache[key] = pixels
        return pixels

    def _decode(self, level: int, cell: Box, *, strict: bool = False) -> Pixels:
        """Pixels of a cell; ``strict``: a missing shard is an error, also where the store is not finished."""
        rows, columns = cell.slices
        before = self._present(level, cell)
        try:
            planes = np.asarray(self._arrays[level][:, rows, columns])  # [C, H, W]
        except Exception as error:  # each codec has exceptions of its own
            raise_unless_damage(error, self._arrays[level])
            self.check_unchanged()
            raise InputError(self._damage(level, cell, error)) from error
        # Zarr reads a shard that is not there as black, so it has to be there before and after.
        whole = strict or self._is_whole
        if lost := [shard for shard, there in before.items() if not (is_present(shard) if there else not whole)]:
            self.check_unchanged()
            raise InputError(f"{lost[0]}: missing shard; {self._repair}")
        self.check_unchanged()
        pixels = np.empty((*planes.shape[1:], planes.shape[0]), planes.dtype)  # [H, W, C]
        for channel, plane in enumerate(planes):  # twice as fast as a transposed copy
            pixels[..., channel] = plane
        return pixels

    def _present(self, level: int, cell: Box) -> dict[Place, bool]:
        """Files of the shards that a cell meets, and whether they exist; empty for stores of other software."""
        if not self.provenance:
            return {}
        return {path: is_present(path) for path, _ in self._shards(level, cell)}

    def _shards(self, level: int, cell: Box) -> Iterator[tuple[Place, Box]]:
        """File and pixels of every shard that a cell meets."""
        array, bounds = self._arrays[level], self.levels[level].bounds
        *_, rows, columns = array.shards or array.chunks
        for y in range(cell.y0 // rows * rows, cell.y1, rows):
            for x in range(cell.x0 // columns * columns, cell.x1, columns):
                box = Box(y, x, y + rows, x + columns).clip(bounds)
                yield shard_path(self.store, array.path, y // rows, x // columns), box

    @property
    def _repair(self) -> str:
        """Advice about a damaged store of this engine."""
        return f"run engine check {self.store} --repair, then repeat the store's engine render with {option('resume', True)}"

    def _damage(self, level: int, cell: Box, error: Exception) -> str:
        """Message about the first shard of a cell that cannot be read."""
        array = self._arrays[level]
        reason = "wrong checksum" if "checksum" in str(error).lower() else "not decodable"
        if not self.provenance or array.shards is None:
            return f"{self.store}/{array.path}: damaged at {cell} ({reason}); copy the store again, whole"
        shards = list(self._shards(level, cell))
        shard, box = next((s for s in shards if not self._is_readable(level, s[1].clip(cell))), shards[0])
        return f"{shard}: damaged shard ({reason}, region {box}); {self._repair}"

    def _is_readable(self, level: int, box: Box) -> bool:
        rows, columns = box.slices
        try:
            self._arrays[level][:, rows, columns]
        except Exception as error:  # as in ``_decode``
            raise_unless_damage(error, self._arrays[level])
            return False
        return True


def _stamp(store: Place) -> tuple[object, ...]:
    """``stamp_of``; zeros where the root has no such metadata (earlier versions of Zarr)."""
    try:
        return stamp_of(store)
    except (FileNotFoundError, NotADirectoryError):
        return (0, 0, 0, 0) if store.is_dir() else ()


def _open(store: Place) -> zarr.Group:
    try:
        return open_root(store)
    except (OSError, ValueError, KeyError) as error:
        raise_if_exhausted(error)
        raise InputError(f"{store}: {_not_a_store(store, error)}") from error


def _not_a_store(store: Place, error: Exception) -> str:
    """Message about a path that is no Zarr group."""
    if not store.exists():
        return "no such store; name the folder that engine render wrote"
    if store.is_file():
        is_picture = (mimetypes.guess_type(str(store))[0] or "").startswith("image/")
        kind = "a picture" if is_picture else "a file"
        return f"is {kind}, not a store of engine render; name the folder that it wrote"
    if not (store / "zarr.json").is_file():
        return "is a folder without an OME-Zarr image; name the folder that engine render wrote"
    if isinstance(error, zarr.errors.ContainsArrayError):
        return "is one level of a store; name the folder above it"
    return "its zarr.json is damaged; copy the store again, whole"


def _channels(provenance: Mapping[str, Any]) -> int:
    """Channels that a store has to have: those of its plan, or three."""
    plan = provenance.get("plan")
    try:
        return pixels_of(plan if isinstance(plan, dict) else {}).channels
    except ValueError:  # damaged; the arrays are checked against three
        return PLAIN.channels


def _arrays(store: Place, group: zarr.Group, attributes: Mapping[str, Any], channels: int) -> list[zarr.Array[Any]]:
    arrays = []
    for path in _paths(store, attributes):
        try:
            array = group.get(path)
        except Exception as error:  # a damaged zarr.json: Zarr's parsers have exceptions of their own
            raise_if_exhausted(error)
            advice = "copy the store again, whole"
            raise InputError(f"{store}: the zarr.json of level {path!r} cannot be read; {advice}") from error
        if not isinstance(array, zarr.Array):
            raise InputError(f"{store}: level {path!r} of its metadata is no array in the store; copy it again, whole")
        arrays.append(array)
    for array in arrays:
        _check_array(store, array, arrays[0].dtype, channels)
    return arrays


def _paths(store: Place, attributes: Mapping[str, Any]) -> list[str]:
    """Paths of the levels. OME-Zarr 0.5 keeps its metadata under ``ome``, earlier versions at the top."""
    try:
        image = attributes.get("ome", attributes)["multiscales"][0]
        axes = [axis["name"] for axis in image["axes"]]
        paths = [str(dataset["path"]) for dataset in image["datasets"]]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise InputError(f"{store}: no OME-Zarr image (no {error} in its metadata); name the folder of one") from error
    if axes != ["c", "y", "x"]:
        raise InputError(f"{store}: axes {','.join(map(str, axes))}; only images with the axes c,y,x can be exported")
    if not paths:
        raise InputError(f"{store}: its metadata list 0 levels; at least 1 is needed")
    return paths


def _check_array(store: Place, array: zarr.Array[Any], dtype: np.dtype[Any], channels: int) -> None:
    where = f"{store}/{array.path}"
    if len(array.shape) != 3 or array.shape[0] != channels:
        raise InputError(
            f"{where}: shape {array.shape}; only {counted(channels, 'channel')} ({channels}, H, W) can be exported"
        )
    if 0 in array.shape:
        raise InputError(f"{where}: shape {array.shape}; an image needs at least 1 x 1 pixels")
    if array.dtype.name not in DTYPES or array.dtype != dtype:
        raise InputError(f"{where}: dtype {array.dtype}; all levels must share one of {', '.join(DTYPES)}")
    chunk = int(np.prod(array.chunks)) * array.dtype.itemsize
    if chunk > CHUNK_LIMIT:
        raise InputError(f"{where}: one chunk is {chunk} bytes, limit {CHUNK_LIMIT}; rechunk it, e.g. to (3, 512, 512)")


def _level(array: zarr.Array[Any]) -> Level:
    channels, height, width = array.shape
    pixel = channels * array.dtype.itemsize
    chunk_rows, chunk_columns = array.chunks[1:]
    row_of_chunks = chunk_rows * min(chunk_columns, width) * pixel
    rows = chunk_rows * max(1, min(-(-CELL_ROWS // chunk_rows), CHUNK_LIMIT // row_of_chunks))
    columns = chunk_columns * max(1, CELL_BYTES // (pixel * min(rows, height) * chunk_columns))
    shard_rows, shard_columns = (array.shards or array.chunks)[1:]
    return Level(array.path, height, width, (rows, columns), (chunk_rows, chunk_columns), (shard_rows, shard_columns))


def _cell_bytes(level: Level, pixels: PixelFormat) -> int:
    rows, columns = level.cell
    return min(rows, level.height) * min(columns, level.width) * pixels.bytes


def _check_sizes(store: Place, levels: tuple[Level, ...], *, exact: bool) -> None:
    """Check that levels shrink, to ceil(size / 2**i) in stores of this engine (``exact``)."""
    for index, (upper, level) in enumerate(zip(levels, levels[1:], strict=False), start=1):
        where, expected = (
            f"{store}/{level.path}: {level.width} x {level.height} pixels",
            levels[0].bounds.cover(2**index),
        )
        if exact and level.bounds != expected:
            raise InputError(f"{where}, {expected.width} x {expected.height} expected; render it again")
        if not upper.bounds.contains(level.bounds) or level.bounds == upper.bounds:
            raise InputError(f"{where}, {upper.width} x {upper.height} before it; levels must shrink, write them again")


def count_shards(store: Place, array: zarr.Array[Any]) -> tuple[int, int]:
    """(written, all) shards of a level [C, H, W] of a store.

    This engine stores black ones too; Zarr would silently read a lost shard as black.
    """
    *_, height, width = array.shape
    *_, rows, columns = array.shards or array.chunks
    down, across = -(-height // rows), -(-width // columns)
    return int(present_shards(store, array.path, (down, across)).sum()), down * across


def _check_complete(store: Place, arrays: list[zarr.Array[Any]], *, complete: bool) -> None:
    for array in arrays:
        written, total = count_shards(store, array)
        if complete and written < total:
            raise InputError(
                f"{store}: damaged, {counted(total - written, 'shard')} of {total} of level {array.path} missing; repeat the "
                f"store's engine render with {option('resume', True)}"
            )
        if not complete:
            raise InputError(
                f"{store}: not finished, {written} of {counted(total, 'shard')} of level {array.path} written; finish it with "
                f"{option('resume', True)}, or give {option('allow_incomplete', True)}"
            )
