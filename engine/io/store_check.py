"""A whole look at a store: every shard is read, every parent is compared with the halving of its children.

The presence of a shard says that it was written whole; only reading it says that it still is what was written. The memory is
that of one shard and one of its children.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from engine.causes import raise_if_exhausted
from engine.errors import InputError, counted, option
from engine.geometry import Box, Grid
from engine.io.durable import open_root, open_to_write
from engine.io.files import new_identity
from engine.io.halving import children, halve
from engine.io.objects import ObjectPath, Place
from engine.io.provenance import ATTRIBUTE, IDENTITY, stored_plan, stored_provenance
from engine.io.shards import (
    ShardState,
    chunks_of,
    file_state,
    mark_of,
    raise_unless_damage,
    read_shard,
    reason_of,
    remove_shard,
    shard_path,
    shard_state,
)
from engine.io.sink import Array
from engine.io.store_layout import check_array, stored_sizes
from engine.io.store_lock import lock_store
from engine.pixels import pixels_of
from engine.plan.sides import sides_of

Index = tuple[int, int, int]
"""(level, row, column) of a shard."""


@dataclass(frozen=True, slots=True)
class Damage:
    """A shard that is not as it was written."""

    file: Place
    """File of the shard."""
    level: int
    """Level of the pyramid; 0 is the full image."""
    box: Box
    """Its pixels in the level."""
    problem: str
    """Kind of damage, in a few words."""


@dataclass(frozen=True, slots=True)
class Findings:
    """Result of ``check_store``."""

    complete: bool
    """Whether the store was marked complete."""
    shards: int
    """Shards of all levels of a finished store."""
    missing: int
    """Shards that are not written; in a store marked complete they are damage."""
    damage: tuple[Damage, ...]
    """Damaged shards, level by level."""
    removed: int
    """Files that ``repair`` removed: the damaged shards and those computed from them."""


def check_store(
    path: Place, *, repair: bool = False, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Findings:
    """Read a store of this engine to the last byte.

    Args:
        path: folder or URL of the store, finished or not.
        repair: remove damaged shards and those computed from them, and mark the store incomplete; a render with ``resume``
            makes exactly these again.
        on_progress: called with (done, total) reads of a shard.

    Raises:
        InputError: it is no store of this engine, another process writes it, or its metadata is damaged.
        StorageError: an object store does not answer.
    """
    _plan_of(path)  # before the lock, which takes any folder
    if isinstance(path, ObjectPath) and not repair:  # which has no locks: a render that runs is seen as not finished
        return _Check(path, on_progress).run(repair=False)
    lock = lock_store(path)
    try:
        return _Check(path, on_progress, repair=repair).run(repair=repair)
    finally:
        lock.release()


class _Check:
    def __init__(self, path: Place, on_progress: Callable[[int, int], None], *, repair: bool = False) -> None:
        plan = _plan_of(path)
        self._mark = mark_of(plan) if isinstance(path, ObjectPath) else None
        self._path, self._on_progress = path, on_progress
        try:
            sizes, shard, chunk = stored_sizes(plan), sides_of(plan["shard"]), sides_of(plan["chunk"])
            pixels = pixels_of(plan)
            self._group = open_to_write(path) if repair or isinstance(path, Path) else open_root(path)
            self._arrays: list[Any] = [self._group[str(level)] for level in range(len(sizes))]
        except Exception as error:  # each of Zarr's parsers has exceptions of its own
            raise_if_exhausted(error)
            raise InputError(
                f"{path}: its metadata (zarr.json) is damaged; copy the store again, or render with {option('overwrite', True)}"
            ) from error
        for level, (array, size) in enumerate(zip(self._arrays, sizes, strict=True)):
            check_array(f"{path}/{level}", array, size, shard, chunk, pixels)
        _check_image(path, self._group, len(sizes))
        self._grids = [Grid(*size, shard) for size in sizes]
        self._provenance: dict[str, Any] = stored_provenance(path) or {}
        self._bad: dict[Index, str] = {}
        self._missing: set[Index] = set()
        self._done = 0
        # Every shard is read once as a parent or alone, and once more as a child.
        self._total = sum(map(len, self._grids)) + sum(map(len, self._grids[1:-1]))

    def run(self, *, repair: bool) -> Findings:
        complete = self._provenance.get("complete") is True
        if len(self._grids) == 1:
            for row, column in self._grids[0].indices():
                self._read((0, row, column))
        for level in range(1, len(self._grids)):
            for row, column in self._grids[level].indices():
                self._compare((level, row, column))
        if complete:
            self._bad.update(dict.fromkeys(self._missing, ShardState.MISSING))
        removed = self._remove() if repair and self._bad else 0
        damage = tuple(
            Damage(self._file(i), i[0], self._grids[i[0]].box(*i[1:]), problem)
            for i, problem in sorted(self._bad.items())
        )
        return Findings(complete, sum(map(len, self._grids)), len(self._missing), damage, removed)

    def _compare(self, parent: Index) -> None:
        """Read a shard and its children, and compare them."""
        level, *index = parent
        box = self._grids[level].box(*index)
        pixels = self._read(parent)
        for child in children(self._grids[level - 1], self._grids[level], (index[0], index[1])):
            source = self._grids[level - 1].box(*child)
            below = self._read((level - 1, *child))
            if pixels is None or below is None:
                continue
            rows, columns = source.cover(2).relative_to(box).slices
            if not np.array_equal(pixels[:, rows, columns], halve(below)):
                # Which of the two is wrong cannot be known where both checksums are right.
                self._bad.setdefault(parent, "differs from the shards it is computed from")
                self._bad.setdefault((level - 1, *child), "differs from the shard computed from it")

    def _read(self, index: Index) -> Array | None:
        """Pixels of a shard, or None where it is missing or damaged."""
        self._done += 1
        self._on_progress(self._done, self._total)
        level, *position = index
        array = self._arrays[level]
        state = shard_state(self._file(index), chunks_of(array), self._mark)
        if state is ShardState.WHOLE:
            try:
                return read_shard(array, self._grids[level].box(*position))
            except Exception as error:  # each codec has exceptions of its own
                raise_unless_damage(error, array)
                self._bad[index] = reason_of(error)
        elif state is ShardState.MISSING:
            self._missing.add(index)
        else:
            self._bad[index] = state
        return None

    def _remove(self) -> int:
        """Remove damaged shards and their ancestors. The store is marked incomplete first."""
        self._group.attrs[ATTRIBUTE] = {**self._provenance, "complete": False, IDENTITY: new_identity()}
        removed = 0
        for index in {ancestor for bad in self._bad for ancestor in self._ancestors(bad)}:
            file = self._file(index)
            if file_state(file) is not ShardState.MISSING:
                remove_shard(file)
                removed += 1
        return removed

    def _ancestors(self, index: Index) -> Iterator[Index]:
        """The shard and all that are computed from it."""
        level, row, column = index
        while level < len(self._grids):
            yield level, row, column
            level, row, column = level + 1, row // 2, column // 2

    def _file(self, index: Index) -> Place:
        return shard_path(self._path, *index)


def _plan_of(path: Place) -> dict[str, Any]:
    plan = stored_plan(path)
    if plan is None:
        what = "no such store" if not path.exists() else "not a store of this engine, or its zarr.json is damaged"
        raise InputError(f"{path}: {what}; name the folder that engine render wrote")
    return plan


def _check_image(path: Place, group: zarr.Group, levels: int) -> None:
    """Raise InputError unless the metadata of OME-Zarr lists the levels."""
    try:
        attributes: Any = group.attrs["ome"]
        (image,) = attributes["multiscales"]
        listed = [dataset["path"] for dataset in image["datasets"]]
    except (KeyError, ValueError, TypeError):
        listed = []
    if listed != [str(level) for level in range(levels)]:
        raise InputError(
            f"{path}: its OME-Zarr metadata does not list its {counted(levels, 'level')}; copy the store again, or render with "
            f"{option('overwrite', True)}"
        )
