"""The lock of a store, which one writer holds, or the parts of one render together."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from engine.errors import ResumeError, option
from engine.io.files import Lock
from engine.io.objects import ObjectPath, Place, anchor_of


def lock_store(path: Place, *, shared: bool = False) -> Lock:
    """Lock a store for writing; ``shared``: beside other parts. Raises ResumeError while another process writes it.

    The lock of an object store holds on this machine.
    """
    anchor = anchor_of(path)
    if isinstance(path, ObjectPath):
        anchor.parent.mkdir(parents=True, exist_ok=True)
    lock = lock_file(anchor, shared=shared) if isinstance(path, ObjectPath) else Lock.take(path, shared=shared)
    if lock is None:
        raise ResumeError(
            f"{path}: is being written by {writer_of(anchor)}; wait for it, or give another {option('out')}"
        )
    return lock


def lock_file(file: Path, *, shared: bool = False) -> Lock | None:
    """Lock on a file, which is made with its folder; None while another process holds it."""
    while True:
        with suppress(FileExistsError):
            os.mkdir(file.parent)
        with suppress(FileNotFoundError):  # another process has just ended, and removed the file or its folder
            return Lock.take(file, shared=shared, makes_file=True)


def writer_of(file: Path) -> str:
    """The process that locks a file or folder, in words."""
    process = Lock.holder(file)
    return "another process" if process is None else f"another process ({process})"
