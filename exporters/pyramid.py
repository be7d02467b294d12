"""The reading side of every exporter: an OME-Zarr image as levels of interleaved RGB.

Knows OME-Zarr metadata, Zarr chunks and how to read any rectangle without decoding a chunk twice in a row. Knows
nothing of file formats, and nothing of how a store is rendered.

Memory, whatever the size of the image: the rectangle that was asked for, the cache (``CACHE_BYTES``), and one cell
twice while it is read (``CELL_BYTES`` each, or one chunk where a chunk is larger; ``CHUNK_LIMIT`` at most).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from engine.errors import InputError
from engine.geometry import Box

Pixels = NDArray[Any]
"""[H, W, 3], uint8 or uint16."""

CELL_ROWS = 512
"""A cell is at least one row of export tiles high, so that a sweep along the row finishes with it."""

CELL_BYTES = 4 << 20
"""Width of a cell: five 512-pixel chunks of uint8 RGB are decoded in one call, in Zarr's own threads."""

CACHE_BYTES = 32 << 20
"""At least the four cells that a rectangle across a corner touches, with as much again to spare."""

CHUNK_LIMIT = 256 << 20
"""A chunk is decoded whole, so it bounds the memory from below: beyond this the store must be rechunked."""

DTYPES = ("uint8", "uint16")


