"""Where finished pixels go: a sharded OME-Zarr store whose pyramid grows with it.

Only whole shards are written, each to a temporary file that is renamed, so a shard exists exactly when it is whole: its
presence is the resume mark. A shard of a pyramid level is made when its four children exist, by reading them back; the
memory is therefore that of one shard, whatever the canvas, and a killed run leaves nothing to remember.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import zarr
from zarr.codecs import BloscCodec

from engine.errors import InputError, ResumeError
from engine.geometry import Box
from engine.io import ome
from engine.plan.plan import Plan

ATTRIBUTE = "ourgan"

Array = np.ndarray[Any, np.dtype[Any]]


class Sink(Protocol):
    """Takes finished pixels. ``missing`` yields the boxes that are still to be written, in order."""

    def missing(self) -> Iterator[Box]: ...

    def write(self, box: Box, pixels: Array) -> None: ...

    def finish(self) -> None: ...


class ZarrSink:
    """An OME-Zarr 0.5 store of one plan. Use ``create`` or ``resume``."""

    def __init__(self, path: Path, plan: Plan, group: zarr.Group) -> None:
        self.path = path
        self._plan = plan
        self._group = group
        # Without this a black shard would not be written, and existence is the resume mark.
        options = {"write_empty_chunks": True}
        self._levels: list[Any] = [group[str(i)].with_config(options) for i in range(len(plan.pyramid))]  # type: ignore[union-attr,call-overload]

    @classmethod
    def create(cls, path: Path, plan: Plan, provenance: dict[str, Any], overwrite: bool = False) -> ZarrSink:
        """Make a new store. Raises InputError when something exists at ``path`` and ``overwrite`` is false."""
        if path.exists() and not overwrite:
            raise ResumeError(
                f"{path}: exists; give --resume to finish it, --overwrite to replace it, or another --out"
            )
        # Built under another name: a store of the final name has all of its arrays and its plan, at any death.
        part = path.with_name(path.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        if path.exists():
            _remove_store(path)
        try:
            group = zarr.open_group(part, mode="w-", zarr_format=3)
            for level, size in enumerate(plan.pyramid):
                _create_level(group, level, size, plan)
            group.attrs.update(
                {
                    "ome": ome.image_metadata(path.stem, len(plan.pyramid), (plan.roi.y0, plan.roi.x0)),
                    ATTRIBUTE: {"complete": False, "plan": plan.to_json(), **provenance},
                }
            )
            part.rename(path)
        except OSError as error:
            shutil.rmtree(part, ignore_errors=True)
            raise InputError(f"{path}: cannot be made ({error.strerror or error}); choose another --out") from error
        return cls(path, plan, zarr.open_group(path, mode="r+"))

    @classmethod
    def resume(cls, path: Path, plan: Plan) -> ZarrSink:
        """Open a store to finish it. Raises ResumeError when it is another plan's."""
        stored = stored_plan(path)
        if stored is None:
            raise ResumeError(f"{path}: not a store of this engine; give another --out, or --overwrite to replace it")
        if differences := plan.differences(stored):
            raise ResumeError(
                f"{path}: made with another plan ({'; '.join(differences)}); give the same options, or --overwrite"
            )
        for leftover in path.rglob("*.partial"):
            leftover.unlink()
        try:
            return cls(path, plan, zarr.open_group(path, mode="r+"))
        except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError) as error:
            reason = " ".join(str(error).split())
            raise ResumeError(f"{path}: damaged, an array cannot be opened ({reason}); use --overwrite") from error

    @property
    def complete(self) -> bool:
        return bool(self.facts.get("complete"))

    @property
    def facts(self) -> dict[str, Any]:
        """What the store says of itself besides its image: its plan, where it comes from, what was noted."""
        attributes: Any = self._group.attrs[ATTRIBUTE]
        return dict(attributes)

    def note(self, facts: dict[str, Any]) -> None:
        """Record something that became known while rendering."""
        self._group.attrs[ATTRIBUTE] = {**self.facts, **facts}

    def missing(self) -> Iterator[Box]:
        for box in self._plan.writes():
            if any(not self._has(0, index) for index in self._plan.grid().indices(box)):
                yield box

    def write(self, box: Box, pixels: Array) -> None:
        """``pixels`` uint8 [3, h, w] of ``box``, which is a whole number of shards or touches the border."""
        for index in self._plan.grid().indices(box):
            shard = self._plan.grid().box(*index)
            rows, columns = shard.relative_to(box).slices
            self._levels[0][(slice(None), *shard.slices)] = pixels[:, rows, columns]
            self._grow(1, (index[0] // 2, index[1] // 2))

    def finish(self) -> None:
        """Mark the store complete, after making what a killed run left out of the pyramid."""
        for level in range(len(self._levels)):
            for index in self._plan.grid(level).indices():
                if not self._has(level, index):
                    if level == 0:
                        raise ResumeError(f"{self.path}: shard {index} is missing; render again with --resume")
                    self._make(level, index)
        if self.complete:
            return
        os.sync()  # before "complete" is written, everything it speaks of is on the disk
        self.note({"complete": True})

    def _has(self, level: int, index: tuple[int, int]) -> bool:
        """An empty file is what a loss of power can leave of a shard that was renamed but not yet on the disk."""
        shard = self.path / str(level) / "c" / "0" / str(index[0]) / str(index[1])
        try:
            return shard.stat().st_size > 0
        except FileNotFoundError:
            return False

    def _children(self, level: int, index: tuple[int, int]) -> list[tuple[int, int]]:
        below = self._plan.grid(level - 1)
        box = self._plan.grid(level).box(*index).scale(2).clip(below.bounds)
        return list(below.indices(box))

    def _grow(self, level: int, index: tuple[int, int]) -> None:
        """Make the shard of ``level`` if its last child has just appeared, and so on upwards."""
        if level < len(self._levels) and all(self._has(level - 1, child) for child in self._children(level, index)):
            self._make(level, index)
            self._grow(level + 1, (index[0] // 2, index[1] // 2))

    def _make(self, level: int, index: tuple[int, int]) -> None:
        box = self._plan.grid(level).box(*index)
        parent = np.empty((3, *box.shape), np.uint8)
        for child in self._children(level, index):
            source = self._plan.grid(level - 1).box(*child)
            rows, columns = source.cover(2).relative_to(box).slices
            parent[:, rows, columns] = halve(self._levels[level - 1][(slice(None), *source.slices)])
        self._levels[level][(slice(None), *box.slices)] = parent


def halve(pixels: Array) -> Array:
    """2x2 average of uint8 [C, h, w], halves rounded up; an odd last row or column is averaged with itself."""
    _, height, width = pixels.shape
    if height % 2 or width % 2:
        pixels = np.pad(pixels, ((0, 0), (0, height % 2), (0, width % 2)), mode="edge")
    rows = pixels[:, ::2].astype(np.uint16) + pixels[:, 1::2]
    mean: Array = ((rows[:, :, ::2] + rows[:, :, 1::2] + 2) >> 2).astype(np.uint8)
    return mean


def stored_plan(path: Path) -> dict[str, Any] | None:
    """The plan of an existing store, or None when there is no store of ours."""
    if not (path / "zarr.json").is_file():
        return None
    try:
        attributes: Any = zarr.open_group(path, mode="r").attrs.get(ATTRIBUTE)
        return None if attributes is None else dict(attributes["plan"])
    except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError):
        return None


def _create_level(group: zarr.Group, level: int, size: tuple[int, int], plan: Plan) -> None:
    group.create_array(
        str(level),
        shape=(3, *size),
        shards=(3, plan.shard, plan.shard),
        chunks=(3, plan.chunk, plan.chunk),
        dtype=np.uint8,
        compressors=BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle", typesize=1),
        dimension_names=ome.AXES,
        fill_value=0,
    )


def _remove_store(path: Path) -> None:
    """Delete a store, but only something that is one: never a folder of the user's that happens to have the name."""
    if path.is_dir() and not path.is_symlink() and ((path / "zarr.json").is_file() or not any(path.iterdir())):
        # Moved first: half a store under the final name would be neither a store nor removable.
        shutil.rmtree(path.rename(path.with_name(path.name + ".part")))
        return
    raise ResumeError(f"{path}: exists and is not a Zarr store; give another --out or remove it")
