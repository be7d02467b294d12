"""The output of a render: a sharded OME-Zarr store whose pyramid grows with it.

Only whole shards are written, each to a temporary file that is renamed once it is on the disk. So a shard exists exactly
when it is whole, and its presence is the resume mark. Every chunk has a checksum. A shard of a pyramid level is computed from
its four children, read back as soon as they exist: the memory is that of one shard, whatever the canvas, and a killed run
leaves no state behind.

One process writes a store: it holds a lock on the folder. Where there are no locks (NFS, Windows), and against removal, the
store has a random identity until it is finished, which is looked at before every write. Parts of one render share the lock
(engine.io.part_sink).
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from engine.errors import EngineError, InputError, ResumeError, option
from engine.geometry import Box, Grid
from engine.io import ome
from engine.io.durable import DurableStore, open_root
from engine.io.files import (
    Lock,
    new_identity,
    remove_leftovers,
    sync_folder,
    temporary_name,
    temporary_names,
)
from engine.io.first_look import FIRST_LOOK
from engine.io.shards import (
    ShardState,
    chunks_of,
    is_present,
    raise_unless_damage,
    remove_shard,
    shard_path,
    shard_state,
)
from engine.pixels import PixelFormat
from engine.plan.plan import Plan, Sides, pyramid_of, sides_of

ATTRIBUTE = "ourgan"
"""Attribute of the group that holds the plan and the provenance."""

COMMAND = "command"
"""Entry of the provenance: words of the command that continues the store; removed at the end, since they name local files."""

PICTURE = "picture"
"""Entry of a working store's provenance: the name of its picture, and whether an existing one may be replaced."""

IDENTITY = "id"
"""Entry of the provenance: random digits of an unfinished store; removed at the end, so that equal renders are equal files."""

PARTS = "parts"
"""Entry of the provenance: how an unfinished store is divided into parts (``Shares``); removed at the end."""

Array = np.ndarray[Any, np.dtype[Any]]


class Sink(Protocol):
    """A destination of finished pixels."""

    def missing(self, writes: Iterable[Box] | None = None) -> Iterator[Box]:
        """Boxes that are not written yet, in the plan's order; ``writes``: boxes to look at in place of the plan's."""
        ...

    def write(self, box: Box, pixels: Array, half: Array | None = None) -> None:
        """Write [C, h, w] of ``box``, in the format of the plan; ``half``: the same halved, if it is known."""
        ...

    def finish(self) -> None:
        """Complete the output. Raises ResumeError while a box is missing."""
        ...


class ArraySink:
    """A small image in memory."""

    def __init__(self, plan: Plan) -> None:
        self.pixels: Array = np.zeros((plan.pixels.channels, *plan.size), plan.pixels.dtype)
        self._boxes = plan.writes()

    def missing(self, writes: Iterable[Box] | None = None) -> Iterator[Box]:
        """Every box of the plan, or of ``writes``."""
        return iter(self._boxes if writes is None else writes)

    def write(self, box: Box, pixels: Array, half: Array | None = None) -> None:
        """Write [C, h, w] of ``box``."""
        self.pixels[(slice(None), *box.slices)] = pixels

    def finish(self) -> None:
        """Nothing is left to do."""


