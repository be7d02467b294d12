"""The output of a render: a sharded OME-Zarr store whose pyramid grows with it.

Only whole shards are written, each to a temporary file that is renamed once it is on the disk. So a shard exists exactly
when it is whole, and its presence is the resume mark. Every chunk has a checksum. A shard of a pyramid level is computed from
its four children, read back as soon as they exist: the memory is that of one shard, whatever the canvas, and a killed run
leaves no state behind.

One process writes a store: it holds a lock on the folder. Where there are no locks (NFS, Windows), and against removal, the
store has a random identity until it is finished, which is looked at before every write. Parts of one render share the lock
(engine.io.part_sink).

In an object store the put of a whole object takes the place of the rename, and nothing is moved aside. The lock is one of this
machine; whoever resumes on another one gives the store a new identity, so that the earlier writer stops
(engine.io.object_writer).

``engine.io.new_store`` makes a store, ``store_name`` and ``store_lock`` keep others away from it, ``store_layout`` knows its
metadata, ``store_root`` its identity, and ``pyramid_writer`` writes its shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from engine.errors import InputError, ResumeError, option
from engine.geometry import Box
from engine.io.files import Lock, remove_leftovers, temporary_names
from engine.io.first_look import FIRST_LOOK
from engine.io.new_store import make_store
from engine.io.object_writer import complete_metadata
from engine.io.objects import ObjectPath, Place, anchor_of
from engine.io.provenance import COMMAND, IDENTITY, PARTS
from engine.io.pyramid_writer import OwnShards, PyramidWriter
from engine.io.scratch import remove_scratch, scratch_of, statistics_name
from engine.io.sink import Array
from engine.io.store_layout import check_plan, metadata_of
from engine.io.store_lock import lock_store
from engine.io.store_name import remove_store, replaced_stores
from engine.io.store_root import StoreRoot
from engine.pixels import PixelFormat
from engine.plan.plan import Plan


class ZarrSink:
    """An OME-Zarr 0.5 store of one plan, opened by ``create`` or ``resume``.

    Attributes:
        path: folder or URL of the store.
        lost: shards of a store marked complete that ``resume`` found missing, and of any store that it found damaged.
    """

    def __init__(self, path: Place, plan: Plan, lock: Lock) -> None:
        self.path = path
        self.lost = 0
        self._plan = plan
        self._lock = lock
        self._root = StoreRoot(path)
        self._pyramid = PyramidWriter(self._root, plan, OwnShards(plan))

    @classmethod
    def create(
        cls, path: Place, plan: Plan, provenance: dict[str, Any], *, overwrite: bool = False, shared: bool = False
    ) -> ZarrSink:
        """Create a new store.

        Args:
            path: folder or URL of the store.
            plan: the plan of the render.
            provenance: JSON values to record beside the plan.
            overwrite: replace an existing store of this engine, or an empty folder. The old store is kept under another name
                (``replaced``) until the new one is complete; in an object store it is deleted at once.
            shared: let parts of the render lock the store at the same time.

        Raises:
            ResumeError: ``path`` exists and ``overwrite`` is false, it is no store of this engine, or it is being written.
            InputError: the store cannot be written.
            StorageError: the object store does not answer.
        """
        lock = make_store(path, plan, provenance, overwrite=overwrite, shared=shared)
        try:
            return cls(path, plan, lock)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def resume(cls, path: Place, plan: Plan, *, shared: bool = False) -> ZarrSink:
        """Open a store to finish it, and remove shards whose files are damaged (``lost``).

        In an object store its writer on another machine, if there is one, stops.

        Args:
            path: folder or URL of the store.
            plan: its plan.
            shared: beside processes that hold parts of it.

        Raises:
            ResumeError: the store has another plan, is being written, is damaged in its metadata, or is no store.
        """
        sink = cls._open(path, plan, shared=shared)
        try:
            if isinstance(path, ObjectPath) and not sink.complete:
                sink._root.mark_incomplete()
            sink._remove_damaged()
        except BaseException:
            sink.close()
            raise
        return sink

    @classmethod
    def _open(cls, path: Place, plan: Plan, *, shared: bool = False) -> Self:
        """Lock and open a store of this plan. Raises ResumeError as ``resume``."""
        check_plan(path, plan)
        lock = lock_store(path, shared=shared)
        try:
            check_plan(path, plan)  # once more: another process may have replaced it before the lock
            return cls._opened(path, plan, lock)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def _opened(cls, path: Place, plan: Plan, lock: Lock) -> Self:
        try:
            if isinstance(path, ObjectPath):
                complete_metadata(path, metadata_of(path.stem, plan, {}))
            sink = cls(path, plan, lock)
            sink._pyramid.check_layout()
        except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError, InputError) as error:
            advice = option("overwrite", True)
            raise ResumeError(f"{path}: damaged, a level's zarr.json cannot be read; give {advice}") from error
        return sink

    @property
    def complete(self) -> bool:
        """Whether ``finish`` marked the store complete."""
        return self._root.is_complete

    @property
    def pixels(self) -> PixelFormat:
        """Channels and depth of the store."""
        return self._plan.pixels

    @property
    def is_finished(self) -> bool:
        """Whether every shard of the full-size image is written; ``finish`` may still have to complete the pyramid."""
        return next(self.missing(), None) is None

    @property
    def area(self) -> int:
        """Pixels that this sink writes."""
        return self._plan.size[0] * self._plan.size[1]

    @property
    def provenance(self) -> dict[str, Any]:
        """The plan, the provenance of the render, and later notes."""
        return self._root.provenance

    @property
    def replaced(self) -> Path | None:
        """The store that this one replaces, kept until this one is complete."""
        return next(iter(replaced_stores(self.path)), None) if isinstance(self.path, Path) else None

    @property
    def scratch(self) -> Path:
        """Folder for the working data of this store: tiles that exceed the memory, and frozen statistics."""
        return scratch_of(self.path, self.provenance)

    def note(self, values: dict[str, Any]) -> None:
        """Add values, measured while rendering, to the provenance. Raises ResumeError as ``write`` does."""
        self._root.check()
        self._root.replace({**self.provenance, **values})

    def missing(self, writes: Iterable[Box] | None = None) -> Iterator[Box]:
        """Boxes of the plan with a missing shard, in the plan's order; ``writes``: boxes of whole shards in their place."""
        for box in self._plan.writes() if writes is None else writes:
            if not self._pyramid.has(box):
                yield box

    def write(self, box: Box, pixels: Array, half: Array | None = None) -> None:
        """Write ``box``, a whole number of shards (cut by the image's border), and grow the pyramid.

        Args:
            box: part of the image.
            pixels: [C, h, w] in the format of the plan.
            half: ``halve(pixels)``, where a device made it; it is copied.

        Raises:
            ResumeError: the store was removed, renamed or replaced, or a shard that the pyramid needs is damaged.
            OSError: the disk is full, or another error of the file system.
        """
        self._root.check()
        try:
            self._pyramid.write(box, pixels, half)
        except OSError:
            self._root.check()  # a store that has gone is the better reason
            raise

    def finish(self) -> None:
        """Add the shards of the pyramid that a killed run left out, and mark the store complete.

        Raises:
            ResumeError: a shard of the full-size image is missing, or as ``write`` does.
        """
        self._root.check()
        self._pyramid.complete()
        if not self.complete:
            self._root.check()
            private = (COMMAND, IDENTITY, PARTS, FIRST_LOOK)
            finished = {key: value for key, value in self.provenance.items() if key not in private}
            self._root.replace({**finished, "complete": True})
        if isinstance(self.path, ObjectPath):
            self.path.anchor.unlink(missing_ok=True)
            self.path.delete([statistics_name(stage.statistics) for stage in self._plan.stages if stage.statistics])
        else:
            for old in replaced_stores(self.path):
                with suppress(ResumeError):  # somebody put a file into it
                    remove_store(old)
            remove_leftovers(self.path)
        remove_scratch(temporary_names(anchor_of(self.path), "scratch"))
        self.close()

    def close(self) -> None:
        """Let other processes write the store. It happens by itself when the process ends."""
        self._lock.release()

    def keep_halves(self, limit: int) -> None:
        """Build the pyramid from memory: up to ``limit`` bytes of halved shards wait there for their neighbours.

        Decoding the shards of a level takes longer than compressing the next one, which a GPU outruns.
        """
        self._pyramid.keep_halves(limit)

    def _remove_damaged(self) -> None:
        """Remove damaged shards, and reopen a finished store that lost some."""
        was_complete = self.complete
        lost = self._pyramid.lost(is_complete=was_complete)
        self._pyramid.remove_partial()
        self.lost = len(lost)
        if was_complete and not lost:
            return
        if was_complete or self.provenance.get(IDENTITY) is None:
            self._root.mark_incomplete()
        self._pyramid.remove(lost)
