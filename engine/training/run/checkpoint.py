"""A training run on disk: written whole or not at all, and read only when it belongs to the same run.

Knows files and dictionaries of tensors; what the dictionary means is the trainer's affair.
"""

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from engine.errors import ResumeError

_FORMAT = 1


def checkpoint_path(out: Path) -> Path:
    """Where the run that will write `out` keeps its checkpoint."""
    return out.with_name(out.name + ".checkpoint")


def save(path: Path, settings: dict[str, Any], state: dict[str, Any]) -> None:
    """Replace the checkpoint in one step, so that a crash leaves the old one or the new one."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        torch.save({"format": _FORMAT, "settings": settings, "state": state}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def load(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The state of a run with exactly these settings; tensors and plain values only, never code."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
        raise ResumeError(f"{path}: the checkpoint is damaged: delete it and start without resume") from None
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise ResumeError(f"{path}: the checkpoint is of another format: delete it and start without resume")
    for key, value in settings.items():
        if (before := found["settings"].get(key)) != value:
            raise ResumeError(f"{path}: was trained with {key} = {before!r}, not {value!r}: use the same settings")
    state: dict[str, Any] = found["state"]
    return state
