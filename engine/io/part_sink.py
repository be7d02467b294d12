"""One part of a store that several processes write, each its own shards.

A part shares the lock of the store with the other parts, so that no render, repair or ``engine finish`` runs beside them. It
holds a lock of its own on a file in the folder of spilled tiles, which all parts share. A file is locked on NFS too, where
folders are not. Without any lock two processes of one part would write equal shards, each of them whole.
"""

from __future__ import annotations

import os
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
from engine.io.scratch import scratch_of
from engine.io.zarr_store import ZarrSink
from engine.plan.parts import Part, Shares
from engine.plan.plan import Plan
from engine.plan.writes import spans_of


class PartSink(ZarrSink):
    """The shards of one part, and those of the pyramid that follow from them alone; opened by ``join``.

    ``engine.finish`` makes the shards of the pyramid whose children belong to two parts.

    Attributes:
        part: the part.
    """

    def __init__(self, path: Place, plan: Plan, lock: Lock) -> None:
        super().__init__(path, plan, lock)
        self.part = Part(1, 1)
        self._writes = plan.writes()[:0]
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
        self._check_identity()
        self._complete_pyramid()
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
        lock = _lock(_lock_file(self.scratch, self.part), shared=shared)
        if lock is None:
            process = holder_of(self.path, self.provenance, self.part)
            name = "another process" if process is None else f"another process ({process})"
            raise ResumeError(f"{self.path}: part {self.part} is being rendered by {name}; wait for it")
        self._part_lock = lock
        self._writes = shares.writes(self._plan, self.part)

    def _owns(self, level: int, index: tuple[int, int]) -> bool:
        """Whether every pixel below a shard is of the part, and so all its children."""
        bounds = Box(0, 0, *self._plan.size)
        return self._writes.covers(self._plan.grid(level).box(*index).scale(1 << level).clip(bounds))

    def _own(self, level: int) -> Iterator[tuple[int, int]]:
        grid = self._plan.grid(level)
        met = spans_of(grid, (box.cover(1 << level) for box in self._writes.rectangles))
        indices = ((row, column) for row, spans in met.items() for span in spans for column in range(*span))
        return (index for index in indices if self._owns(level, index))

    def _remove_partial(self, level: int) -> None:
        """Remove the files of the part's shards that killed runs did not finish. An object store has none."""
        if isinstance(self.path, ObjectPath):
            return
        grid, rectangles = self._plan.grid(level), self._writes.rectangles
        for row in spans_of(grid, (box.cover(1 << level) for box in rectangles)):
            for leftover in (self.path / str(level) / "c" / "0" / str(row)).glob("*.partial"):
                column = leftover.name.partition(".")[0]
                if column.isdigit() and int(column) < grid.columns and self._owns(level, (row, int(column))):
                    leftover.unlink(missing_ok=True)


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
    lock = _lock(file)
    if lock is None:
        process = Lock.holder(file)
        name = "another process" if process is None else f"another process ({process})"
        raise ResumeError(f"{path}: is being rendered by the workers of {name}; wait for it")
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


def _lock(file: Path, *, shared: bool = False) -> Lock | None:
    """Lock on a file, which is made with its folder; None while another process holds it."""
    while True:
        with suppress(FileExistsError):
            os.mkdir(file.parent)
        with suppress(FileNotFoundError):  # another part has just ended, and removed the folder
            return Lock.take(file, shared=shared, makes_file=True)
