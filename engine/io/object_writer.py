"""A store in an object store, to be written: whole objects, each under a condition.

A shard is put where there is none. So one that a stopped process still sends cannot replace a later one. The root is
put in place of the one that was read, so that a process which lost the store to another changes nothing of it.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from typing import Any

from engine.errors import ResumeError, option
from engine.io.object_reader import ObjectReader
from engine.io.objects import ObjectPath
from engine.io.shards import MARK

ROOT = "zarr.json"
"""Object of the root's metadata. It is the first of a store, put where there is none, and the last that is removed."""

_OURS = re.compile(rf"(\d+/)?{ROOT}|\d+/c/0/\d+/\d+|statistics-[0-9a-f]+\.safetensors")
"""Objects of a store of this engine."""


class ObjectWriter(ObjectReader):
    """Zarr's store of objects, to be written.

    Args:
        place: the store.
        mark: ``mark_of`` its plan; None where no shard is written.

    Raises:
        FileNotFoundError: there is no store.
    """

    def __init__(self, place: ObjectPath, mark: str | None = None) -> None:
        super().__init__(place, read_only=False)
        self._attributes = {MARK: mark} if mark else None
        self._root: dict[str, Any] | None = None
        self.look()

    def look(self) -> None:
        """Take the root as it is now for the one that may be replaced. Raises FileNotFoundError."""
        self._root = (self._place / ROOT).head()
        if self._root is None:
            raise FileNotFoundError(2, "No such store", str(self._place))

    async def set(self, key: str, value: Any) -> None:  # noqa: ANN401 (zarr's type)
        """Put an object. Raises ResumeError where another process has changed the root meanwhile."""
        self._check_writable()
        await asyncio.to_thread(self._put, key, memoryview(value.as_buffer_like()).cast("B"))

    async def set_if_not_exists(self, key: str, value: Any) -> None:  # noqa: ANN401
        """Put an object unless there is one."""
        await asyncio.to_thread((self._place / key).write_new, value.to_bytes())

    def _put(self, key: str, data: memoryview) -> None:
        place = self._place / key
        if key != ROOT:
            if not place.write_new(data, self._attributes):
                place.write_over(data, attributes=self._attributes)
            return
        if not place.write_over(data, self._root):
            raise taken(self._place)
        self.look()


def taken(place: ObjectPath) -> ResumeError:
    """The error of a process that lost a store to another."""
    return ResumeError(f"{place}: another process writes it now; wait for it, or give another {option('out')}")


def foreign_object(place: ObjectPath) -> str | None:
    """Name of an object in a store that no render wrote; None if there is none."""
    return next((name for name, _ in place.objects() if not _OURS.fullmatch(name)), None)


def begin_objects(place: ObjectPath, documents: Mapping[str, bytes]) -> None:
    """Make a store of its metadata, by key. Raises ResumeError where another process has just made one."""
    if not (place / ROOT).write_new(documents[ROOT]):
        raise taken(place)
    complete_metadata(place, documents)


def complete_metadata(place: ObjectPath, documents: Mapping[str, bytes]) -> None:
    """Write the metadata of the levels, which follow from the root's plan, where a process died before it did."""
    for key, data in documents.items():
        if key != ROOT and not (place / key).is_file() and not (place / key).write_new(data):
            raise taken(place)


def remove_objects(place: ObjectPath, attribute: str, changes: Mapping[str, Any]) -> None:
    """Delete a store of this engine. Its writer, if there is one, writes no more; what it still sends has a mark.

    Args:
        place: the store.
        attribute: attribute of the root that is changed first.
        changes: values that tell its writer that it lost the store, and make it one that is not finished.

    Raises:
        ResumeError: another process writes it at the same time.
    """
    root = place / ROOT
    version = root.head()
    metadata = json.loads(root.read_bytes())
    metadata["attributes"][attribute].update(changes)
    if version is None or not root.write_over(json.dumps(metadata, indent=2).encode(), version):
        raise taken(place)
    place.delete([name for name, _ in place.objects() if name != ROOT])
    root.delete()
