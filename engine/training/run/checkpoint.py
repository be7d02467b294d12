"""Checkpoint of a training: replaced in one step, and loaded by the same run only."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from engine.causes import naming, raise_if_exhausted
from engine.errors import ResumeError, option
from engine.io.files import replacing

_FORMAT = 1
_SHOWN = 200
"""Characters of a value in a message."""


def checkpoint_path(out: Path) -> Path:
    """Checkpoint of the run that writes ``out``."""
    return out.with_name(out.name + ".checkpoint")


def save(path: Path, settings: dict[str, Any], state: dict[str, Any]) -> None:
    """Replace the checkpoint; a crash or a full disk leaves the old one. Raises OSError, with the path, as the system does."""
    # An open file, as PyTorch's own writer loses the cause of an error.
    with naming(path), replacing(path) as part, part.open("wb") as file:
        torch.save({"format": _FORMAT, "settings": settings, "state": state}, file)


def load(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """State of a run with equal settings; tensors and plain values only, never code.

    Raises:
        ResumeError: the checkpoint is damaged, of another format or of a run with other settings.
    """
    restart = f"delete it and start without {option('resume')}"
    try:
        with naming(path):
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise_if_exhausted(error)
        raise ResumeError(f"{path}: damaged checkpoint; {restart}") from None
    if not isinstance(saved, dict) or saved.get("format") != _FORMAT:
        raise ResumeError(f"{path}: checkpoint of another format; {restart}")
    if (found := difference(saved["settings"], settings)) is not None:
        raise ResumeError(f"{path}: the run has {found}; use the same settings, or {restart}")
    state: dict[str, Any] = saved["state"]
    return state


def position(path: Path) -> tuple[int, int]:
    """Phase and finished iterations of a checkpoint; (0, 0) for one that is missing or damaged."""
    try:
        with naming(path):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state"]
        return int(state["phase"]), int(state["iteration"])
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError, TypeError, ValueError) as error:
        raise_if_exhausted(error)
        return 0, 0


def difference(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> str | None:
    """The first setting that differs, with both values: "recipe.batch = 4, not 8"; None for equal settings."""
    for key, value in now.items():
        saved = before.get(key)
        if isinstance(value, Mapping) and isinstance(saved, Mapping):
            if (found := difference(saved, value, f"{prefix}{key}.")) is not None:
                return found
        elif _plain(saved) != _plain(value):
            return f"{prefix}{key} = {_shown(saved)}, not {_shown(value)}"
    return None


def _plain(value: object) -> object:
    """A value as JSON gives it back, without tuples."""
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _shown(value: object) -> str:
    text = repr(_plain(value))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
