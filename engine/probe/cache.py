"""The user's cache of measurements: small JSON files. A cache that cannot be written costs time, not correctness."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from engine.io.files import cache_folder, replacing


def digest(*parts: object) -> str:
    """Name of an entry that belongs to these parts."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def read(group: str, name: str) -> object:
    """Stored data; None when there is none, or when it is damaged."""
    with suppress(OSError, ValueError, RecursionError):
        data: object = json.loads(_path(group, name).read_text())
        return data
    return None


def numbers(data: object) -> dict[str, float]:
    """Stored numbers by name. Raises TypeError unless all are finite and none is negative: nobody measures such."""
    if not isinstance(data, Mapping):
        raise TypeError("no numbers")
    for value in data.values():
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise TypeError(f"{value!r} is no measured number")
    return dict(data)


def write(group: str, name: str, data: object) -> None:
    """Store data."""
    path = _path(group, name)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            part.write_text(json.dumps(data))


@dataclass(frozen=True, slots=True)
class Group:
    """One group of entries, for a reader that knows of no others."""

    group: str
    """Name of the group."""

    def read(self, name: str, /) -> object:
        """``read`` in this group."""
        return read(self.group, name)

    def write(self, name: str, data: object, /) -> None:
        """``write`` in this group."""
        write(self.group, name, data)


def _path(group: str, name: str) -> Path:
    return cache_folder() / group / f"{name}.json"
