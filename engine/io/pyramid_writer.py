"""The pyramid of a store while it grows: a shard is written as soon as its four children are.

Only whole shards are written, so a shard exists exactly when it is whole, and its presence is the resume mark. A shard of a
level is computed from its children, which are read back: the memory is that of one shard, whatever the canvas.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import EngineError, ResumeError, option
from engine.geometry import Box
from engine.io.halving import children, half_of, halve
from engine.io.objects import ObjectPath
from engine.io.shards import (
    ShardState,
    chunks_of,
    damaged_shard,
    is_present,
    raise_unless_damage,
    read_shard,
    reason_of,
    remove_shard,
    shard_path,
    shard_state,
)
from engine.io.sink import Array
from engine.io.store_layout import check_array, written_shards
from engine.io.store_name import PARTIAL
from engine.io.store_root import StoreRoot
from engine.plan.plan import Plan

_REQUESTS = 16
"""Objects of an object store that are looked at at once."""

_AT_ONCE = 1024
"""Shards whose state is looked at before the next ones."""

Lost = tuple[int, tuple[int, int], ShardState]
"""Level, (row, column) and state of a shard that is not whole."""


class OwnShards:
    """The shards that one process writes: all of them. ``engine.io.part_sink`` has those of a part of the image."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def has(self, level: int, index: tuple[int, int]) -> bool:
        """Whether this process writes a shard."""
        return True

    def indices(self, level: int) -> Iterator[tuple[int, int]]:
        """Indices of the shards of a level that this process writes."""
        return self._plan.grid(level).indices()

    def partial_files(self, store: Path, level: int) -> Iterator[Path]:
        """Files of these shards of a level that killed runs did not finish."""
        return (file for file in (store / str(level)).rglob("*.partial") if PARTIAL.fullmatch(file.name))


