"""Whole rows of a picture, from the store to one file: read once, encoded by several threads, written in order.

Memory grows neither with the height nor with the width. Strips of ``STRIP_BYTES`` (or of the fewest rows that a format
encodes) are on their way at the same time, as many as ``_IN_FLIGHT`` bytes. A row of the store's cells waits in a temporary
file; the next one is decoded while this one is encoded.
"""

from __future__ import annotations

import tempfile
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Any, BinaryIO, Protocol, Self

import numpy as np

from engine.causes import naming
from engine.container import cpu_count
from engine.errors import Interrupted
from engine.exporters.pyramid import Pixels
from engine.exporters.view import View
from engine.geometry import Box

STRIP_BYTES = 1 << 20
"""Bytes of pixels that a thread encodes at once, or one row where rows are longer."""

_IN_FLIGHT = 12 << 20
"""Bytes of strips that are read and not yet written."""


class RowReader:
    """Rows of one level, read from the first to the last. Each chunk of the store is decoded once.

    Args:
        view: the store.
        level: index of the level.
    """

    def __init__(self, view: View, level: int) -> None:
        self._view, self._level, self._size = view, level, view.levels[level]
        self._thread = ThreadPoolExecutor(1)
        view.pyramid.limit_cache(0)  # every cell is read once
        self._stop = Event()
        self._top, self._bottom = 0, 0
        self._band: _Band | None = None
        self._next: Future[_Band] | None = None

    def read(self, y0: int, y1: int) -> Pixels:
        """Rows y0 to y1, [H, W, C]."""
        pixels = np.empty((y1 - y0, self._size.width, self._view.pixels.channels), self._view.dtype)
        y = y0
        while y < y1:
            band = self._load(y)
            end = min(y1, self._bottom)
            band.read(y - self._top, end - self._top, pixels[y - y0 : end - y0])
            y = end
        return pixels

    def close(self) -> None:
        """End the thread and free the bands."""
        self._stop.set()
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._free()
        if self._next is not None and not self._next.cancelled() and self._next.exception() is None:
            self._next.result().close()
        self._next = None

    def _load(self, y: int) -> _Band:
        """The row of cells that holds row ``y``; the next one is read meanwhile."""
        if self._band is None or not self._top <= y < self._bottom:
            self._free()
            top, bottom = self._view.cell_rows(self._level, y)
            band = self._next if self._next is not None and top == self._bottom else None
            self._next = None
            self._band = self._decode(top, bottom) if band is None else band.result()
            self._top, self._bottom = top, bottom
            if bottom < self._size.height:
                self._next = self._thread.submit(self._decode, *self._view.cell_rows(self._level, bottom))
        return self._band

    def _decode(self, top: int, bottom: int) -> _Band:
        band = _Band(self._view.folder)
        try:
            for x in range(0, self._size.width, self._size.cell[1]):
                if self._stop.is_set():
                    raise Interrupted("export stopped")
                box = Box(top, x, bottom, min(x + self._size.cell[1], self._size.width))
                band.append(self._view.read(self._level, box))
        except BaseException:
            band.close()
            raise
        return band

    def _free(self) -> None:
        if self._band is not None:
            self._band.close()
        self._band = None


class _Band:
    """A row of cells, one after another, in a temporary file that ends with the process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._cells: list[tuple[int, int]] = []
        """Place in the file and width of every cell."""
        with naming(folder):
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        self._end = 0

    def append(self, pixels: Pixels) -> None:
        """Add a cell on the right."""
        data = np.ascontiguousarray(pixels).data.cast("B")
        self._cells.append((self._end, pixels.shape[1]))
        self._end += data.nbytes
        with naming(self._folder):
            while data:
                data = data[self._file.write(data) :]

    def read(self, y0: int, y1: int, out: Pixels) -> None:
        """Copy rows y0 to y1 to ``out``."""
        x = 0
        for start, width in self._cells:
            row_bytes = width * out.shape[2] * out.itemsize
            self._file.seek(start + y0 * row_bytes)
            data = self._file.read((y1 - y0) * row_bytes)
            out[:, x : x + width] = np.frombuffer(data, out.dtype).reshape(y1 - y0, width, -1)
            x += width

    def close(self) -> None:
        self._file.close()


class Encoder(Protocol):
    """A format that is encoded strip by strip, in any order, and joined in order."""

    rows: int
    """Rows of every strip but the last."""

    def head(self) -> bytes:
        """Bytes before the first strip."""
        ...

    def encode(self, pixels: Pixels, above: Pixels | None) -> Any:  # noqa: ANN401 (the format's own)
        """A strip, from any thread; ``above``: the row over it, None for the first strip."""
        ...

    def join(self, part: Any) -> bytes:  # noqa: ANN401
        """Bytes of the file for the next strip in order."""
        ...

    def tail(self) -> bytes:
        """Bytes after the last strip."""
        ...


class RowWriter:
    """A file of encoded strips.

    Args:
        file: open file.
        encoder: the format.
    """

    def __init__(self, file: BinaryIO, encoder: Encoder) -> None:
        self._file, self._encoder = file, encoder
        threads = min(8, cpu_count())
        self._least = threads + 1
        self._pool = ThreadPoolExecutor(threads)
        self._pending: deque[tuple[Future[Any], int]] = deque()
        self._bytes = 0
        self._above: Pixels | None = None
        file.write(encoder.head())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def put(self, pixels: Pixels) -> None:
        """Take the next strip, and write those that are encoded."""
        self._pending.append((self._pool.submit(self._encoder.encode, pixels, self._above), pixels.nbytes))
        self._bytes += pixels.nbytes
        self._above = pixels[-1:].copy()
        while self._bytes > _IN_FLIGHT and len(self._pending) > self._least:
            self._take()

    def finish(self) -> None:
        """Write what is left."""
        while self._pending:
            self._take()
        self._file.write(self._encoder.tail())

    def _take(self) -> None:
        part, count = self._pending.popleft()
        self._file.write(self._encoder.join(part.result()))
        self._bytes -= count
