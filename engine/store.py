"""A store of pixels as numpy regions: a finished render, one that still grows, or another program's OME-Zarr image."""

from __future__ import annotations

import base64
import html
import io
import shlex
from collections.abc import Mapping
from types import EllipsisType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.errors import UsageError, option
from engine.exporters.pyramid import Pixels, Pyramid
from engine.geometry import Box, Region, parse_box
from engine.growing import GrowingImage
from engine.io.objects import Place, as_place
from engine.io.provenance import COMMAND, PICTURE

_SHOWN = 400
"""Longer side of a thumbnail in a notebook, in pixels."""


class Store:
    """An open store, as ``engine.open`` returns it. Reads decode only the chunks that they meet.

    Attributes:
        path: folder or URL of the store.
    """

    def __init__(self, path: Place) -> None:
        self.path = path
        self._pyramid = Pyramid(path, allow_incomplete=True)

    def __repr__(self) -> str:
        width, height = self.size
        return f"<Store {self.path}: {width}x{height}{'' if self.complete else ', not complete'}>"

    def _repr_html_(self) -> str:
        """A thumbnail with the size and the progress, for notebooks."""
        picture = io.BytesIO()
        Image.fromarray(self.thumbnail(_SHOWN)).save(picture, "PNG")
        image = base64.b64encode(picture.getvalue()).decode("ascii")
        (width, height), seed = self.size, (self.provenance.get("plan") or {}).get("seed")
        facts = [f"{width} x {height} px", *([f"seed {seed}"] if seed is not None else [])]
        facts += [] if self.complete else ["not complete"]
        name = html.escape(self.path.name)
        return (
            f'<figure style="margin: 0"><img src="data:image/png;base64,{image}" alt="{name}">'
            f"<figcaption>{name}: {', '.join(facts)}</figcaption></figure>"
        )

    def __fspath__(self) -> str:
        """The folder or URL, so that ``engine.export`` takes an open store."""
        return str(self.path)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the image in pixels."""
        return self.levels[0]

    @property
    def levels(self) -> tuple[tuple[int, int], ...]:
        """(width, height) of every level of the pyramid, the full image first."""
        return tuple((level.width, level.height) for level in self._pyramid.levels)

    @property
    def profile(self) -> bytes | None:
        """ICC profile of the colours; None for grey without a profile."""
        return self._pyramid.profile

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Plan, model, licences, seam error and precision error of the render; empty for another program's store."""
        return self._pyramid.provenance

    @property
    def complete(self) -> bool:
        """Whether the render is finished. Shards that are missing read as black."""
        return not self.provenance or self.provenance.get("complete") is True

    def read(self, region: Region | None = None, level: int = 0) -> Pixels:
        """Pixels of a region as an array [height, width, channels] of uint8 or uint16.

        Channels are grey or RGB, and then alpha, by which colours are not multiplied.

        Args:
            region: (x, y, width, height) in pixels of the level, a ``Box`` or a text; by default all of the level.
            level: level of the pyramid; 0 is the full image.

        Raises:
            UsageError: there is no such level, or the region leaves it.
            InputError: a chunk is damaged.
        """
        if not 0 <= level < len(self.levels):
            raise UsageError(f"{self.path}: no such level ({level}); use 0 to {len(self.levels) - 1}")
        bounds = self._pyramid.levels[level].bounds
        box = bounds if region is None else parse_box(region, "region")
        if not bounds.contains(box):
            raise UsageError(
                f"{self.path}: the region {box.x0},{box.y0},{box.width},{box.height} leaves level {level} "
                f"({bounds.width}x{bounds.height}); use X,Y,WIDTH,HEIGHT inside it"
            )
        return self._pyramid.read(level, box)

    def thumbnail(self, max_size: int = 512) -> NDArray[np.uint8]:
        """The whole image, small: uint8 [height, width, 3], sRGB. What is not finished comes from coarser images, if there are any.

        Args:
            max_size: longer side in pixels, at most.
        """
        return GrowingImage(self.path).thumbnail(max_size)

    def multiscale(self, *, dask: bool = False) -> list[Any]:
        """All levels as lazy arrays [height, width, channels], the full image first, as napari takes them.

        ``napari.Viewer().add_image(store.multiscale(), rgb=True)``

        Args:
            dask: arrays of dask, which has to be installed, in chunks of the store; by default ``LevelArray``.

        Raises:
            UsageError: dask is not installed.
        """
        arrays: list[Any] = [LevelArray(self, level) for level in range(len(self.levels))]
        if not dask:
            return arrays
        try:
            from dask import array as dask_array
        except ImportError as error:
            raise UsageError(
                f"{self.path}: dask is not installed; pip install dask, or leave {option('dask')} out"
            ) from error
        lazy: Any = dask_array  # has no types
        return [lazy.from_array(array, chunks=array.chunks) for array in arrays]

    def __getitem__(self, index: slice | EllipsisType | tuple[slice, slice]) -> Pixels:
        """Pixels of the full image by slices of rows and columns, ``store[y0:y1, x0:x1]``, as an array [height, width, channels].

        Raises:
            UsageError: the index is not one or two slices without a step.
        """
        index = slice(None) if index is ... else index
        slices = index if isinstance(index, tuple) else (index, slice(None))
        if len(slices) != 2 or not all(isinstance(s, slice) and s.step in (None, 1) for s in slices):
            raise UsageError(f"{self.path}: no such index ({index!r}); use slices of rows and columns, [y0:y1, x0:x1]")
        rows, columns = slices
        width, height = self.size
        (y0, y1, _), (x0, x1, _) = rows.indices(height), columns.indices(width)
        return self._pyramid.read(0, Box(y0, x0, max(y0, y1), max(x0, x1)))