class PyramidWriter:
    """All levels of an open store.

    Attributes:
        own: the shards that this process writes.
    """

    def __init__(self, root: StoreRoot, plan: Plan, own: OwnShards) -> None:
        self.own = own
        self._root, self._plan = root, plan
        # Without this option a black shard would not be written, and existence is the resume mark.
        options = {"write_empty_chunks": True}
        self._arrays: list[Any] = [root.group[str(i)].with_config(options) for i in range(len(plan.pyramid))]  # type: ignore[union-attr,call-overload]
        self._written = written_shards(root.path, plan)
        self._halves = _Halves()
        self._writing: set[tuple[int, int, int]] = set()
        """(level, row, column) of the shards that threads are writing."""
        self._lock = threading.Lock()

    def check_layout(self) -> None:
        """Raise InputError unless the metadata of every level are those of the plan."""
        for level, (array, size) in enumerate(zip(self._arrays, self._plan.pyramid, strict=True)):
            where = f"{self._root.path}/{level}"
            check_array(where, array, size, self._plan.shard, self._plan.chunk, self._plan.pixels)

    def keep_halves(self, limit: int) -> None:
        """Keep up to ``limit`` bytes of halved shards in memory until their neighbours are there."""
        self._halves.limit = limit

    def has(self, box: Box) -> bool:
        """Whether all shards of a box of the full-size image exist: each is a regular file that is not empty, or an object."""
        return all(self._written.has(0, index) for index in self._plan.grid().indices(box))

    def write(self, box: Box, pixels: Array, half: Array | None = None) -> None:
        """Write the shards of ``box`` and their ancestors. Arguments and errors as for ``ZarrSink.write``."""
        for index in self._plan.grid().indices(box):
            shard = self._plan.grid().box(*index)
            rows, columns = shard.relative_to(box).slices
            self._write_with_ancestors(0, index, pixels[:, rows, columns], half_of(half, shard, box))

    def complete(self) -> None:
        """Write the shards of the pyramid that are missing. Raises ResumeError where one of the full-size image is."""
        self._written.refresh()
        for level in range(len(self._arrays)):
            if not is_present(self._root.path / str(level) / "zarr.json"):
                raise self._root.vanished()
            for index in self.own.indices(level):
                if self._written.has(level, index):
                    continue
                if level == 0:
                    resume = option("resume", True)
                    box = self._plan.grid(level).box(*index)
                    raise ResumeError(f"{self._root.path}: the shard at {box} is missing; render again with {resume}")
                self._write_shard(level, index, self._halved(level, index))

    def lost(self, *, is_complete: bool) -> list[Lost]:
        """Damaged shards: cut, of the wrong kind or, in a complete store, missing."""
        fine = {ShardState.WHOLE} if is_complete else {ShardState.WHOLE, ShardState.MISSING}
        states = ((level, index, state) for level in range(len(self._arrays)) for index, state in self._states(level))
        return [shard for shard in states if shard[2] not in fine]

    def remove(self, lost: Iterable[Lost]) -> None:
        """Remove the files of shards that are not whole."""
        for level, index, state in lost:
            if state is not ShardState.MISSING:
                remove_shard(shard_path(self._root.path, level, *index))
                self._written.set(level, index, is_there=False)

    def remove_partial(self) -> None:
        """Remove files that killed runs did not finish. An object store has none."""
        if isinstance(self._root.path, ObjectPath):
            return
        for level in range(len(self._arrays)):
            for leftover in self.own.partial_files(self._root.path, level):
                if leftover.is_file():
                    leftover.unlink(missing_ok=True)

    def _states(self, level: int) -> Iterator[tuple[tuple[int, int], ShardState]]:
        """State of every shard of a level that this process writes."""
        look, indices = partial(self._state, chunks_of(self._arrays[level]), level), self.own.indices(level)
        if not isinstance(self._root.path, ObjectPath):
            yield from ((index, look(index)) for index in indices)
            return
        with ThreadPoolExecutor(_REQUESTS) as pool:  # and no request for shards that the list lacks
            while some := list(islice(indices, _AT_ONCE)):
                there = [index for index in some if self._written.has(level, index)]
                states = dict(zip(there, pool.map(look, there), strict=True))
                yield from ((index, states.get(index, ShardState.MISSING)) for index in some)

    def _state(self, chunks: int, level: int, index: tuple[int, int]) -> ShardState:
        return shard_state(shard_path(self._root.path, level, *index), chunks, self._root.mark)

    def _children(self, level: int, index: tuple[int, int]) -> list[tuple[int, int]]:
        """Indices of the shards below one shard: four, or fewer at the image's border."""
        return children(self._plan.grid(level - 1), self._plan.grid(level), index)

    def _write_with_ancestors(
        self, level: int, index: tuple[int, int], pixels: Array, half: Array | None = None
    ) -> None:
        """Write a shard and its ancestors, as far as all their children exist.

        Of the threads that write the children of a shard, the last to finish writes it, alone.
        """
        parent, shard = (index[0] // 2, index[1] // 2), (level, *index)
        with self._lock:
            self._writing.add(shard)
        try:
            self._write_shard(level, index, pixels, half)
        finally:
            with self._lock:
                self._writing.remove(shard)
                is_last = self._grows_beyond(level, index) and all(
                    (level, *child) not in self._writing and self._written.has(level, child)
                    for child in self._children(level + 1, parent)
                )
        if is_last:
            self._write_with_ancestors(level + 1, parent, self._halved(level + 1, parent))

    def _grows_beyond(self, level: int, index: tuple[int, int]) -> bool:
        """Whether this process writes the parent of a shard."""
        return level + 1 < len(self._arrays) and self.own.has(level + 1, (index[0] // 2, index[1] // 2))

    def _halved(self, level: int, index: tuple[int, int]) -> Array:
        """Pixels of a shard of ``level`` from its children in the level below."""
        box = self._plan.grid(level).box(*index)
        parent = np.empty((self._plan.pixels.channels, *box.shape), self._plan.pixels.dtype)
        for child in self._children(level, index):
            source = self._plan.grid(level - 1).box(*child)
            rows, columns = source.cover(2).relative_to(box).slices
            half = self._halves.take((level - 1, *child))
            parent[:, rows, columns] = halve(self._read(level - 1, child)) if half is None else half
        return parent

    def _write_shard(self, level: int, index: tuple[int, int], pixels: Array, half: Array | None = None) -> None:
        array, rows_and_columns = self._arrays[level], self._plan.grid(level).box(*index).slices
        if self._grows_beyond(level, index):  # before the shard is seen: another thread may halve its siblings at once
            self._halves.put((level, *index), pixels, half)
        try:
            array[(slice(None), *rows_and_columns)] = pixels
        except (OSError, EngineError):
            raise
        except Exception as error:
            # Zarr decodes a shard at the image's border, for pixels beyond it, and it is damaged.
            raise_unless_damage(error, array)
            remove_shard(shard_path(self._root.path, level, *index))
            array[(slice(None), *rows_and_columns)] = pixels
        self._written.set(level, index, is_there=True)

    def _read(self, level: int, index: tuple[int, int]) -> Array:
        """Pixels of a shard. Zarr reads a lost one as black, so its file must be there before and after."""
        try:
            pixels = read_shard(self._arrays[level], self._plan.grid(level).box(*index))
            problem = None if is_present(shard_path(self._root.path, level, *index)) else "missing"
        except OSError:
            raise
        except Exception as error:  # each codec has exceptions of its own
            raise_unless_damage(error, self._arrays[level])
            problem = reason_of(error)
        if problem is None:
            return pixels
        self._root.check()
        raise ResumeError(damaged_shard(self._root.path, shard_path(self._root.path, level, *index), problem))


class _Halves:
    """Halved shards whose parent is not written yet. Those beyond ``limit`` bytes are read back from the disk."""

    def __init__(self) -> None:
        self.limit = 0
        self._kept: dict[tuple[int, int, int], Array] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    def put(self, index: tuple[int, int, int], pixels: Array, half: Array | None) -> None:
        """Keep the half of a shard (level, row, column), if there is room; ``half``: a copy of it is kept if it is known."""
        if not self.limit:
            return
        half = halve(pixels) if half is None else half.copy()
        with self._lock:
            if self._bytes + half.nbytes <= self.limit:
                self._kept[index] = half
                self._bytes += half.nbytes

    def take(self, index: tuple[int, int, int]) -> Array | None:
        """The half of a shard, which is then forgotten; None if it is not kept."""
        with self._lock:
            half = self._kept.pop(index, None)
            self._bytes -= 0 if half is None else half.nbytes
        return half
