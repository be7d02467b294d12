"""The output of a render: a sharded OME-Zarr store whose pyramid grows with it.

Only whole shards are written, each to a temporary file that is renamed. So a shard exists exactly when it is whole, and its
presence is the resume mark. A shard of a pyramid level is computed from its four children, read back as soon as they exist:
the memory is that of one shard, whatever the canvas, and a killed run leaves no state behind.
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

from engine.errors import InputError, ResumeError, option
from engine.geometry import Box
from engine.io import ome
from engine.plan.plan import Plan

ATTRIBUTE = "ourgan"
"""Attribute of the group that holds the plan and the provenance."""

COMMAND = "command"
"""Entry of the provenance: words of the command that continues the store; removed at the end, since they name local files."""

Array = np.ndarray[Any, np.dtype[Any]]


class Sink(Protocol):
    """A destination of finished pixels."""

    def missing(self) -> Iterator[Box]:
        """Boxes that are not written yet, in the plan's order."""
        ...

    def write(self, box: Box, pixels: Array) -> None:
        """Write uint8 [3, h, w] of ``box``."""
        ...

    def finish(self) -> None:
        """Complete the output. Raises ResumeError while a box is missing."""
        ...


class ArraySink:
    """A small image in memory."""

    def __init__(self, plan: Plan) -> None:
        self.pixels: Array = np.zeros((3, *plan.size), np.uint8)
        self._boxes = list(plan.writes())

    def missing(self) -> Iterator[Box]:
        """Every box of the plan."""
        return iter(self._boxes)

    def write(self, box: Box, pixels: Array) -> None:
        """Write uint8 [3, h, w] of ``box``."""
        self.pixels[(slice(None), *box.slices)] = pixels

    def finish(self) -> None:
        """Nothing is left to do."""


