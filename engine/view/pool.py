"""Threads that encode tiles, with a bounded queue, and a bounded cache of encoded tiles."""

from __future__ import annotations

import asyncio
import os
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
        self._sources = sources
        self._threads = ThreadPoolExecutor(threads or max(1, min(4, (os.cpu_count() or 2) // 2)), "tile")
        self._waiting: dict[tuple[int, int, int, int, str], asyncio.Future[Encoded]] = {}
        self._running = 0
        self._cache: LRUCache[tuple[int, int, int, int], Encoded] = LRUCache(
            CACHE_BYTES, getsizeof=lambda e: len(e.data)
        )
        self._lock = threading.Lock()

    async def tile(self, source: int, level: int, x: int, y: int) -> Encoded:
        """A tile. Raises Busy where too many are asked for."""
        version = self._sources[source].version(level, x, y)
        place = (source, level, x, y)
        with self._lock:
            known = self._cache.get(place)
        if known is not None and known.version == version:
            return known
        key = (*place, version)
        if (future := self._waiting.get(key)) is None:
            future = asyncio.ensure_future(self.run(lambda: self._encode(*place, version)))
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

    def _encode(self, source: int, level: int, x: int, y: int, version: str) -> Encoded:
        tile = self._sources[source].tile(level, x, y)
        encoded = Encoded(png_of(tile.pixels), tile.kind, version)
        may_stay = tile.kind is not Kind.DAMAGED  # which may be repaired
        if may_stay and len(encoded.data) <= self._cache.maxsize:
            with self._lock:
                self._cache[source, level, x, y] = encoded
        return encoded

    def _forget(self, key: tuple[int, int, int, int, str], done: asyncio.Future[Encoded]) -> None:
        self._waiting.pop(key, None)
        if not done.cancelled():
            done.exception()  # was raised where it was awaited
