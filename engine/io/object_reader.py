"""A store in an object store as Zarr reads it."""

from __future__ import annotations

import asyncio
from typing import Any

from zarr.storage import ObjectStore

from engine.io.objects import ObjectPath, failure, is_passing, pauses


class ObjectReader(ObjectStore[Any]):
    """Zarr's store of objects, read-only, whose errors are the engine's."""

    def __init__(self, place: ObjectPath, *, read_only: bool = True) -> None:
        super().__init__(place.client(), read_only=read_only)
        self._place = place

    def with_read_only(self, read_only: bool = False) -> ObjectReader:
        """Itself: ``ObjectWriter`` is the one that writes."""
        assert read_only == self.read_only
        return self

    async def exists(self, key: str) -> bool:
        """Whether there is an object of this name. Raises StorageError."""
        return await asyncio.to_thread((self._place / key).is_file)

    async def getsize_prefix(self, prefix: str) -> int:
        """Bytes of all objects below a name. Raises StorageError."""
        place = self._place / prefix if prefix else self._place
        return await asyncio.to_thread(lambda: sum(int(about["size"]) for _, about in place.objects()))

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:  # noqa: ANN401 (zarr's types)
        """Contents of an object, or None where there is none. Raises StorageError as ``ObjectPath`` does."""
        for pause in pauses():
            try:
                return await super().get(key, prototype, byte_range)
            except Exception as error:  # obstore's own
                if pause is None or not is_passing(error):
                    raise failure(self._place, error) from None
            await asyncio.sleep(pause)
        raise AssertionError
