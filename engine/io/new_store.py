"""A new store: its metadata, without pixels, under a name that is free or that another store gives up."""

from __future__ import annotations

import os
import shutil
from typing import Any

import zarr

from engine.errors import InputError, option
from engine.io.durable import DurableStore
from engine.io.files import Lock, new_identity, remove_leftovers, temporary_name, temporary_names
from engine.io.object_writer import begin_objects, remove_objects
from engine.io.objects import ObjectPath, Place
from engine.io.provenance import ATTRIBUTE, IDENTITY
from engine.io.scratch import remove_scratch
from engine.io.store_layout import metadata_of, write_metadata
from engine.io.store_lock import lock_store
from engine.io.store_name import check_absent, check_replaceable, forget_replaced, put_in_place
from engine.plan.plan import Plan


def make_store(path: Place, plan: Plan, provenance: dict[str, Any], *, overwrite: bool, shared: bool) -> Lock:
    """Make a store; returns the lock on it. Arguments and errors as for ``ZarrSink.create``."""
    if isinstance(path, ObjectPath):
        return _make_objects(path, plan, provenance, overwrite=overwrite, shared=shared)
    old = lock = None
    if not overwrite:
        check_absent(path)
    elif os.path.lexists(path):
        check_replaceable(path)
        old = lock_store(path)
    # The store is built under another name, so that one of the final name has all its arrays and its plan.
    part, spilled = temporary_name(path, "part"), temporary_names(path, "scratch")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
        lock = lock_store(part, shared=shared)
        write_metadata(zarr.open_group(DurableStore(part), mode="w-", zarr_format=3), path.stem, plan, provenance)
        put_in_place(part, path, replaces=old is not None)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if lock is not None:
            lock.release()
        if isinstance(error, OSError):
            raise InputError(
                f"{path}: cannot be created ({error.strerror or error}); choose another {option('out')}"
            ) from error
        raise
    finally:
        if old is not None:
            old.release()
    forget_replaced(path)
    remove_leftovers(path)
    remove_scratch(spilled)  # of earlier stores: parts of this one may have begun since
    return lock


def _make_objects(path: ObjectPath, plan: Plan, provenance: dict[str, Any], *, overwrite: bool, shared: bool) -> Lock:
    """``make_store`` in an object store."""
    lock = lock_store(path, shared=shared)
    try:
        if overwrite and path.exists():
            check_replaceable(path)
            remove_objects(path, ATTRIBUTE, {"complete": False, IDENTITY: new_identity()})
        check_absent(path)
        spilled = temporary_names(path.anchor, "scratch")
        begin_objects(path, metadata_of(path.stem, plan, provenance))
        remove_scratch(spilled)
    except BaseException:
        lock.release()
        raise
    return lock
