"""Pixels of a store while it grows: finished shards as they are, and elsewhere the best that is known.

A part that is not finished is shown from finished shards of finer levels, halved; or else from a coarser level or from the
first look of the render, enlarged. A damaged shard is hatched. So no pixel that is not finished looks finished, and the tile
says which it is. Memory: the cache of composed tiles, and five tiles for each level while one is composed.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray
from PIL import Image

from engine.errors import InputError
from engine.exporters.pyramid import Level, Pyramid
from engine.geometry import Box
from engine.io.display import Display
from engine.io.durable import stamp_of
from engine.io.files import Lock
from engine.io.first_look import FIRST_LOOK, decode_first_look
from engine.io.halving import halve_interleaved
from engine.io.objects import ObjectPath, Place, anchor_of
from engine.io.provenance import is_same_store
from engine.io.shards import present_in_row, present_shards

TILE = 512
"""Side of a tile, in pixels of its level."""

_CACHE_BYTES = 64 << 20
"""Size of the cache of tiles that are composed of several levels."""

_NOTED = 20
"""Messages about damage that are kept."""

Pixels = NDArray[np.uint8]
"""[H, W, 3], sRGB."""


class Kind(StrEnum):
    """State of the pixels of a tile: finished, coarse or damaged."""

    FINISHED = "finished"
    COARSE = "coarse"
    """At least a part is enlarged from a coarser image, or not known at all."""
    DAMAGED = "damaged"
    """At least a part is a shard that cannot be read."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Pixels of a tile and what they are."""

    pixels: Pixels
    kind: Kind