class ZarrSink:
    """An OME-Zarr 0.5 store of one plan, opened by ``create`` or ``resume``."""

    def __init__(self, path: Path, plan: Plan, group: zarr.Group) -> None:
        self.path = path
        self._plan = plan
        self._group = group
        # Without this option a black shard would not be written, and existence is the resume mark.
        options = {"write_empty_chunks": True}
        self._arrays: list[Any] = [group[str(i)].with_config(options) for i in range(len(plan.pyramid))]  # type: ignore[union-attr,call-overload]

    @classmethod
    def create(cls, path: Path, plan: Plan, provenance: dict[str, Any], *, overwrite: bool = False) -> ZarrSink:
        """Create a new store.

        Args:
            path: folder of the store.
            plan: the plan of the render.
            provenance: JSON values to record beside the plan.
            overwrite: replace an existing store, or an empty folder.

        Raises:
            ResumeError: ``path`` exists and ``overwrite`` is false, or it is no Zarr store.
            InputError: the store cannot be written.
        """
        if not overwrite:
            check_absent(path)
        # The store is built under another name, so that one of the final name has all its arrays and its plan.
        part = path.with_name(path.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        if path.exists():
            remove_store(path)
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
            raise InputError(
                f"{path}: cannot be created ({error.strerror or error}); choose another {option('out')}"
            ) from error
        return cls(path, plan, zarr.open_group(path, mode="r+"))

    @classmethod
    def resume(cls, path: Path, plan: Plan) -> ZarrSink:
        """Open a store to finish it. Raises ResumeError when it has another plan, is damaged, or is no store."""
        stored, overwrite = stored_plan(path), option("overwrite", True)
        if stored is None:
            raise ResumeError(
                f"{path}: not a store of this engine; give another {option('out')}, or {overwrite} to replace it"
            )
        if differences := plan.differences(stored):
            raise ResumeError(
                f"{path}: made with another plan ({'; '.join(differences)}); give the same options, or {overwrite}"
            )
        for leftover in path.rglob("*.partial"):
            leftover.unlink()
        try:
            return cls(path, plan, zarr.open_group(path, mode="r+"))
        except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError) as error:
            raise ResumeError(f"{path}: damaged, a level's zarr.json cannot be read; give {overwrite}") from error

    @property
    def complete(self) -> bool:
        """Whether ``finish`` marked the store complete."""
        return bool(self.provenance.get("complete"))

    @property
    def is_finished(self) -> bool:
        """Whether every shard of the full-size image is written; ``finish`` may still have to complete the pyramid."""
        return next(self.missing(), None) is None

    @property
    def provenance(self) -> dict[str, Any]:
        """The plan, the provenance of the render, and later notes."""
        attributes: Any = self._group.attrs[ATTRIBUTE]
        return dict(attributes)

    def note(self, values: dict[str, Any]) -> None:
        """Add values, measured while rendering, to the provenance."""
        self._group.attrs[ATTRIBUTE] = {**self.provenance, **values}

    def missing(self) -> Iterator[Box]:
        """Boxes of the plan with a missing shard, in the plan's order."""
        for box in self._plan.writes():
            if any(not self._is_written(0, index) for index in self._plan.grid().indices(box)):
                yield box

    def write(self, box: Box, pixels: Array) -> None:
        """Write uint8 [3, h, w] of ``box``, a whole number of shards (cut by the image's border), and grow the pyramid."""
        for index in self._plan.grid().indices(box):
            shard = self._plan.grid().box(*index)
            rows, columns = shard.relative_to(box).slices
            self._arrays[0][(slice(None), *shard.slices)] = pixels[:, rows, columns]
            self._extend_pyramid(1, (index[0] // 2, index[1] // 2))

    def finish(self) -> None:
        """Add the shards of the pyramid that a killed run left out, and mark the store complete.

        Raises:
            ResumeError: a shard of the full-size image is missing.
        """
        for level in range(len(self._arrays)):
            for index in self._plan.grid(level).indices():
                if not self._is_written(level, index):
                    if level == 0:
                        resume = option("resume", True)
                        box = self._plan.grid(level).box(*index)
                        raise ResumeError(f"{self.path}: the shard at {box} is missing; render again with {resume}")
                    self._write_halved(level, index)
        if self.complete:
            return
        os.sync()  # every shard is on the disk before the store is marked complete
        finished = {key: value for key, value in self.provenance.items() if key != COMMAND}
        self._group.attrs[ATTRIBUTE] = {**finished, "complete": True}

    def _is_written(self, level: int, index: tuple[int, int]) -> bool:
        """Whether the shard exists. A loss of power can leave an empty file of one that was renamed but not on the disk."""
        shard = self.path / str(level) / "c" / "0" / str(index[0]) / str(index[1])
        try:
            return shard.stat().st_size > 0
        except FileNotFoundError:
            return False

    def _children(self, level: int, index: tuple[int, int]) -> list[tuple[int, int]]:
        """Indices of the shards below one shard: four, or fewer at the image's border."""
        below = self._plan.grid(level - 1)
        box = self._plan.grid(level).box(*index).scale(2).clip(below.bounds)
        return list(below.indices(box))

    def _extend_pyramid(self, level: int, index: tuple[int, int]) -> None:
        """Write a shard of ``level`` and its ancestors, as far as all their children exist."""
        if level == len(self._arrays):
            return
        if all(self._is_written(level - 1, child) for child in self._children(level, index)):
            self._write_halved(level, index)
            self._extend_pyramid(level + 1, (index[0] // 2, index[1] // 2))

    def _write_halved(self, level: int, index: tuple[int, int]) -> None:
        """Write a shard of ``level`` from its children in the level below."""
        box = self._plan.grid(level).box(*index)
        parent = np.empty((3, *box.shape), np.uint8)
        for child in self._children(level, index):
            source = self._plan.grid(level - 1).box(*child)
            rows, columns = source.cover(2).relative_to(box).slices
            parent[:, rows, columns] = halve(self._arrays[level - 1][(slice(None), *source.slices)])
        self._arrays[level][(slice(None), *box.slices)] = parent


def halve(pixels: Array) -> Array:
    """2x2 average of uint8 [C, h, w], halves rounded up; an odd last row or column is averaged with itself."""
    _, height, width = pixels.shape
    if height % 2 or width % 2:
        pixels = np.pad(pixels, ((0, 0), (0, height % 2), (0, width % 2)), mode="edge")
    rows = pixels[:, ::2].astype(np.uint16) + pixels[:, 1::2]
    mean: Array = ((rows[:, :, ::2] + rows[:, :, 1::2] + 2) >> 2).astype(np.uint8)
    return mean


def check_absent(path: Path) -> None:
    """Raise ResumeError when ``path`` exists."""
    if path.exists():
        raise ResumeError(
            f"{path}: exists; give {option('resume', True)} to finish it, {option('overwrite', True)} to replace it, "
            f"or another {option('out')}"
        )


def stored_provenance(path: Path) -> dict[str, Any] | None:
    """Plan and provenance of an existing store, or None where there is no store of this engine."""
    if not (path / "zarr.json").is_file():
        return None
    try:
        attributes: Any = zarr.open_group(path, mode="r").attrs.get(ATTRIBUTE)
        return None if attributes is None else dict(attributes)
    except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError):
        return None


def stored_plan(path: Path) -> dict[str, Any] | None:
    """The plan of an existing store, or None where there is no store of this engine."""
    plan = (stored_provenance(path) or {}).get("plan")
    return dict(plan) if isinstance(plan, dict) else None


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


def remove_store(path: Path) -> None:
    """Delete a store or an empty folder. Raises ResumeError for anything else of that name, which may be the user's."""
    if path.is_dir() and not path.is_symlink() and ((path / "zarr.json").is_file() or not any(path.iterdir())):
        # Moved first: a half-deleted store under the final name would be neither a store nor removable.
        shutil.rmtree(path.rename(path.with_name(path.name + ".part")))
        return
    raise ResumeError(f"{path}: exists and is not a Zarr store; give another {option('out')}, or remove it")
