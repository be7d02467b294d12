"""Super-resolution networks that have names, among the weight files of others."""

from __future__ import annotations

from pathlib import Path

from engine.errors import ModelError, UsageError
from engine.model.weight_files import WEIGHTS

PACKAGED = {name: WEIGHTS[name] for name in ("realsr", "x4plus")}
"""Networks by the name that ``--sr`` and ``--start`` take."""


def find_packaged(name: str) -> Path:
    """Path of a named network in the engine's folder of weights or in an installed package, which is not imported.

    Raises:
        UsageError: no network has this name.
        ModelError: its weights are not on this machine.
    """
    if name not in PACKAGED:
        raise UsageError(f"{name!r}: no packaged weights of this name; choose one of {', '.join(PACKAGED)}")
    path = PACKAGED[name].find()
    if path is None:
        raise ModelError(f"{name}: the weights are not on this machine; {PACKAGED[name].advice()}")
    return path


def provenance(name: str) -> tuple[str, str]:
    """(source, licence) of a named network for a manifest."""
    file = PACKAGED[name]
    assert file.archive is not None
    assert file.members is not None
    member = next(path for path in file.members if path.endswith(".param"))
    title = file.archive.title
    return f"{member} of the PyPI package {title}: {file.content}", f"{file.licence} (as declared by {title})"
