"""A bounded cache of finished tiles that spills to a scratch array beside the output.

Tiles of one level are numpy arrays [C, h, w]. The least recently used ones go to the scratch array when the limit is
reached; every tile is therefore computed once per run, and once per render when a killed run is resumed, because a
tile's file in the scratch array appears whole or not at all.
"""

from __future__ import annotations

import mmap
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from engine.geometry import Box, Grid
from engine.io.zarr_store import Array

_SCRATCH_CHUNK, _LEAST_CHUNK = 256, 32

Index = tuple[int, int]


class Scratch:
    """Uncompressed Zarr array on disk; one shard a tile, inner chunks for partial reads. Made when first written."""

    def __init__(self, path: Path, grid: Grid, dtype: type[np.generic]) -> None:
        self._path = path
        self._grid = grid
        self._dtype = dtype
        self._array: Any = self._open() if (path / "zarr.json").exists() else None

    def __contains__(self, index: Index) -> bool:
        return (self._path / "c" / "0" / str(index[0]) / str(index[1])).exists()

    def write(self, index: Index, tile: Array) -> None:
        if self._array is None:
            self._create(tile.shape[0])
            self._array = self._open()
        self._array[(slice(None), *self._grid.box(*index).slices)] = tile

    def read(self, box: Box) -> Array:
        result: Array = self._array[(slice(None), *box.slices)]
        return result

    def _open(self) -> Any:  # noqa: ANN401
        # A tile of zeros must be written too: its file says that it is there.
        return zarr.open_array(self._path, mode="r+").with_config({"write_empty_chunks": True})

    def _create(self, channels: int) -> None:
        cell = self._grid.cell
        chunk = next((c for c in range(min(cell, _SCRATCH_CHUNK), _LEAST_CHUNK - 1, -1) if cell % c == 0), cell)
        zarr.create_array(
            self._path,
            shape=(channels, self._grid.height, self._grid.width),
            shards=(channels, cell, cell),
            chunks=(channels, chunk, chunk),
            dtype=self._dtype,
            compressors=None,
            fill_value=0,
        )


class TileCache:
    """Tiles of one level, at most ``limit`` bytes of them in memory."""

    def __init__(self, limit: int, scratch: Scratch) -> None:
        self._limit = limit
        self._scratch = scratch
        self._tiles: OrderedDict[Index, Array] = OrderedDict()
        self._bytes = 0

    def __contains__(self, index: Index) -> bool:
        return index in self._tiles or index in self._scratch

    def read(self, index: Index, part: Box, origin: Box) -> Array:
        """The rectangle ``part`` of a tile that lies at ``origin``, both in pixels of the level."""
        tile = self._tiles.get(index)
        if tile is None:
            return self._scratch.read(part)
        self._tiles.move_to_end(index)
        rows, columns = part.relative_to(origin).slices
        return tile[:, rows, columns]

    def put(self, index: Index, tile: Array) -> None:
        if tile.nbytes > self._limit:
            self._scratch.write(index, tile)
            return
        self._tiles[index] = _in_own_pages(tile)
        self._bytes += tile.nbytes
        while self._bytes > self._limit:
            oldest, evicted = self._tiles.popitem(last=False)
            self._bytes -= evicted.nbytes
            self._scratch.write(oldest, evicted)


def _in_own_pages(tile: Array) -> Array:
    """A copy outside the heap: a block that outlives the network's temporaries would leave holes that nothing fits."""
    pages = mmap.mmap(-1, tile.nbytes)
    copy: Array = np.frombuffer(pages, tile.dtype).reshape(tile.shape)
    copy[...] = tile
    return copy