@dataclass(frozen=True, slots=True)
class Level:
    """One resolution of the image; ``cell`` is the (rows, columns) read at once, a multiple of the chunk."""

    path: str
    height: int
    width: int
    cell: tuple[int, int]

    @property
    def bounds(self) -> Box:
        return Box(0, 0, self.height, self.width)

    def cells(self, box: Box) -> Iterator[Box]:
        """Every cell that meets ``box``, row by row."""
        rows, columns = self.cell
        for y in range(box.y0 // rows * rows, box.y1, rows):
            for x in range(box.x0 // columns * columns, box.x1, columns):
                yield Box(y, x, y + rows, x + columns).clip(self.bounds)


class Pyramid:
    """An open store: ``levels`` from full size downwards, ``dtype``, ``provenance``, and reads of any rectangle."""

    def __init__(self, store: Path, *, allow_incomplete: bool = False, cache_bytes: int = CACHE_BYTES) -> None:
        self.store = store
        group = _open(store)
        attributes = group.attrs.asdict()
        self._arrays = _arrays(store, group, attributes)
        self.dtype: np.dtype[Any] = self._arrays[0].dtype
        self.levels = tuple(_level(store, array) for array in self._arrays)
        provenance = attributes.get("ourgan")
        self.provenance: Mapping[str, Any] = provenance if isinstance(provenance, dict) else {}
        _check_sizes(store, self.levels, exact=provenance is not None)
        if provenance is not None and not allow_incomplete:
            _check_complete(store, self._arrays, self.provenance.get("complete") is True)
        self._cache = _Cache(cache_bytes)

    def read(self, level: int, box: Box) -> Pixels:
        """The pixels of ``box``, which lies inside the level."""
        assert self.levels[level].bounds.contains(box), f"{box} leaves {self.levels[level]}"
        pixels = np.empty((*box.shape, 3), self.dtype)  # [H, W, 3]
        for cell in self.levels[level].cells(box):
            part = cell.clip(box)
            pixels[part.relative_to(box).slices] = self._cell(level, cell)[part.relative_to(cell).slices]
        return pixels

    def band(self, level: int, y0: int, y1: int) -> Pixels:
        """Rows y0 to y1 over the whole width."""
        return self.read(level, Box(y0, 0, y1, self.levels[level].width))

    def raw_bytes(self, level: int) -> int:
        return self.levels[level].bounds.area * 3 * self.dtype.itemsize

    def stored_bytes(self, level: int) -> int:
        """What the level takes in the store: a measure of how well its pixels compress."""
        return int(self._arrays[level].nbytes_stored())

    def _cell(self, level: int, cell: Box) -> Pixels:
        key = (level, cell.y0, cell.x0)
        pixels = self._cache.get(key)
        if pixels is None:
            pixels = self._decode(level, cell)
            self._cache.put(key, pixels)
        return pixels

    def _decode(self, level: int, cell: Box) -> Pixels:
        rows, columns = cell.slices
        try:
            planes = np.asarray(self._arrays[level][:, rows, columns])  # [3, H, W]
        except Exception as error:  # each codec has exceptions of its own
            where, why = f"{self.store}/{self.levels[level].path}", " ".join(str(error).split())
            raise InputError(f"{where}, {cell}: a chunk cannot be read ({why}): render its shard again") from error
        return np.ascontiguousarray(planes.transpose(1, 2, 0))


class _Cache:
    """Least recently used cells within a number of bytes; the newest is always kept."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._cells: OrderedDict[tuple[int, int, int], Pixels] = OrderedDict()

    def get(self, key: tuple[int, int, int]) -> Pixels | None:
        pixels = self._cells.get(key)
        if pixels is not None:
            self._cells.move_to_end(key)
        return pixels

    def put(self, key: tuple[int, int, int], pixels: Pixels) -> None:
        self._cells[key] = pixels
        self._used += pixels.nbytes
        while self._used > self._limit and len(self._cells) > 1:
            self._used -= self._cells.popitem(last=False)[1].nbytes


def _open(store: Path) -> zarr.Group:
    try:
        return zarr.open_group(store, mode="r")
    except (OSError, ValueError, KeyError) as error:
        why = " ".join(str(error).split())
        raise InputError(f"{store}: not a readable Zarr group ({why}): give the folder of an OME-Zarr image") from error


def _arrays(store: Path, group: zarr.Group, attributes: Mapping[str, Any]) -> list[zarr.Array[Any]]:
    arrays = []
    for path in _paths(store, attributes):
        array = group.get(path)
        if not isinstance(array, zarr.Array):
            raise InputError(f"{store}: level {path!r} of its metadata is no array in the store: copy it again, whole")
        arrays.append(array)
    for array in arrays:
        _check_array(store, array, arrays[0].dtype)
    return arrays


def _paths(store: Path, attributes: Mapping[str, Any]) -> list[str]:
    """Paths of the levels; the metadata sit under ``ome`` in OME-Zarr 0.5 and at the top before."""
    try:
        image = attributes.get("ome", attributes)["multiscales"][0]
        axes = [axis["name"] for axis in image["axes"]]
        paths = [str(dataset["path"]) for dataset in image["datasets"]]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise InputError(f"{store}: no OME-Zarr image ({error}): give the folder that holds its levels") from error
    if axes != ["c", "y", "x"]:
        raise InputError(f"{store}: axes {','.join(map(str, axes))}: only images with the axes c,y,x can be exported")
    if not paths:
        raise InputError(f"{store}: its metadata list 0 levels: at least 1 is needed")
    return paths


def _check_array(store: Path, array: zarr.Array[Any], dtype: np.dtype[Any]) -> None:
    where = f"{store}/{array.path}"
    if len(array.shape) != 3 or array.shape[0] != 3:
        raise InputError(f"{where}: shape {array.shape}: only 3 channels (3, H, W) can be exported")
    if 0 in array.shape:
        raise InputError(f"{where}: shape {array.shape}: an image needs at least 1 x 1 pixels")
    if array.dtype.name not in DTYPES or array.dtype != dtype:
        raise InputError(f"{where}: dtype {array.dtype}: all levels must share one of {', '.join(DTYPES)}")
    chunk = int(np.prod(array.chunks)) * array.dtype.itemsize
    if chunk > CHUNK_LIMIT:
        raise InputError(f"{where}: one chunk is {chunk} bytes, limit {CHUNK_LIMIT}: rechunk it, e.g. to (3, 512, 512)")


def _level(store: Path, array: zarr.Array[Any]) -> Level:
    _, height, width = array.shape
    chunk_rows, chunk_columns = array.chunks[1:]
    rows = chunk_rows * -(-CELL_ROWS // chunk_rows)
    columns = chunk_columns * max(1, CELL_BYTES // (3 * array.dtype.itemsize * min(rows, height) * chunk_columns))
    return Level(array.path, height, width, (rows, columns))


def _check_sizes(store: Path, levels: tuple[Level, ...], *, exact: bool) -> None:
    """Our own levels are ceil(size / 2**i); those of others only have to shrink."""
    for index, (upper, level) in enumerate(zip(levels, levels[1:], strict=False), start=1):
        where, wanted = f"{store}/{level.path}: {level.width} x {level.height} pixels", levels[0].bounds.cover(2**index)
        if exact and level.bounds != wanted:
            raise InputError(f"{where}, {wanted.width} x {wanted.height} expected: render it again")
        if not upper.bounds.contains(level.bounds) or level.bounds == upper.bounds:
            raise InputError(f"{where}, {upper.width} x {upper.height} before it: levels must shrink, write them again")


def _check_complete(store: Path, arrays: list[zarr.Array[Any]], complete: bool) -> None:
    """Our stores hold every shard, black ones too; Zarr would read a lost one as black without a word."""
    for array in arrays:
        _, height, width = array.shape
        rows, columns = (array.shards or array.chunks)[1:]
        wanted = -(-height // rows) * -(-width // columns)
        # Temporary files of a writer have other names than the last number of a key.
        found = sum(path.name.isdigit() and path.is_file() for path in (store / array.path / "c").rglob("*"))
        if not complete or found < wanted:
            raise InputError(
                f"{store}: not finished, {found} of {wanted} shards of level {array.path} are written: "
                "finish it with --resume, or pass allow_incomplete=True"
            )