class GrowingImage:
    """An open store, finished or not.

    Args:
        path: folder or URL of a render, or of another program's OME-Zarr image.

    Attributes:
        path: folder or URL of the store.
        pyramid: the store as it was when ``refresh`` was last called.
        epoch: number of times that all pixels have changed, as another store has come under this name, or a better look.
        damaged: messages about shards that could not be read.

    Raises:
        InputError: the folder is no such image, or is damaged.
    """

    def __init__(self, path: Place) -> None:
        self.path = path
        self.pyramid = Pyramid(path, allow_incomplete=True)
        self.epoch = 0
        self.damaged: frozenset[str] = frozenset()
        self._stamp = _stamp(path)
        self._shown = Display(self.pyramid.pixels, self.pyramid.profile)
        self._look = decode_first_look(self.pyramid.provenance.get(FIRST_LOOK))
        self._is_look_given = False
        self._present = [np.zeros(_shape(level), bool) for level in self.levels]
        self._counts = [np.zeros(_shape(level), np.int64) for level in self.levels]
        self._cache: LRUCache[tuple[int, int, int], tuple[str, Tile]] = LRUCache(
            _CACHE_BYTES, getsizeof=lambda entry: entry[1].pixels.nbytes
        )
        self._lock = threading.Lock()
        self._scan()

    @property
    def levels(self) -> tuple[Level, ...]:
        """Resolutions from full size downwards."""
        return self.pyramid.levels

    @property
    def is_ours(self) -> bool:
        """Whether this engine rendered the store. In stores of others, a missing chunk holds the fill value."""
        return bool(self.pyramid.provenance)

    @property
    def complete(self) -> bool:
        """Whether the render is finished."""
        return not self.is_ours or self.pyramid.provenance.get("complete") is True

    @property
    def finished(self) -> NDArray[np.bool_]:
        """Which shards of the full-size image are on the disk, [rows, columns]."""
        return self._present[0]

    @property
    def writer(self) -> int | None:
        """Process that writes the store, where the system tells."""
        return None if self.complete else Lock.holder(anchor_of(self.path))

    def refresh(self) -> bool:
        """Look at the disk again; returns whether something has changed.

        Raises:
            InputError: the store is gone, or another image has come under its name.
        """
        stamp, changed = _stamp(self.path), False
        if stamp != self._stamp:
            self._reopen()
            self._stamp, changed = stamp, True
        elif self.complete:  # its shards were counted when it was opened
            return False
        return self._scan() or changed

    def version(self, level: int, x: int, y: int) -> str:
        """Text that changes with the contents of a tile."""
        part = self._shards(level, self.box(level, x, y)).slices
        above = sum(int(self._present[k].any()) for k in range(level + 1, len(self.levels)))
        return f"{self.epoch}.{int(self._counts[level][part].sum())}.{above}"

    def box(self, level: int, x: int, y: int) -> Box:
        """Pixels of a tile in its level."""
        return Box(y * TILE, x * TILE, (y + 1) * TILE, (x + 1) * TILE).clip(self.levels[level].bounds)

    def tile(self, level: int, x: int, y: int) -> Tile:
        """A tile. Several threads may call it."""
        box = self.box(level, x, y)
        shards = self._shards(level, box)
        if self._present[level][shards.slices].all():
            return self._finished(level, box)
        key, version = (level, x, y), self.version(level, x, y)
        with self._lock:
            known = self._cache.get(key)
        if known is not None and known[0] == version:
            return known[1]
        tile = self._composed(level, x, y)
        if tile.kind is not Kind.DAMAGED:  # which may be repaired
            with self._lock:
                self._cache[key] = (version, tile)
        return tile

    def show(self, look: Pixels) -> None:
        """Show another small image of the whole where nothing is finished, in place of the store's own."""
        self._look, self._is_look_given = Image.fromarray(look), True
        self.epoch += 1

    def decode(self, level: int, box: Box) -> Pixels:
        """Finished pixels of a box, as they are shown. Raises InputError where a shard is missing or damaged."""
        return self._shown(self.pyramid.decode(level, box))

    def thumbnail(self, side: int) -> Pixels:
        """The whole image, at most ``side`` pixels high and wide, of what is known now."""
        level = max(
            (k for k, each in enumerate(self.levels) if max(each.height, each.width) >= side),
            default=len(self.levels) - 1,
        )
        while level + 1 < len(self.levels) and max(self.levels[level].height, self.levels[level].width) > 8 * TILE:
            level += 1
        height, width = self.levels[level].bounds.shape
        pixels = np.empty((height, width, 3), np.uint8)
        for y in range(-(-height // TILE)):
            for x in range(-(-width // TILE)):
                pixels[self.box(level, x, y).slices] = self.tile(level, x, y).pixels
        image = Image.fromarray(pixels)
        image.thumbnail((side, side), Image.Resampling.BOX)
        return np.asarray(image)

    def _reopen(self) -> None:
        """Read the metadata again. Raises InputError where they are of another image."""
        before, pyramid = self.pyramid, Pyramid(self.path, allow_incomplete=True)
        old, new = before.provenance, pyramid.provenance
        if [level.bounds for level in pyramid.levels] != [level.bounds for level in before.levels]:
            raise InputError(f"{self.path}: another image has taken this name; open it again")
        is_same = is_same_store(old, new)
        self.pyramid = pyramid
        self._shown = Display(pyramid.pixels, pyramid.profile)
        if not is_same:  # also after ``engine check --repair``, which removes shards
            self.epoch += 1
            self._present = [np.zeros_like(present) for present in self._present]
        if not (is_same and self._is_look_given):
            self._look = decode_first_look(new.get(FIRST_LOOK)) or (self._look if is_same else None)

    def _scan(self) -> bool:
        """Look which shards are there; returns whether that has changed."""
        changed, counts = False, np.zeros((0, 0), np.int64)
        for k, level in enumerate(self.levels):
            before = self._present[k]
            present = self._scanned(level, before) if self.is_ours else np.ones_like(before)
            changed |= not np.array_equal(present, before)
            counts = present.astype(np.int64) + _pooled(counts, _shape(level))
            self._present[k], self._counts[k] = present, counts
        return changed

    def _scanned(self, level: Level, before: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Shards of a level that are there. Full rows are not looked at again: reading a shard checks it anyway."""
        if isinstance(self.path, ObjectPath):
            return present_shards(self.path, level.path, _shape(level))
        present = before.copy()
        for row in np.flatnonzero(~before.all(axis=1)):
            present[row] = present_in_row(self.path, level.path, int(row), before.shape[1])
        return present

    def _shards(self, level: int, box: Box) -> Box:
        """Rows and columns of the shards that a box meets."""
        rows, columns = self.levels[level].shard
        return Box(box.y0 // rows, box.x0 // columns, -(-box.y1 // rows), -(-box.x1 // columns))

    def _note(self, error: InputError) -> None:
        if len(self.damaged) < _NOTED:
            self.damaged |= {str(error)}

    def _finished(self, level: int, box: Box) -> Tile:
        try:
            return Tile(self.decode(level, box), Kind.FINISHED)
        except InputError as error:
            self._note(error)
            return self._damaged(level, box)

    def _damaged(self, level: int, box: Box) -> Tile:
        """A tile with a shard that cannot be read: its chunks that can be are shown."""
        pixels = _hatched(box)
        rows, columns = (max(TILE // 8, side) for side in self.levels[level].chunk)
        for y in range(box.y0, box.y1, rows):
            for x in range(box.x0, box.x1, columns):
                part = Box(y, x, y + rows, x + columns).clip(box)
                try:
                    pixels[part.relative_to(box).slices] = self.decode(level, part)
                except InputError:
                    continue
        return Tile(pixels, Kind.DAMAGED)

    def _composed(self, level: int, x: int, y: int) -> Tile:
        """A tile of which a shard is missing."""
        box, grid = self.box(level, x, y), self._shards(level, self.box(level, x, y))
        pixels, kinds = np.empty((*box.shape, 3), np.uint8), set()
        rows, columns = self.levels[level].shard
        halves: dict[tuple[int, int], Tile] = {}
        for row in range(grid.y0, grid.y1):
            for column in range(grid.x0, grid.x1):
                part = Box(row * rows, column * columns, (row + 1) * rows, (column + 1) * columns).clip(box)
                inside = part.relative_to(box).slices
                if self._present[level][row, column]:
                    tile = self._finished(level, part)
                elif level and self._counts[level][row, column]:
                    tile = self._from_finer(level, x, y, part, halves)
                else:
                    tile = Tile(self._enlarged(level, part), Kind.COARSE)
                pixels[inside] = tile.pixels
                kinds.add(tile.kind)
        kind = next(kind for kind in (Kind.DAMAGED, Kind.COARSE, Kind.FINISHED) if kind in kinds)
        return Tile(pixels, kind)

    def _from_finer(self, level: int, x: int, y: int, part: Box, halves: dict[tuple[int, int], Tile]) -> Tile:
        """A part of a tile from the four tiles of the finer level; ``halves``: the tiles that are halved already."""
        box, bounds = self.box(level, x, y), self.levels[level - 1].bounds
        whole, kinds = np.empty((*box.shape, 3), np.uint8), set()
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
            finer = (2 * x + j, 2 * y + i)
            if finer[1] * TILE >= bounds.height or finer[0] * TILE >= bounds.width:
                continue
            place = self.box(level - 1, *finer).cover(2)
            if not place.clip(part).area:
                continue
            if finer not in halves:
                tile = self.tile(level - 1, *finer)
                half = np.ascontiguousarray(halve_interleaved(tile.pixels))
                halves[finer] = Tile(half, tile.kind)
            whole[place.relative_to(box).slices] = halves[finer].pixels
            kinds.add(halves[finer].kind)
        kind = next(kind for kind in (Kind.DAMAGED, Kind.COARSE, Kind.FINISHED) if kind in kinds)
        return Tile(whole[part.relative_to(box).slices], kind)

    def _enlarged(self, level: int, part: Box) -> Pixels:
        """Pixels of a part from a coarser level that has them, or from the first look; grey where nothing is known."""
        size = self.levels[level].bounds
        for k in range(level + 1, len(self.levels)):
            source = self.levels[k].bounds
            area = part.cover(2 ** (k - level))
            around = Box(area.y0 - 2, area.x0 - 2, area.y1 + 2, area.x1 + 2).clip(source)
            if around.area and self._present[k][self._shards(k, around).slices].all():
                try:
                    pixels = self.decode(k, around)
                except InputError as error:
                    self._note(error)
                    continue
                return _resized(Image.fromarray(pixels), part, size, source, (around.y0, around.x0))
        if self._look is not None:
            look = self._look
            return _resized(look, part, size, Box(0, 0, look.height, look.width))
        return np.full((*part.shape, 3), 112, np.uint8)


def _resized(image: Image.Image, part: Box, size: Box, source: Box, origin: tuple[int, int] = (0, 0)) -> Pixels:
    """The part of a level, of bounds ``size``, from ``image``, whose corner is at ``origin`` of an image of bounds ``source``."""
    down, across = source.height / size.height, source.width / size.width
    edges = (
        max(0.0, part.x0 * across - origin[1]),
        max(0.0, part.y0 * down - origin[0]),
        min(float(image.width), part.x1 * across - origin[1]),
        min(float(image.height), part.y1 * down - origin[0]),
    )
    resized = image.resize((part.width, part.height), Image.Resampling.BICUBIC, box=edges)
    return np.asarray(resized)


def _hatched(box: Box) -> Pixels:
    """Grey with diagonal lines that go on from tile to tile."""
    y, x = np.ogrid[box.y0 : box.y1, box.x0 : box.x1]
    lines = np.where((x + y) % 24 < 4, 150, 90).astype(np.uint8)
    return np.repeat(lines[:, :, None], 3, axis=2)


def _shape(level: Level) -> tuple[int, int]:
    """(rows, columns) of the shards of a level."""
    rows, columns = level.shard
    return -(-level.height // rows), -(-level.width // columns)


def _pooled(counts: NDArray[np.int64], shape: tuple[int, int]) -> NDArray[np.int64]:
    """Sums of 2 x 2 shards."""
    rows, columns = shape
    even = np.zeros((2 * rows, 2 * columns), np.int64)
    part = counts[: 2 * rows, : 2 * columns]
    even[: part.shape[0], : part.shape[1]] = part
    pooled: NDArray[np.int64] = even.reshape(rows, 2, columns, 2).sum(axis=(1, 3))
    return pooled


def _stamp(path: Place) -> tuple[object, ...]:
    """What changes when the root metadata are written. Raises InputError where the store is gone."""
    for name in ("zarr.json", ".zattrs"):
        with suppress(OSError):
            return stamp_of(path, name)
    raise InputError(f"{path}: the store is gone; put it back, or open another one")