class ZarrSink:
    """An OME-Zarr 0.5 store of one plan, opened by ``create`` or ``resume``.

    Attributes:
        path: folder of the store.
        lost: shards of a store marked complete that ``resume`` found missing, and of any store that it found damaged.
    """

    def __init__(self, path: Path, plan: Plan, lock: Lock) -> None:
        self.path = path
        self.lost = 0
        self._plan = plan
        self._lock = lock
        self._group = zarr.open_group(DurableStore(path), mode="r+")
        # Without this option a black shard would not be written, and existence is the resume mark.
        options = {"write_empty_chunks": True}
        self._arrays: list[Any] = [self._group[str(i)].with_config(options) for i in range(len(plan.pyramid))]  # type: ignore[union-attr,call-overload]
        self._stamp = _stamp(path)
        self._halves = _Halves()
        self._writing: set[tuple[int, int, int]] = set()
        """(level, row, column) of the shards that threads are writing."""
        self._lock_of_writing = threading.Lock()

    @classmethod
    def create(
        cls, path: Path, plan: Plan, provenance: dict[str, Any], *, overwrite: bool = False, shared: bool = False
    ) -> ZarrSink:
        """Create a new store.

        Args:
            path: folder of the store.
            plan: the plan of the render.
            provenance: JSON values to record beside the plan.
            overwrite: replace an existing store of this engine, or an empty folder. The old store is kept under another name
                (``replaced``) until the new one is complete.
            shared: let parts of the render lock the store at the same time.

        Raises:
            ResumeError: ``path`` exists and ``overwrite`` is false, it is no store of this engine, or it is being written.
            InputError: the store cannot be written.
        """
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
            group = zarr.open_group(DurableStore(part), mode="w-", zarr_format=3)
            for level, size in enumerate(plan.pyramid):
                _create_level(group, level, size, plan)
            group.attrs.update(
                {
                    "ome": ome.image_metadata(path.stem, len(plan.pyramid), (plan.roi.y0, plan.roi.x0), plan.pixels),
                    ATTRIBUTE: {"complete": False, IDENTITY: new_identity(), "plan": plan.to_json(), **provenance},
                }
            )
            _put_in_place(part, path, replaces=old is not None)
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
        _forget_replaced(path)
        remove_leftovers(path)
        _remove_scratch(spilled)  # of earlier stores: parts of this one may have begun since
        return cls(path, plan, lock)

    @classmethod
    def resume(cls, path: Path, plan: Plan, *, shared: bool = False) -> ZarrSink:
        """Open a store to finish it, and remove shards whose files are damaged (``lost``).

        Args:
            path: folder of the store.
            plan: its plan.
            shared: beside processes that hold parts of it.

        Raises:
            ResumeError: the store has another plan, is being written, is damaged in its metadata, or is no store.
        """
        sink = cls._open(path, plan, shared=shared)
        try:
            sink._remove_damaged()
        except BaseException:
            sink.close()
            raise
        return sink

    @classmethod
    def _open(cls, path: Path, plan: Plan, *, shared: bool = False) -> Self:
        """Lock and open a store of this plan. Raises ResumeError as ``resume``."""
        _check_plan(path, plan)
        lock = lock_store(path, shared=shared)
        try:
            _check_plan(path, plan)  # once more: another process may have replaced it before the lock
            return cls._opened(path, plan, lock)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def _opened(cls, path: Path, plan: Plan, lock: Lock) -> Self:
        try:
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
        return next(iter(_replaced(self.path)), None)

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
        for old in _replaced(self.path):
            with suppress(ResumeError):  # somebody put a file into it
                remove_store(old)
        remove_leftovers(self.path)
        _remove_scratch(temporary_names(self.path, "scratch"))
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
        self._stamp = _stamp(self.path)

    def _check_identity(self) -> None:
        """Raise ResumeError unless the folder of this name is still this store: by its root's inode and time, or its id."""
        try:
            stamp = _stamp(self.path)
            if stamp == self._stamp:
                return
            stored = json.loads((self.path / "zarr.json").read_bytes())["attributes"][ATTRIBUTE]
            mine = self.provenance
            is_same = stored.get(IDENTITY) == mine.get(IDENTITY) and stored["plan"] == mine["plan"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            is_same = False
        if not is_same:
            raise self._vanished()
        self._stamp = stamp

    def _vanished(self) -> ResumeError:
        return ResumeError(
            f"{self.path}: removed, renamed or replaced while it was written; put it back and give {option('resume', True)}, "
            f"or give another {option('out')}"
        )

    def _remove_damaged(self) -> None:
        """Remove shards whose files are no whole shards, and let a store be finished again that lost some."""
        was_complete, lost = self.complete, []
        for level, array in enumerate(self._arrays):
            chunks = chunks_of(array)
            for index in self._own(level):
                path = shard_path(self.path, level, *index)
                state = shard_state(path, chunks)
                if state is ShardState.WHOLE or (state is ShardState.MISSING and not was_complete):
                    continue
                lost.append((path, state))
            self._remove_partial(level)
        self.lost = len(lost)
        if was_complete and not lost:
            return
        if was_complete or self.provenance.get(IDENTITY) is None:
            self.mark_incomplete()
        for path, state in lost:
            if state is not ShardState.MISSING:
                remove_shard(path)

    def _remove_partial(self, level: int) -> None:
        """Remove the files of a level that killed runs did not finish."""
        for leftover in (self.path / str(level)).rglob("*.partial"):
            if _PARTIAL.fullmatch(leftover.name) and leftover.is_file():
                leftover.unlink(missing_ok=True)

    def _is_written(self, level: int, index: tuple[int, int]) -> bool:
        """Whether the shard exists: a regular file that is not empty."""
        return is_present(shard_path(self.path, level, *index))

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

    def _read(self, level: int, index: tuple[int, int]) -> Array:
        """Pixels of a shard. Zarr reads a lost one as black, so its file must be there before and after."""
        try:
            pixels = read_shard(self._arrays[level], self._plan.grid(level).box(*index))
            problem = None if self._is_written(level, index) else "missing"
        except OSError:
            raise
        except Exception as error:  # each codec has exceptions of its own
            raise_unless_damage(error, self._arrays[level])
            problem = reason_of(error)
        if problem is None:
            return pixels
        self._check_identity()
        raise ResumeError(damaged_shard(self.path, shard_path(self.path, level, *index), problem))


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


def children(below: Grid, grid: Grid, index: tuple[int, int]) -> list[tuple[int, int]]:
    """Indices in ``below`` of the shards that a shard of ``grid`` halves."""
    return list(below.indices(grid.box(*index).scale(2).clip(below.bounds)))


def read_shard(array: Any, box: Box) -> Array:  # noqa: ANN401 (zarr's type)
    """Pixels of a shard, [C, h, w]."""
    pixels: Array = array[(slice(None), *box.slices)]
    return pixels


def reason_of(error: Exception) -> str:
    """Reason for which a shard cannot be read, in two words."""
    return "wrong checksum" if "checksum" in str(error).lower() else "not decodable"


def damaged_shard(store: Path, shard: Path, problem: str) -> str:
    """Message about a shard that cannot be read."""
    return (
        f"{shard}: damaged shard ({problem}); run engine check {store} --repair, then repeat the store's engine render "
        f"with {option('resume', True)}"
    )


def check_array(where: str, array: Any, size: Sides, shard: Sides, chunk: Sides, pixels: PixelFormat) -> None:  # noqa: ANN401
    """Raise InputError unless an array's metadata is as ``create`` writes it; earlier stores have no checksums.

    Args:
        where: name of the array for the message.
        array: array of Zarr.
        size: (height, width) of the level.
        shard, chunk: (height, width) in pixels.
    """
    codec = array.metadata.codecs[0].to_dict()
    settings = codec.get("configuration", {})
    inner = [c["name"] for c in settings.get("codecs", ())]
    index = [c["name"] for c in settings.get("index_codecs", ())]
    is_ours = (
        array.shape == (pixels.channels, *size)
        and array.shards == (pixels.channels, *shard)
        and array.chunks == (pixels.channels, *chunk)
        and array.dtype == pixels.dtype
        and len(array.metadata.codecs) == 1
        and inner in (["bytes", "blosc"], ["bytes", "blosc", "crc32c"])
        and index == ["bytes", "crc32c"]
        and str(settings.get("index_location")) == "end"
    )
    if not is_ours:
        raise InputError(f"{where}: its zarr.json does not fit the plan of the store; give {option('overwrite', True)}")


def half_of(half: Array | None, part: Box, whole: Box) -> Array | None:
    """The half of a part of an image; None where there is none, or where a pixel of it would mix two parts.

    Args:
        half: the halved image, [C, ceil(h / 2), ceil(w / 2)].
        part, whole: pixels of the part and of the image.
    """
    inside = part.relative_to(whole)
    if half is None or inside.y0 % 2 or inside.x0 % 2:
        return None
    if (inside.y1 % 2 and part.y1 < whole.y1) or (inside.x1 % 2 and part.x1 < whole.x1):
        return None
    return half[(slice(None), *inside.cover(2).slices)]


def halve(pixels: Array) -> Array:
    """2x2 average of uint8 or uint16 [C, h, w], halves rounded up; an odd last row or column is averaged with itself."""
    _, height, width = pixels.shape
    if height % 2 or width % 2:
        pixels = np.pad(pixels, ((0, 0), (0, height % 2), (0, width % 2)), mode="edge")
    rows: Any = pixels[:, ::2].astype(np.uint16 if pixels.dtype == np.uint8 else np.uint32) + pixels[:, 1::2]
    mean: Array = ((rows[:, :, ::2] + rows[:, :, 1::2] + 2) >> 2).astype(pixels.dtype)
    return mean


def check_absent(path: Path) -> None:
    """Raise ResumeError when ``path`` exists."""
    if os.path.lexists(path):
        raise ResumeError(
            f"{path}: exists; give {option('resume', True)} to finish it, {option('overwrite', True)} to replace it, "
            f"or another {option('out')}"
        )


def stored_scratch(path: Path) -> Path:
    """Folder for working data of an unfinished store: tiles that exceed the memory or that parts share, and statistics."""
    return scratch_of(path, stored_provenance(path) or {})


def scratch_of(path: Path, provenance: dict[str, Any]) -> Path:
    """The same, by the provenance of the store."""
    return temporary_name(path, "scratch", str(provenance.get(IDENTITY) or ""))


def stored_provenance(path: Path) -> dict[str, Any] | None:
    """Plan and provenance of an existing store, or None where there is no store of this engine."""
    if not (path / "zarr.json").is_file():
        return None
    try:
        attributes: Any = open_root(path).attrs.get(ATTRIBUTE)
        return None if attributes is None else dict(attributes)
    except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError):
        return None


