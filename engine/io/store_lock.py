"""The lock of a store, which one writer holds, or the parts of one render together."""

from __future__ import annotations

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
    lock = _lock(anchor, shared=shared) if isinstance(path, ObjectPath) else Lock.take(path, shared=shared)
    if lock is None:
        process = Lock.holder(anchor)
        name = "another process" if process is None else f"another process ({process})"
        raise ResumeError(f"{path}: is being written by {name}; wait for it, or give another {option('out')}")
    return lock


def _lock(file: Path, *, shared: bool) -> Lock | None:
    """Lock on a file, which is made; None while another process holds it."""
    while True:
        with suppress(FileNotFoundError):  # another process has just finished the store, and removed it
            return Lock.take(file, shared=shared, makes_file=True)
