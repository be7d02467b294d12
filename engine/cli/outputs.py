"""Files that commands write: refused before the work if they would destroy something."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from engine.errors import InputError, UsageError, option
from engine.io.objects import ObjectPath, Place, as_place, check_local


def check_place(name: str, path: Path) -> None:
    """Refuse a file that could not be written at the end. ``name``: the option. Raises UsageError."""
    check_local(name, path)
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(f"{option(name, path)}: cannot be written; name a file in a folder that exists")


def check_new(path: Path, *, overwrite: bool) -> None:
    """Refuse to replace a file unasked. Raises InputError."""
    check_local("out", path)
    if path.exists() and not overwrite:
        raise InputError(f"{path}: exists; give {option('overwrite', True)} to replace it, or another {option('out')}")


def check_inputs_stay(name: str, path: Place | None, inputs: Iterable[Place | str | None]) -> None:
    """Refuse an output that is an input, under whatever name.

    Args:
        name: option of the output.
        path: the output; None if it is not requested.
        inputs: files that the command reads; names of packaged weights and missing files are passed over.

    Raises:
        UsageError: the output is one of them.
    """
    if path is None or not path.exists():
        return
    for one in inputs:
        if one is not None and _is_same(path, as_place(one)):
            raise UsageError(f"{option(name, path)}: is the input {one}, which it would replace; name another file")


def _is_same(path: Place, other: Place) -> bool:
    if isinstance(path, ObjectPath) or isinstance(other, ObjectPath):
        return path == other
    return other.exists() and os.path.samefile(path, other)
