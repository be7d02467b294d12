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
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np
import zarr

from engine.errors import EngineError, InputError, ResumeError, option
from engine.geometry import Box
from engine.io.durable import DurableStore, open_to_write, stamp_of
from engine.io.files import Lock, new_identity, remove_leftovers, temporary_name, temporary_names
from engine.io.first_look import FIRST_LOOK
from engine.io.halving import Halves, children, half_of, halve
from engine.io.object_writer import ObjectWriter, begin_objects, complete_metadata, remove_objects
from engine.io.objects import ObjectPath, Place, anchor_of
from engine.io.provenance import ATTRIBUTE, COMMAND, IDENTITY, PARTS, stored_plan
from engine.io.scratch import remove_scratch, scratch_of, statistics_name
from engine.io.shards import (
    ShardState,
    chunks_of,
    damaged_shard,
    is_present,
    mark_of,
    raise_unless_damage,
    read_shard,
    reason_of,
    remove_shard,
    shard_path,
    shard_state,
)
from engine.io.sink import Array
from engine.io.store_layout import check_array, check_plan, metadata_of, write_metadata, written_shards
from engine.io.store_lock import lock_store
from engine.io.store_name import (
    PARTIAL,
    check_absent,
    check_replaceable,
    forget_replaced,
    put_in_place,
    remove_store,
    replaced_stores,
)
from engine.pixels import PixelFormat
from engine.plan.plan import Plan

_REQUESTS = 16
"""Objects of an object store that are looked at at once."""

