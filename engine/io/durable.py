"""Zarr's folder on the disk, with files that survive a loss of power and a root that is never made again."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from typing import Any

import zarr
from zarr.abc.store import Store
from zarr.storage import LocalStore

from engine.causes import naming
from engine.io.files import new_identity, sync_folder, write_new
from engine.io.object_reader import ObjectReader
from engine.io.object_writer import ObjectWriter
from engine.io.objects import ObjectPath, Place
from engine.io.shards import remove_shard


class DurableStore(LocalStore):
    """Every file is on the disk before its name is, and its name before ``set`` returns.

    Zarr's own class makes the folders of a file wherever they are missing. This one makes none above the store, so that a
    store that was removed or renamed stays away.
    """

    async def _open(self, *, mode: Any = None) -> None:  # noqa: ANN401 (zarr's type)
        if not self.root.is_dir():
            raise FileNotFoundError(2, "No such store", str(self.root))
        await Store._open(self)

    async def get(self, key: str, prototype: Any = None, byte_range: Any = None) -> Any:  # noqa: ANN401
        """Contents of a file, or None where there is none. Raises OSError with the path.

        Zarr's loop reads the file itself: passing a part of a shard to a thread takes as long as reading it (docs/log.md).
        """
        return self.get_sync(key, prototype=prototype, byte_range=byte_range)

    def get_sync(self, key: str, **options: Any) -> Any:  # noqa: ANN401
        """``get`` without a loop."""
        with naming(self.root / key):
            return super().get_sync(key, **options)

    async def set(self, key: str, value: Any) -> None:  # noqa: ANN401
        """Write a file, in place of an older one."""
        self._check_writable()
        await asyncio.to_thread(write_durably, self.root, key, value.as_buffer_like())

    async def set_if_not_exists(self, key: str, value: Any) -> None:  # noqa: ANN401
        """Write a file unless there is one."""
        if not (self.root / key).exists():
            await self.set(key, value)

    def set_sync(self, key: str, value: Any) -> None:  # noqa: ANN401
        """Write a file, in place of an older one."""
        self._check_writable()
        write_durably(self.root, key, value.as_buffer_like())


def open_root(path: Place) -> zarr.Group:
    """Open a store to read it. Raises OSError with the path, StorageError, and what Zarr raises for damage."""
    store = ObjectReader(path) if isinstance(path, ObjectPath) else DurableStore(path, read_only=True)
    return zarr.open_group(store, mode="r")


def open_to_write(path: Place, mark: str | None = None) -> zarr.Group:
    """Open a store to write it. ``mark``: ``mark_of`` its plan. Raises as ``open_root``."""
    store = ObjectWriter(path, mark) if isinstance(path, ObjectPath) else DurableStore(path)
    return zarr.open_group(store, mode="r+", zarr_format=3)


def stamp_of(store: Place, name: str = "zarr.json") -> tuple[object, ...]:
    """What changes when the metadata of a store's root are written: inode, time and size of the file, or the object's tag.

    Raises:
        FileNotFoundError: it has none.
        OSError: as the file system does.
    """
    root = store / name
    if isinstance(root, ObjectPath):
        about = root.head()
        if about is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(root))
        return about["e_tag"], about["last_modified"], about["size"]
    status = os.stat(root)
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def write_durably(root: Path, key: str, data: Any) -> None:  # noqa: ANN401 (any buffer)
    """Write the file ``key`` of a store, whole or not at all. Raises OSError, or InputError as ``remove_shard`` does."""
    path = root / key
    _make_folders(root, path.parent)
    part = path.with_name(f"{path.name}.{new_identity()}.partial")
    try:
        write_new(part, memoryview(data).cast("B"))
        try:
            part.replace(path)
        except IsADirectoryError:
            remove_shard(path)
            part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _make_folders(root: Path, folder: Path) -> None:
    """Make the folders of a file below ``root``, which must exist."""
    missing: list[Path] = []
    while folder != root and not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)
