"""A bounded cache of finished tiles that spills to a scratch array beside the output.

Tiles of one stage are numpy arrays [C, h, w]. The least recently used tiles go to the scratch array when the limit is
reached. Every tile is therefore computed once per run, and once per render when a killed run is resumed: a tile's file in
the scratch array appears whole or not at all.
"""

from __future__ import annotations

import mmap
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from cachetools import LRUCache
from zarr.codecs import Crc32cCodec
from zarr.errors import ContainsArrayError

from engine.causes import raise_if_exhausted
from engine.errors import InputError, option
from engine.geometry import Box, Grid
from engine.io.shards import ShardState, chunks_of, shard_path, shard_state
from engine.io.sink import Array

_SCRATCH_CHUNK, _SMALLEST_CHUNK = 256, 32

Index = tuple[int, int]
"""(row, column) of a tile."""


class Scratch:
    """Uncompressed Zarr array on disk: one shard for each tile, inner chunks for partial reads. Created at the first write."""

    def __init__(self, path: Path, grid: Grid, dtype: type[np.generic]) -> None:
        self._path = path
        self._grid = grid
        self._dtype = dtype
        self._array: Any = None

    def __contains__(self, index: Index) -> bool:
        if self._array is None and (self._path / "zarr.json").exists():  # of an earlier run, or of another part
            self._array = self._open()
        if self._array is None:
            return False
        file = shard_path(self._path.parent, self._path.name, *index)
        return shard_state(file, chunks_of(self._array)) is ShardState.WHOLE

    def write(self, index: Index, tile: Array) -> None:
        """Write a tile's shard."""
        if self._array is None:
            with suppress(ContainsArrayError):  # another part was faster
                self._create(tile.shape[0])
            self._array = self._open()
        self._array[(slice(None), *self._grid.box(*index).slices)] = tile

    def read(self, box: Box) -> Array:
        """Pixels of ``box``, [C, h, w]. Raises InputError where a tile of an earlier run is damaged."""
        try:
            pixels: Array = self._array[(slice(None), *box.slices)]
        except Exception as error:  # each codec has exceptions of its own
            raise_if_exhausted(error)
            resume = option("resume", True)
            raise InputError(
                f"{self._path}: a spilled tile is damaged; remove this folder, and give {resume}"
            ) from error
        return pixels

    def _open(self) -> Any:  # noqa: ANN401
        # A tile of zeros must be written too: its file marks it as finished.
        return zarr.open_array(self._path, mode="r+").with_config({"write_empty_chunks": True})

    def _create(self, channels: int) -> None:
        cell = self._grid.cell
        chunk = tuple(map(_chunk_of, cell))
        zarr.create_array(
            self._path,
            shape=(channels, self._grid.height, self._grid.width),
            shards=(channels, *cell),
            chunks=(channels, *chunk),
            dtype=self._dtype,
            compressors=[Crc32cCodec()],
            fill_value=0,
        )


def _chunk_of(side: int) -> int:
    """Side of a chunk that divides a tile's side; the tile's own where no divisor has a useful size."""
    sizes = range(min(side, _SCRATCH_CHUNK), _SMALLEST_CHUNK - 1, -1)
    return next((size for size in sizes if side % size == 0), side)


class TileCache:
    """Tiles of one stage, at most ``limit`` bytes of them in memory."""

    def __init__(self, limit: int, scratch: Scratch, *, shared: bool = False) -> None:
        """
        Args:
            limit: bytes of the tiles in memory.
            scratch: place of the others.
            shared: write every tile to ``scratch`` at once, where other processes find it.
        """
        self._scratch = scratch
        self._shared = shared
        self._tiles = _Spilling(limit, scratch)

    def __contains__(self, index: Index) -> bool:
        return index in self._tiles or index in self._scratch

    def read(self, index: Index, part: Box, origin: Box) -> Array:
        """The rectangle ``part`` of the tile whose cell is ``origin``, both in pixels of the stage's output."""
        tile = self._tiles.get(index)
        if tile is None:
            return self._scratch.read(part)
        rows, columns = part.relative_to(origin).slices
        return tile[:, rows, columns]

    def put(self, index: Index, tile: Array) -> None:
        """Keep a tile; a tile over the limit goes to the scratch array at once."""
        is_large = tile.nbytes > self._tiles.maxsize
        if is_large or self._shared:
            self._scratch.write(index, tile)
        if not is_large:
            self._tiles[index] = _in_own_pages(tile)


class _Spilling(LRUCache[Index, Array]):
    """Least recently used tiles by bytes; evicted tiles go to the scratch array."""

    def __init__(self, limit: int, scratch: Scratch) -> None:
        super().__init__(limit, getsizeof=lambda tile: tile.nbytes)
        self._scratch = scratch

    def popitem(self) -> tuple[Index, Array]:
        index, tile = super().popitem()
        if index not in self._scratch:
            self._scratch.write(index, tile)
        return index, tile


def _in_own_pages(tile: Array) -> Array:
    """A copy outside the heap: a block that outlives the network's temporaries would fragment it."""
    pages = mmap.mmap(-1, tile.nbytes)
    copy: Array = np.frombuffer(pages, tile.dtype).reshape(tile.shape)
    copy[...] = tile
    return copy