class LevelArray:
    """A level of a store as a lazy array: an index reads what it meets, through all checks.

    Attributes:
        shape: (height, width, channels).
        dtype: dtype of the samples.
        chunks: (height, width, channels) of what is decoded at once.
        ndim: 3.
    """

    ndim = 3

    def __init__(self, store: Store, level: int) -> None:
        self._store, self._level = store, level
        facts = store._pyramid.levels[level]
        channels = store._pyramid.pixels.channels
        self.shape = (facts.height, facts.width, channels)
        self.dtype = store._pyramid.dtype
        self.chunks = (*facts.chunk, channels)

    def __repr__(self) -> str:
        return f"<LevelArray {self.shape} {self.dtype}>"

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Pixels:  # noqa: ANN401 (as numpy's)
        """Pixels of an index of numpy; only the rows and columns that its slices and integers meet are read."""
        keys = index if isinstance(index, tuple) else (index,)
        if Ellipsis in keys:
            at = keys.index(Ellipsis)
            keys = (*keys[:at], *[slice(None)] * (self.ndim - len(keys) + 1), *keys[at + 1 :])
        spans, rest = [], []
        for key, length in zip((*keys, slice(None), slice(None))[:2], self.shape, strict=False):
            (first, last), inner = _span(key, length)
            spans.append((first, last))
            rest.append(inner)
        (y0, y1), (x0, x1) = spans
        part = np.empty((y1 - y0, x1 - x0, self.shape[2]), self.dtype)
        if part.size:
            part = self._store.read(Box(y0, x0, y1, x1), self._level)
        pixels: Pixels = part[(*rest, *keys[2:])]
        return pixels

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Pixels:  # noqa: ANN401 (as numpy's)
        """The whole level in memory."""
        return np.asarray(self[:], dtype)


def _span(key: Any, length: int) -> tuple[tuple[int, int], Any]:  # noqa: ANN401
    """Half-open range that a slice or an integer reads, and the same index relative to it.

    Raises:
        IndexError: the key is neither, or lies outside.
    """
    if isinstance(key, slice):
        places = range(length)[key]
        if not places:
            return (0, 0), slice(0, 0)
        first, last = min(places[0], places[-1]), max(places[0], places[-1])
        inner = slice(None, None, key.step) if places.step > 0 else slice(None, None, places.step)
        return (first, last + 1), inner
    place = range(length)[key]
    return (place, place + 1), 0


def open_store(path: Place | str) -> Store:
    """Open a store to read: its size, levels and provenance, and its pixels region by region.

    Args:
        path: folder or URL of a render, finished or not, or of another program's OME-Zarr image.

    Raises:
        InputError: it is no such image, or is damaged.
        StorageError: an object store does not answer, or refuses access.
    """
    return Store(as_place(path))


def resume_command(path: Place, provenance: Mapping[str, Any], part: str | None = None) -> str | None:
    """Command that finishes a store, or a part of it such as ``2/4``; None if no command line began it."""
    words, picture = provenance.get(COMMAND), provenance.get(PICTURE)
    if not isinstance(words, list):
        return None
    out = path.with_name(str(picture["name"])) if isinstance(picture, dict) and "name" in picture else path
    how = ["--resume"] if part is None else ["--part", part]
    return shlex.join([*map(str, words), "--out", str(out), *how])
