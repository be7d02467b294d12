"""The root of an open store: its provenance, and whether the name still is that of the store which was opened."""

from __future__ import annotations

import json
from typing import Any

from engine.errors import ResumeError, option
from engine.io.durable import open_to_write, stamp_of
from engine.io.files import new_identity
from engine.io.object_writer import ObjectWriter
from engine.io.objects import ObjectPath, Place
from engine.io.provenance import ATTRIBUTE, IDENTITY, stored_plan
from engine.io.shards import mark_of


class StoreRoot:
    """The root of a store that this process writes.

    Args:
        path: folder or URL of the store.

    Attributes:
        path: folder or URL of the store.
        mark: ``mark_of`` its plan, which its shards have in an object store; None for a folder.
        group: Zarr's group of the levels.

    Raises:
        OSError, StorageError: as ``open_root`` does.
    """

    def __init__(self, path: Place) -> None:
        self.path = path
        self.mark = mark_of(stored_plan(path) or {}) if isinstance(path, ObjectPath) else None
        self.group = open_to_write(path, self.mark)
        self._stamp = stamp_of(path)

    @property
    def provenance(self) -> dict[str, Any]:
        """The plan, the provenance of the render, and later notes."""
        attributes: Any = self.group.attrs[ATTRIBUTE]
        return dict(attributes)

    @property
    def is_complete(self) -> bool:
        """Whether the store is marked complete."""
        return bool(self.provenance.get("complete"))

    def replace(self, values: dict[str, Any]) -> None:
        """Write other provenance."""
        self.group.attrs[ATTRIBUTE] = values
        self._stamp = stamp_of(self.path)

    def mark_incomplete(self) -> None:
        """Let the store be finished again."""
        self.replace({**self.provenance, "complete": False, IDENTITY: new_identity()})

    def check(self) -> None:
        """Raise ResumeError unless the folder of this name is still this store: by its root's inode and time, or its id."""
        try:
            stamp = stamp_of(self.path)
            if stamp == self._stamp:
                return
            stored = json.loads((self.path / "zarr.json").read_bytes())["attributes"][ATTRIBUTE]
            mine = self.provenance
            is_same = stored.get(IDENTITY) == mine.get(IDENTITY) and stored["plan"] == mine["plan"]
            if isinstance(self.group.store, ObjectWriter):
                self.group.store.look()
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            is_same = False
        if not is_same:
            raise self.vanished()
        self._stamp = stamp

    def vanished(self) -> ResumeError:
        """The error of a process whose store has gone."""
        if isinstance(self.path, ObjectPath):
            return ResumeError(
                f"{self.path}: removed, or taken over by another process that resumes, finishes or replaces it; wait for that "
                f"one, or give {option('resume', True)} to take it back"
            )
        return ResumeError(
            f"{self.path}: removed, renamed or replaced while it was written; put it back and give {option('resume', True)}, "
            f"or give another {option('out')}"
        )