_AT_ONCE = 1024
"""Shards whose state is looked at before the next ones."""


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
        self._mark = mark_of(stored_plan(path) or {}) if isinstance(path, ObjectPath) else None
        self._group = open_to_write(path, self._mark)
        # Without this option a black shard would not be written, and existence is the resume mark.
        options = {"write_empty_chunks": True}
        self._arrays: list[Any] = [self._group[str(i)].with_config(options) for i in range(len(plan.pyramid))]  # type: ignore[union-attr,call-overload]
        self._stamp = stamp_of(path)
        self._written = written_shards(path, plan)
        self._halves = Halves()
        self._writing: set[tuple[int, int, int]] = set()
        """(level, row, column) of the shards that threads are writing."""
        self._lock_of_writing = threading.Lock()

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
        if isinstance(path, ObjectPath):
            return cls._create_objects(path, plan, provenance, overwrite=overwrite, shared=shared)
        old = lock = None
        if not overwrite:
            check_absent(path)
        elif os.path.lexists(path):
            check_replaceable(path)
            old = lock_store(path)
        # The store is built under another name, so that one of the final name has all its arrays and its plan.
        part, spilled = temporary_name(path, "part"), temporary_names(path, "scratch")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.mkdir()
            lock = lock_store(part, shared=shared)
            write_metadata(zarr.open_group(DurableStore(part), mode="w-", zarr_format=3), path.stem, plan, provenance)
            put_in_place(part, path, replaces=old is not None)
        except BaseException as error:
            shutil.rmtree(part, ignore_errors=True)
            if lock is not None:
                lock.release()
            if isinstance(error, OSError):
                raise InputError(
                    f"{path}: cannot be created ({error.strerror or error}); choose another {option('out')}"
                ) from error
            raise
        finally:
            if old is not None:
                old.release()
        forget_replaced(path)
        remove_leftovers(path)
        remove_scratch(spilled)  # of earlier stores: parts of this one may have begun since
        return cls(path, plan, lock)

    @classmethod
    def _create_objects(
        cls, path: ObjectPath, plan: Plan, provenance: dict[str, Any], *, overwrite: bool, shared: bool
    ) -> ZarrSink:
        """``create`` in an object store."""
        lock = lock_store(path, shared=shared)
        try:
            if overwrite and path.exists():
                check_replaceable(path)
                remove_objects(path, ATTRIBUTE, {"complete": False, IDENTITY: new_identity()})
            check_absent(path)
            spilled = temporary_names(path.anchor, "scratch")
            begin_objects(path, metadata_of(path.stem, plan, provenance))
            remove_scratch(spilled)
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
                sink.mark_incomplete()
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
            for level, (array, size) in enumerate(zip(sink._arrays, plan.pyramid, strict=True)):
                check_array(f"{path}/{level}", array, size, plan.shard, plan.chunk, plan.pixels)
        except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError, InputError) as error:
            advice = option("overwrite", True)
            raise ResumeError(f"{path}: damaged, a level's zarr.json cannot be read; give {advice}") from error
        return sink

    @property
    def complete(self) -> bool:
        """Whether ``finish`` marked the store complete."""
        return bool(self.provenance.get("complete"))

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
        attributes: Any = self._group.attrs[ATTRIBUTE]
        return dict(attributes)

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
        self._check_identity()
        self._set_provenance({**self.provenance, **values})

    def missing(self, writes: Iterable[Box] | None = None) -> Iterator[Box]:
        """Boxes of the plan with a missing shard, in the plan's order; ``writes``: boxes of whole shards in their place."""
        for box in self._plan.writes() if writes is None else writes:
            if any(not self._is_written(0, index) for index in self._plan.grid().indices(box)):
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
        self._check_identity()
        try:
            for index in self._plan.grid().indices(box):
                shard = self._plan.grid().box(*index)
                rows, columns = shard.relative_to(box).slices
                self._write_with_ancestors(0, index, pixels[:, rows, columns], half_of(half, shard, box))
        except OSError:
            self._check_identity()  # a store that has gone is the better reason
            raise

    def finish(self) -> None:
        """Add the shards of the pyramid that a killed run left out, and mark the store complete.

        Raises:
            ResumeError: a shard of the full-size image is missing, or as ``write`` does.
        """
        self._check_identity()
        self._complete_pyramid()
        if not self.complete:
            self._check_identity()
            private = (COMMAND, IDENTITY, PARTS, FIRST_LOOK)
            finished = {key: value for key, value in self.provenance.items() if key not in private}
            self._set_provenance({**finished, "complete": True})
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
        self._halves.limit = limit

    def mark_incomplete(self) -> None:
        """Let the store be finished again."""
        self._set_provenance({**self.provenance, "complete": False, IDENTITY: new_identity()})

    def _owns(self, level: int, index: tuple[int, int]) -> bool:
        """Whether this sink writes a shard: all of them, unless it has a part of the image."""
        return True

    def _own(self, level: int) -> Iterator[tuple[int, int]]:
        """Indices of the shards of a level that this sink writes."""
        return self._plan.grid(level).indices()

    def _complete_pyramid(self) -> None:
        """Write the shards of the pyramid that are missing. Raises ResumeError where one of the full-size image is."""
        self._written.refresh()
        for level in range(len(self._arrays)):
            if not is_present(self.path / str(level) / "zarr.json"):
                raise self._vanished()
            for index in self._own(level):
                if self._is_written(level, index):
                    continue
                if level == 0:
                    resume = option("resume", True)
                    box = self._plan.grid(level).box(*index)
                    raise ResumeError(f"{self.path}: the shard at {box} is missing; render again with {resume}")
                self._write_shard(level, index, self._halved(level, index))

    def _set_provenance(self, values: dict[str, Any]) -> None:
        self._group.attrs[ATTRIBUTE] = values
        self._stamp = stamp_of(self.path)

    def _check_identity(self) -> None:
        """Raise ResumeError unless the folder of this name is still this store: by its root's inode and time, or its id."""
        try:
            stamp = stamp_of(self.path)
            if stamp == self._stamp:
                return
            stored = json.loads((self.path / "zarr.json").read_bytes())["attributes"][ATTRIBUTE]
            mine = self.provenance
            is_same = stored.get(IDENTITY) == mine.get(IDENTITY) and stored["plan"] == mine["plan"]
            if isinstance(self._group.store, ObjectWriter):
                self._group.store.look()
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            is_same = False
        if not is_same:
            raise self._vanished()
        self._stamp = stamp

    def _vanished(self) -> ResumeError:
        if isinstance(self.path, ObjectPath):
            return ResumeError(
                f"{self.path}: removed, or taken over by another process that resumes, finishes or replaces it; wait for that "
                f"one, or give {option('resume', True)} to take it back"
            )
        return ResumeError(
            f"{self.path}: removed, renamed or replaced while it was written; put it back and give {option('resume', True)}, "
            f"or give another {option('out')}"
        )

    def _remove_damaged(self) -> None:
        """Remove shards whose files are no whole shards, and let a store be finished again that lost some."""
        was_complete, lost = self.complete, []
        for level in range(len(self._arrays)):
            for index, state in self._states(level):
                if state is ShardState.WHOLE or (state is ShardState.MISSING and not was_complete):
                    continue
                lost.append((level, index, state))
            self._remove_partial(level)
        self.lost = len(lost)
        if was_complete and not lost:
            return
        if was_complete or self.provenance.get(IDENTITY) is None:
            self.mark_incomplete()
        for level, index, state in lost:
            if state is not ShardState.MISSING:
                remove_shard(shard_path(self.path, level, *index))
                self._written.set(level, index, is_there=False)

    def _states(self, level: int) -> Iterator[tuple[tuple[int, int], ShardState]]:
        """State of every shard of a level that this sink writes."""
        look, indices = partial(self._state, chunks_of(self._arrays[level]), level), self._own(level)
        if not isinstance(self.path, ObjectPath):
            yield from ((index, look(index)) for index in indices)
            return
        with ThreadPoolExecutor(_REQUESTS) as pool:  # and no request for shards that the list lacks
            while some := list(islice(indices, _AT_ONCE)):
                there = [index for index in some if self._is_written(level, index)]
                states = dict(zip(there, pool.map(look, there), strict=True))
                yield from ((index, states.get(index, ShardState.MISSING)) for index in some)

    def _state(self, chunks: int, level: int, index: tuple[int, int]) -> ShardState:
        return shard_state(shard_path(self.path, level, *index), chunks, self._mark)

    def _remove_partial(self, level: int) -> None:
        """Remove the files of a level that killed runs did not finish. An object store has none."""
        if isinstance(self.path, ObjectPath):
            return
        for leftover in (self.path / str(level)).rglob("*.partial"):
            if PARTIAL.fullmatch(leftover.name) and leftover.is_file():
                leftover.unlink(missing_ok=True)

    def _is_written(self, level: int, index: tuple[int, int]) -> bool:
        """Whether the shard exists: a regular file that is not empty, or an object."""
        return self._written.has(level, index)

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
        with self._lock_of_writing:
            self._writing.add(shard)
        try:
            self._write_shard(level, index, pixels, half)
        finally:
            with self._lock_of_writing:
                self._writing.remove(shard)
                is_last = self._grows_beyond(level, index) and all(
                    (level, *child) not in self._writing and self._is_written(level, child)
                    for child in self._children(level + 1, parent)
                )
        if is_last:
            self._write_with_ancestors(level + 1, parent, self._halved(level + 1, parent))

    def _grows_beyond(self, level: int, index: tuple[int, int]) -> bool:
        """Whether this sink writes the parent of a shard."""
        return level + 1 < len(self._arrays) and self._owns(level + 1, (index[0] // 2, index[1] // 2))

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
        except (
            Exception
        ) as error:  # Zarr decodes a shard at the image's border, for pixels beyond it, and it is damaged
            raise_unless_damage(error, array)
            remove_shard(shard_path(self.path, level, *index))
            array[(slice(None), *rows_and_columns)] = pixels
        self._written.set(level, index, is_there=True)

    def _read(self, level: int, index: tuple[int, int]) -> Array:
        """Pixels of a shard. Zarr reads a lost one as black, so its file must be there before and after."""
        try:
            pixels = read_shard(self._arrays[level], self._plan.grid(level).box(*index))
            problem = None if is_present(shard_path(self.path, level, *index)) else "missing"
        except OSError:
            raise
        except Exception as error:  # each codec has exceptions of its own
            raise_unless_damage(error, self._arrays[level])
            problem = reason_of(error)
        if problem is None:
            return pixels
        self._check_identity()
        raise ResumeError(damaged_shard(self.path, shard_path(self.path, level, *index), problem))