def stored_plan(path: Path) -> dict[str, Any] | None:
    """The plan of an existing store, or None where there is no store of this engine."""
    plan = (stored_provenance(path) or {}).get("plan")
    return dict(plan) if isinstance(plan, dict) else None


def stored_sizes(plan: dict[str, Any]) -> tuple[tuple[int, int], ...]:
    """Sizes of the levels of a stored plan. Raises KeyError, TypeError or ValueError where it is damaged."""
    roi = plan["roi"]
    return pyramid_of((roi["y1"] - roi["y0"], roi["x1"] - roi["x0"]), sides_of(plan["chunk"]))


def check_replaceable(path: Path) -> None:
    """Raise ResumeError unless ``path`` is a store of this engine without files of others, or an empty folder."""
    other = f"give another {option('out')}, or remove it"
    if not path.is_dir() or path.is_symlink():
        raise ResumeError(f"{path}: exists and is not a Zarr store of this engine; {other}")
    if not any(path.iterdir()):
        return
    if stored_provenance(path) is None:
        raise ResumeError(f"{path}: exists and is not a Zarr store of this engine, or is damaged; {other}")
    if (foreign := next(_foreign_files(path), None)) is not None:
        raise ResumeError(f"{path}: holds {foreign.relative_to(path)}, which no render wrote; move it, or {other}")


