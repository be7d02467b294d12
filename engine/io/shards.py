"""Files of the shards of a store: their names, their state without decoding them, and errors of reading them.

A shard of Zarr's ``sharding_indexed`` codec ends with an index: offset and length of every inner chunk as uint64, and the
crc32c of them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from engine.causes import naming, raise_if_exhausted, system_error
from engine.errors import InputError, option
from engine.geometry import Box, Grid
from engine.io.objects import ObjectPath, Place

_ABSENT = np.uint64(2**64 - 1)
"""Offset of a chunk that is not stored."""

_CHECKSUM_BYTES = 4

MARK = "engineplan"
"""Attribute of a shard in an object store: ``mark_of`` its plan. A put that was on its way when its store was replaced may
still arrive in the new one."""


PlaceT = TypeVar("PlaceT", Path, ObjectPath, Place)

Flags: TypeAlias = NDArray[np.bool_]


_ROW_AND_COLUMN = re.compile(r"(\d{1,9})/(\d{1,9})")


class ShardState(StrEnum):
    """State of a shard's file."""

    MISSING = "missing"
    WHOLE = "whole"
    EMPTY = "empty"
    FOREIGN = "not a regular file"
    CUT = "cut, or overwritten"
    OTHER = "of another render"


def mark_of(plan: Mapping[str, Any]) -> str:
    """Digest of a stored plan."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:32]


def chunks_of(array: Any) -> int:  # noqa: ANN401 (zarr's type)
    """Number of inner chunks of a whole shard of an array [3, H, W]."""
    return math.prod(shard // chunk for shard, chunk in zip(array.shards[1:], array.chunks[1:], strict=True))


def shard_path(store: PlaceT, level: str | int, row: int, column: int) -> PlaceT:
    """File of a shard of an image [3, H, W]."""
    return store / str(level) / "c" / "0" / str(row) / str(column)


def present_shards(store: Place, level: str | int, grid: tuple[int, int]) -> Flags:
    """Which shards of a level are there, [rows, columns]: an object store is asked once, a folder for each of them.

    Args:
        store: the store.
        level: path of the level.
        grid: (rows, columns) of shards.
    """
    present = np.zeros(grid, bool)
    if isinstance(store, ObjectPath):
        for name, about in (store / str(level) / "c" / "0").objects():
            place = tuple(map(int, match.groups())) if (match := _ROW_AND_COLUMN.fullmatch(name)) else grid
            if place[0] < grid[0] and place[1] < grid[1] and about["size"]:
                present[place] = True
        return present
    for row in range(grid[0]):
        present[row] = present_in_row(store, level, row, grid[1])
    return present


class WrittenShards:
    """Which shards of a store are there. A folder is asked each time; an object store once, and then told of writes.

    Args:
        store: the store.
        grids: shards of each level.
    """

    def __init__(self, store: Place, grids: Sequence[Grid]) -> None:
        self._store, self._grids = store, grids
        self._listed: list[Flags] = []
        self.refresh()

    def refresh(self) -> None:
        """Look at an object store again."""
        if isinstance(self._store, ObjectPath):
            self._listed = [
                present_shards(self._store, level, (grid.rows, grid.columns)) for level, grid in enumerate(self._grids)
            ]

    def has(self, level: int, index: tuple[int, int]) -> bool:
        """Whether a shard is there."""
        return bool(self._listed[level][index]) if self._listed else is_present(shard_path(self._store, level, *index))

    def set(self, level: int, index: tuple[int, int], *, is_there: bool) -> None:
        """Tell that a shard was written or removed."""
        if self._listed:
            self._listed[level][index] = is_there


def present_in_row(store: Path, level: str | int, row: int, columns: int) -> list[bool]:
    """Which shards of a row of a level are there."""
    folder = shard_path(store, level, row, 0).parent
    return [folder.is_dir() and is_present(folder / str(column)) for column in range(columns)]


def is_present(path: Place) -> bool:
    """Whether a file is a regular one, no link, and not empty."""
    return file_state(path) is ShardState.WHOLE


def file_state(path: Place) -> ShardState:
    """State of a file by its kind and its size alone."""
    if isinstance(path, ObjectPath):
        about = path.head()
        return ShardState.MISSING if about is None else ShardState.WHOLE if about["size"] else ShardState.EMPTY
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return ShardState.MISSING
    if not stat.S_ISREG(status.st_mode):
        return ShardState.FOREIGN
    return ShardState.WHOLE if status.st_size else ShardState.EMPTY


def shard_state(path: Place, chunks: int, mark: str | None = None) -> ShardState:
    """State of a shard by its index, which must be intact and account for every byte of the file.

    Args:
        path: file of the shard.
        chunks: number of inner chunks of a whole shard.
        mark: ``mark_of`` the store's plan. An object with another one is of another store; copies may have none.
    """
    length = 16 * chunks + _CHECKSUM_BYTES
    if isinstance(path, ObjectPath):
        if (about := path.head()) is None:
            return ShardState.MISSING
        if not (size := int(about["size"])):
            return ShardState.EMPTY
        if mark is not None and about["attributes"].get(MARK, mark) != mark:
            return ShardState.OTHER
        tail = path.read_range(max(0, size - length), size, about["e_tag"])
    else:
        state = file_state(path)
        if state is not ShardState.WHOLE:
            return state
        with naming(path), path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - length))
            tail = file.read(length)
    index, checksum = tail[:-_CHECKSUM_BYTES], tail[-_CHECKSUM_BYTES:]
    if len(tail) < length or google_crc32c.value(index) != int.from_bytes(checksum, "little"):
        return ShardState.CUT
    entries = np.frombuffer(index, "<u8").reshape(-1, 2)
    stored = entries[entries[:, 0] != _ABSENT]
    end = int(stored.sum(axis=1).max()) if len(stored) else -1
    return ShardState.WHOLE if end + length == size else ShardState.CUT


def raise_unless_damage(error: Exception, array: Any) -> None:  # noqa: ANN401 (zarr's type)
    """Raise an exception of reading an array again if it says nothing of the file.

    Raises:
        MemoryError: Blosc failed although the checksum is right. The chunk is intact, so memory was exhausted, which Blosc
            does not report as such.
        Exception: ``error``, as ``raise_if_exhausted`` does, and any error of the system: Zarr takes a file that is not there
            as missing, and every other one is of the disk or of permissions.
    """
    raise_if_exhausted(error)
    if system_error(error) is not None:
        raise error
    if "blosc decompression" in str(error) and "crc32c" in _inner_codecs(array):
        raise MemoryError("Blosc found no memory") from error


def _inner_codecs(array: Any) -> list[str]:  # noqa: ANN401
    """Names of the codecs of a sharded array's chunks; empty for other arrays."""
    try:
        settings = array.metadata.codecs[0].to_dict()["configuration"]
        return [codec["name"] for codec in settings["codecs"]]
    except (AttributeError, LookupError, TypeError):
        return []


def remove_shard(path: Place) -> None:
    """Remove a bad shard, or a link or an empty folder in its place.

    Raises:
        InputError: a folder with files is in its place, which are somebody's.
        OSError: as the file system does.
        StorageError: the object store does not answer.
    """
    if isinstance(path, ObjectPath):
        path.delete()
        return
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    try:
        path.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise InputError(
            f"{path}: a folder with files in the place of a shard; move it, then repeat this command"
        ) from error


def read_shard(array: Any, box: Box) -> NDArray[Any]:  # noqa: ANN401 (zarr's type)
    """Pixels of a shard, [C, h, w]."""
    pixels: NDArray[Any] = array[(slice(None), *box.slices)]
    return pixels


def reason_of(error: Exception) -> str:
    """Reason for which a shard cannot be read, in two words."""
    return "wrong checksum" if "checksum" in str(error).lower() else "not decodable"


def damaged_shard(store: Place, shard: Place, problem: str) -> str:
    """Message about a shard that cannot be read."""
    return (
        f"{shard}: damaged shard ({problem}); run engine check {store} --repair, then repeat the store's engine render "
        f"with {option('resume', True)}"
    )
