"""Threads that encode tiles, with a bounded queue, and a bounded cache of encoded tiles."""

from __future__ import annotations

import asyncio
import os
import secrets
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from cachetools import LRUCache

from engine.view.png import png_of
from engine.view.source import Kind, TileSource

CACHE_BYTES = 64 << 20
"""Bytes of encoded tiles that are kept."""

QUEUE = 128
"""Tiles that may wait or be computed; a screen of 8K has about that many."""

_Place = tuple[str, int, int, int, int]
"""Random text of what is shown, source, level, x and y. A browser keeps tiles of earlier servers, at the same addresses."""

_Result = TypeVar("_Result")


class Busy(Exception):
    """The queue is full: the client asks again later."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A tile as a PNG file."""

    data: bytes
    kind: Kind
    version: str
    """Version of its pixels."""


class TilePool:
    """Encodes tiles of sources in threads; the same tile is computed once for all who wait for it.

    Args:
        sources: the sources.
        threads: number of threads; by default half of the processors, at most four, as a render may need the rest.
    """

    def __init__(self, sources: Sequence[TileSource], threads: int | None = None) -> None:
        self._sources = tuple(sources)
        self._shown = secrets.token_hex(4)
        self._threads = ThreadPoolExecutor(threads or max(1, min(4, (os.cpu_count() or 2) // 2)), "tile")
        self._waiting: dict[tuple[_Place, str], asyncio.Future[Encoded]] = {}
        self._running = 0
        self._cache: LRUCache[_Place, Encoded] = LRUCache(CACHE_BYTES, getsizeof=lambda e: len(e.data))
        self._lock = threading.Lock()

    def show(self, sources: Sequence[TileSource]) -> None:
        """Serve other sources. The versions of their tiles are others than those of any source before."""
        self._shown, self._sources = secrets.token_hex(4), tuple(sources)

    async def tile(self, source: int, level: int, x: int, y: int) -> Encoded:
        """A tile. Raises Busy where too many are asked for."""
        image = self._sources[source]
        version = f"{self._shown}.{image.version(level, x, y)}"
        place = (self._shown, source, level, x, y)
        with self._lock:
            known = self._cache.get(place)
        if known is not None and known.version == version:
            return known
        key = (place, version)
        if (future := self._waiting.get(key)) is None:
            future = asyncio.ensure_future(self.run(lambda: self._encode(image, place, version)))
            self._waiting[key] = future
            future.add_done_callback(lambda done: self._forget(key, done))
        return await asyncio.shield(future)  # one who goes away stops nobody else's tile

    async def run(self, function: Callable[[], _Result]) -> _Result:
        """Run a function in a thread. Raises Busy where too many wait."""
        if self._running >= QUEUE:
            raise Busy
        self._running += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, function)
        finally:
            self._running -= 1

    def close(self) -> None:
        """End the threads after what they do now."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _encode(self, image: TileSource, place: _Place, version: str) -> Encoded:
        tile = image.tile(*place[2:])
        encoded = Encoded(png_of(tile.pixels), tile.kind, version)
        may_stay = tile.kind is not Kind.DAMAGED  # which may be repaired
        if may_stay and len(encoded.data) <= self._cache.maxsize:
            with self._lock:
                self._cache[place] = encoded
        return encoded

    def _forget(self, key: tuple[_Place, str], done: asyncio.Future[Encoded]) -> None:
        self._waiting.pop(key, None)
        if not done.cancelled():
            done.exception()  # was raised where it was awaited
