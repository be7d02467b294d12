"""The name of a store: whether it is free, how a new store takes it, and the store that is kept until the new one is complete."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from engine.errors import ResumeError, option
from engine.io.files import sync_folder, temporary_name, temporary_names
from engine.io.object_writer import foreign_object
from engine.io.objects import ObjectPath, Place, lies_there
from engine.io.provenance import stored_provenance

PARTIAL = re.compile(r"(\d+|zarr|zarr\.json)\.[0-9a-f]+\.partial")
"""Temporary files of this engine and of Zarr."""


def check_absent(path: Place) -> None:
    """Raise ResumeError when ``path`` exists."""
    if lies_there(path):
        raise ResumeError(
            f"{path}: exists; give {option('resume', True)} to finish it, {option('overwrite', True)} to replace it, "
            f"or another {option('out')}"
        )


def check_replaceable(path: Place) -> None:
    """Raise ResumeError unless ``path`` is a store of this engine without files of others, or an empty folder."""
    other = f"give another {option('out')}, or remove it"
    if isinstance(path, ObjectPath):
        if stored_provenance(path) is None:
            raise ResumeError(f"{path}: exists and is not a Zarr store of this engine, or is damaged; {other}")
        if (name := foreign_object(path)) is not None:
            raise ResumeError(f"{path}: holds {name}, which no render wrote; move it, or {other}")
        return
    if not path.is_dir() or path.is_symlink():
        raise ResumeError(f"{path}: exists and is not a Zarr store of this engine; {other}")
    if not any(path.iterdir()):
        return
    if stored_provenance(path) is None:
        raise ResumeError(f"{path}: exists and is not a Zarr store of this engine, or is damaged; {other}")
    if (foreign := next(_foreign_files(path), None)) is not None:
        raise ResumeError(f"{path}: holds {foreign.relative_to(path)}, which no render wrote; move it, or {other}")


def remove_store(path: Path) -> None:
    """Delete a store of this engine or an empty folder. Raises ResumeError for anything else of that name."""
    check_replaceable(path)
    # Moved first: a half-deleted store under the final name would be neither a store nor removable.
    moved = path.rename(temporary_name(path, "part"))
    try:
        shutil.rmtree(moved)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(moved)) from error


def put_in_place(part: Path, path: Path, *, replaces: bool) -> None:
    """Give a new store its name; ``replaces``: keep the old one of that name, which is locked, aside."""
    aside = None
    if replaces:
        if any(path.iterdir()):
            aside = path.rename(temporary_name(path, "old"))
        else:
            path.rmdir()
    try:
        part.rename(path)
    except OSError as error:
        if aside is not None and not os.path.lexists(path):
            aside.rename(path)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            check_absent(path)
        raise
    sync_folder(path.parent)


def replaced_stores(path: Path) -> list[Path]:
    """Stores that were replaced under this name and are kept."""
    return [old for old in temporary_names(path, "old") if old.is_dir() and stored_provenance(old) is not None]


def forget_replaced(path: Path) -> None:
    """Keep one replaced store: the latest that is complete, or else the latest."""
    kept = sorted(
        replaced_stores(path), key=lambda p: ((stored_provenance(p) or {}).get("complete") is True, p.stat().st_mtime)
    )
    for old in kept[:-1]:
        with suppress(ResumeError):
            remove_store(old)


def _foreign_files(path: Path) -> Iterator[Path]:
    """Files and links of a folder that no store of this engine has."""
    for folder, names, files in os.walk(path):
        here = Path(folder)
        parts = here.relative_to(path).parts
        numbers = parts and parts[0].isdigit() and parts[1:2] in ((), ("c",)) and all(p.isdigit() for p in parts[2:])
        for name in files:
            is_metadata = name == "zarr.json" and len(parts) < 2
            is_shard = name.isdigit() and len(parts) == 4
            if not (
                (numbers or not parts) and (is_metadata or is_shard or PARTIAL.fullmatch(name) or name == ".DS_Store")
            ):
                yield here / name
        yield from (here / name for name in names if (here / name).is_symlink())