def remove_store(path: Path) -> None:
    """Delete a store of this engine or an empty folder. Raises ResumeError for anything else of that name."""
    check_replaceable(path)
    # Moved first: a half-deleted store under the final name would be neither a store nor removable.
    moved = path.rename(temporary_name(path, "part"))
    try:
        shutil.rmtree(moved)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(moved)) from error


def lock_store(path: Path, *, shared: bool = False) -> Lock:
    """Lock a store for writing; ``shared``: beside other parts. Raises ResumeError while another process writes it."""
    lock = Lock.take(path, shared=shared)
    if lock is None:
        process = Lock.holder(path)
        name = "another process" if process is None else f"another process ({process})"
        raise ResumeError(f"{path}: is being written by {name}; wait for it, or give another {option('out')}")
    return lock


def _stamp(path: Path) -> tuple[int, ...]:
    """Inode, time and size of a store's root metadata. Raises OSError."""
    status = os.stat(path / "zarr.json")
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def _check_plan(path: Path, plan: Plan) -> None:
    """Raise ResumeError unless ``path`` is a store of this plan."""
    stored, overwrite = stored_plan(path), option("overwrite", True)
    if stored is None:
        is_empty = path.is_dir() and not any(path.iterdir())
        advice = f", or {overwrite} to replace it" if is_empty else ", or remove it"
        raise ResumeError(f"{path}: not a store of this engine; give another {option('out')}{advice}")
    if differences := plan.differences(stored):
        raise ResumeError(
            f"{path}: made with another plan ({'; '.join(differences)}); give the same options, or {overwrite}"
        )


