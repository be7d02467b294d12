"""Working data of an unfinished store, in a folder beside it: tiles that exceed the memory, and frozen statistics."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from engine.io.files import temporary_name
from engine.io.objects import ObjectPath, Place
from engine.io.provenance import IDENTITY, stored_provenance
from engine.io.shards import mark_of


def stored_scratch(path: Place) -> Path:
    """Folder for working data of an unfinished store: tiles that exceed the memory or that parts share, and statistics."""
    return scratch_of(path, stored_provenance(path) or {})


def scratch_of(path: Place, provenance: dict[str, Any]) -> Path:
    """The same, by the provenance of the store. That of an object store lies in this machine's cache, for equal plans."""
    if isinstance(path, ObjectPath):
        return temporary_name(path.anchor, "scratch", mark_of(provenance["plan"]) if "plan" in provenance else "")
    return temporary_name(path, "scratch", str(provenance.get(IDENTITY) or ""))


def statistics_name(digest: str) -> str:
    """Name of the file that keeps statistics of a plan until the store is finished."""
    return f"statistics-{digest[:16]}.safetensors"


def remove_scratch(folders: Iterable[Path]) -> None:
    """Remove spilled tiles, whose writers have ended."""
    for scratch in folders:
        shutil.rmtree(scratch, ignore_errors=True)
