"""Checkpoint of a training: replaced in one step, and loaded by the same run only."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from engine.errors import ResumeError, option
from engine.io.files import replacing

_FORMAT = 1


def checkpoint_path(out: Path) -> Path:
    """Checkpoint of the run that writes ``out``."""
    return out.with_name(out.name + ".checkpoint")


def save(path: Path, settings: dict[str, Any], state: dict[str, Any]) -> None:
    """Replace the checkpoint; a crash leaves the old one or the new one. Raises OSError as the file system does."""
    with replacing(path) as part:
        torch.save({"format": _FORMAT, "settings": settings, "state": state}, part)


def load(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """State of a run with equal settings; tensors and plain values only, never code.

    Raises:
        ResumeError: the checkpoint is damaged, of another format or of a run with other settings.
    """
    restart = f"delete it and start without {option('resume')}"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
        raise ResumeError(f"{path}: damaged checkpoint; {restart}") from None
    if not isinstance(saved, dict) or saved.get("format") != _FORMAT:
        raise ResumeError(f"{path}: checkpoint of another format; {restart}")
    for key, value in settings.items():
        if (before := saved["settings"].get(key)) != value:
            raise ResumeError(f"{path}: the run has {key} = {before!r}, not {value!r}; use the same settings")
    state: dict[str, Any] = saved["state"]
    return state
