"""One part of a store that several processes write, each its own shards.

A part shares the lock of the store with the other parts, so that no render, repair or ``engine finish`` runs beside them. It
holds a lock of its own on a file in the folder of spilled tiles, which all parts share. A file is locked on NFS too, where
folders are not. Without any lock two processes of one part would write equal shards, each of them whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from engine.errors import ResumeError, option
from engine.geometry import Box
from engine.io.files import Lock
from engine.io.objects import ObjectPath, Place
from engine.io.provenance import PARTS
from engine.io.pyramid_writer import OwnShards
from engine.io.scratch import scratch_of
from engine.io.store_lock import lock_file, writer_of
from engine.io.zarr_store import ZarrSink
from engine.plan.parts import Part, Shares
from engine.plan.plan import Plan
from engine.plan.writes import Writes, spans_of


class PartSink(ZarrSink):
    """The shards of one part, and those of the pyramid that follow from them alone; opened by ``join``.

    ``engine.finish`` makes the shards of the pyramid whose children belong to two parts.

    Attributes:
        part: the part.
    """

    def __init__(self, path: Place, plan: Plan, lock: Lock) -> None:
        super().__init__(path, plan, lock)
        self.part = Part(1, 1)
        self._own(plan.writes()[:0])
        self._part_lock: Lock | None = None

    @classmethod
    def join(cls, path: Place, plan: Plan, part: Part, *, again: bool = False) -> PartSink:
        """Open a store to write a part of it, and remove the part's damaged shards (``lost``).

        A store that is complete has nothing to be written.

        Args:
            path: folder or URL of the store.
            plan: its plan.
            part: the part.
            again: whoever gives out the parts may give this one to another process while the first one is stopped or cut off.
                Both may then write it: their shards are equal, and each is whole.

        Raises:
            ResumeError: as ``resume``; the store has other parts or none, or another process renders this part.
        """
        sink = cls._open(path, plan, shared=True)
        sink.part = part
        try:
            if not sink.complete:
                sink._take(shared=again)
                sink._remove_damaged()
        except BaseException:
            sink.close()
            raise
        return sink

    @property
    def size(self) -> int:
        """Number of the part's shards in the full image."""
        return sum(self._plan.grid().covered(box).area for box in self._writes.rectangles)

    @property
    def area(self) -> int:
        return self._writes.area

    def missing(self, writes: Iterable[Box] | None = None) -> Iterator[Box]:
        """Boxes of the part with a missing shard, in the plan's order: a part is never cut otherwise."""
        return super().missing(self._writes)

    def finish(self) -> None:
        """Add the part's shards of the pyramid that a killed run left out. Tiles of inner stages stay for the other parts;
        those of an object store for the ones that run on this machine.

        Raises:
            ResumeError: a shard of the part is missing, or as ``write`` does.
        """
        self._root.check()
        self._pyramid.complete()
        scratch = self.scratch
        self.close()
        if isinstance(self.path, ObjectPath) and not any(map(_is_held, scratch.glob("part-*.lock"))):
            shutil.rmtree(scratch, ignore_errors=True)

    def close(self) -> None:
        """Let other processes write the part, and the store when all parts are closed."""
        lock, self._part_lock = self._part_lock, None
        if lock is not None:
            with suppress(OSError):  # tiles stay, and locks of others
                _lock_file(self.scratch, self.part).unlink(missing_ok=True)
                self.scratch.rmdir()
            lock.release()
        super().close()

    def _take(self, *, shared: bool) -> None:
        """Lock the part, and find its writes."""
        shares = shares_of(self.path, self._plan, self.provenance)
        if shares is None:
            raise ResumeError(
                f"{self.path}: begun as a whole, not in parts; give {option('resume', True)} in place of {option('part')}"
            )
        if shares.count != self.part.count:
            raise ResumeError(
                f"{self.path}: begun in another number of parts ({shares.count}, not {self.part.count}); give "
                f"{option('part', f'1/{shares.count}')} and so on, or {option('resume', True)} alone to finish it in one run"
            )
        file = _lock_file(self.scratch, self.part)
        lock = lock_file(file, shared=shared)
        if lock is None:
            raise ResumeError(f"{self.path}: part {self.part} is being rendered by {writer_of(file)}; wait for it")
        self._part_lock = lock
        self._own(shares.writes(self._plan, self.part))

    def _own(self, writes: Writes) -> None:
        """Write these boxes, and the shards of the pyramid that follow from them alone."""
        self._writes = writes
        self._pyramid.own = _PartShards(self._plan, writes)