def _put_in_place(part: Path, path: Path, *, replaces: bool) -> None:
    """Give a new store its name; ``replaces``: keep the old one of that name, which is locked, aside."""
    aside = None
    if replaces:
        if any(path.iterdir()):
            aside = path.rename(temporary_name(path, "old"))
        else:
            path.rmdir()
    try:
        part.rename(path)
    except OSError as error:
        if aside is not None and not os.path.lexists(path):
            aside.rename(path)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            check_absent(path)
        raise
    sync_folder(path.parent)


def _replaced(path: Path) -> list[Path]:
    """Stores that were replaced under this name and are kept."""
    return [old for old in temporary_names(path, "old") if old.is_dir() and stored_provenance(old) is not None]


def _forget_replaced(path: Path) -> None:
    """Keep one replaced store: the latest that is complete, or else the latest."""
    kept = sorted(
        _replaced(path), key=lambda p: ((stored_provenance(p) or {}).get("complete") is True, p.stat().st_mtime)
    )
    for old in kept[:-1]:
        with suppress(ResumeError):
            remove_store(old)


def _remove_scratch(folders: Iterable[Path]) -> None:
    """Remove spilled tiles, whose writers have ended."""
    for scratch in folders:
        shutil.rmtree(scratch, ignore_errors=True)


_PARTIAL = re.compile(r"(\d+|zarr|zarr\.json)\.[0-9a-f]+\.partial")
"""Temporary files of this engine and of Zarr."""


def _foreign_files(path: Path) -> Iterator[Path]:
    """Files and links of a folder that no store of this engine has."""
    for folder, names, files in os.walk(path):
        here = Path(folder)
        parts = here.relative_to(path).parts
        numbers = parts and parts[0].isdigit() and parts[1:2] in ((), ("c",)) and all(p.isdigit() for p in parts[2:])
        for name in files:
            is_metadata = name == "zarr.json" and len(parts) < 2
            is_shard = name.isdigit() and len(parts) == 4
            if not (
                (numbers or not parts) and (is_metadata or is_shard or _PARTIAL.fullmatch(name) or name == ".DS_Store")
            ):
                yield here / name
        yield from (here / name for name in names if (here / name).is_symlink())


def _create_level(group: zarr.Group, level: int, size: tuple[int, int], plan: Plan) -> None:
    pixels, typesize = plan.pixels, plan.pixels.depth // 8
    group.create_array(
        str(level),
        shape=(pixels.channels, *size),
        shards=(pixels.channels, *plan.shard),
        chunks=(pixels.channels, *plan.chunk),
        dtype=pixels.dtype,
        compressors=[BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle", typesize=typesize), Crc32cCodec()],
        dimension_names=ome.AXES,
        fill_value=0,
    )