class _PartShards(OwnShards):
    """The shards of one part."""

    def __init__(self, plan: Plan, writes: Writes) -> None:
        super().__init__(plan)
        self._writes = writes

    def has(self, level: int, index: tuple[int, int]) -> bool:
        """Whether every pixel below a shard is of the part, and so all its children."""
        bounds = Box(0, 0, *self._plan.size)
        return self._writes.covers(self._plan.grid(level).box(*index).scale(1 << level).clip(bounds))

    def indices(self, level: int) -> Iterator[tuple[int, int]]:
        indices = (
            (row, column) for row, spans in self._met(level).items() for span in spans for column in range(*span)
        )
        return (index for index in indices if self.has(level, index))

    def partial_files(self, store: Path, level: int) -> Iterator[Path]:
        grid = self._plan.grid(level)
        for row in self._met(level):
            for file in (store / str(level) / "c" / "0" / str(row)).glob("*.partial"):
                column = file.name.partition(".")[0]
                if column.isdigit() and int(column) < grid.columns and self.has(level, (row, int(column))):
                    yield file

    def _met(self, level: int) -> dict[int, list[tuple[int, int]]]:
        """Ranges of columns, by row, of the shards of a level that the part meets."""
        return spans_of(self._plan.grid(level), (box.cover(1 << level) for box in self._writes.rectangles))


def shares_of(path: Place, plan: Plan, provenance: dict[str, Any]) -> Shares | None:
    """How an unfinished store is divided into parts; None if it is not. Raises ResumeError for damage."""
    if (stored := provenance.get(PARTS)) is None:
        return None
    try:
        return Shares.from_json(stored, plan)
    except ValueError as error:
        raise ResumeError(
            f"{path}: damaged, its parts do not fit its plan; give {option('resume', True)} alone"
        ) from error


def holder_of(path: Place, provenance: dict[str, Any], part: Part) -> int | None:
    """Process that renders a part of a store, as ``Lock.holder`` tells it."""
    return Lock.holder(_lock_file(scratch_of(path, provenance), part))


def _lock_file(scratch: Path, part: Part) -> Path:
    """File that the process of a part locks."""
    return scratch / f"part-{part.number}-of-{part.count}.lock"


def lock_parts(path: Place, provenance: dict[str, Any]) -> Lock:
    """Lock of the one process that gives out the parts of a store. Raises ResumeError while another one does."""
    file = scratch_of(path, provenance) / _GIVER
    lock = lock_file(file)
    if lock is None:
        raise ResumeError(f"{path}: is being rendered by the workers of {writer_of(file)}; wait for it")
    return lock


def unlock_parts(path: Place, provenance: dict[str, Any], lock: Lock) -> None:
    """Release the lock of ``lock_parts`` and remove its file."""
    file = scratch_of(path, provenance) / _GIVER
    with suppress(OSError):  # tiles stay
        file.unlink(missing_ok=True)
        file.parent.rmdir()
    lock.release()


_GIVER = "parts.lock"
"""File that the process which gives out all parts locks."""


def _is_held(file: Path) -> bool:
    """Whether a process holds the lock on a file."""
    with suppress(OSError):
        lock = Lock.take(file)
        if lock is None:
            return True
        lock.release()
    return False
