"""Checkpoint files of any origin: from a path to named tensors in the stored dtype.

Three formats can be read: safetensors, PyTorch's pickles (by its restricted unpickler) and ncnn's pairs of files. The
module does not know what the tensors mean.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from engine.errors import ModelError
from engine.model.ncnn import read_ncnn

WRAPPERS = ("params_ema", "params", "state_dict")
"""Keys under which a pickle may hold its weights. The EMA comes first, because it is the published version."""

PROVENANCE_KEY = "training"
"""Key of a safetensors file's metadata: JSON with source, licence, sigma and the settings of ``engine train``."""


def read_provenance(path: Path) -> dict[str, Any]:
    """Provenance that ``engine train`` recorded with the weights; empty for files from elsewhere.

    Raises:
        ModelError: a file named .safetensors that is none.
    """
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, "pt") as file:
            provenance = json.loads((file.metadata() or {}).get(PROVENANCE_KEY, "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as a safetensors file ({error})") from None
    return provenance if isinstance(provenance, dict) else {}


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a file by name, on the CPU.

    Raises:
        ModelError: no such file, an unknown suffix, damage, or a pickle that would run code.
    """
    path = Path(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ModelError(f"{path}: not a checkpoint that can be read; choose one of {', '.join(READERS)}")
    if not path.is_file():
        raise ModelError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    try:
        return reader(path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({_one_line(error)})") from error


def _one_line(error: Exception) -> str:
    """Message of another library's error in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ModelError(f"{path}: damaged safetensors file ({_one_line(error)})") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns about formats that it guesses; the checks below say more
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged pickle can fail in any way at all
            raise ModelError(f"{path}: {_refusal(str(error))}") from error
    return _named_tensors(_unwrapped(content), path)


def _refusal(message: str) -> str:
    """PyTorch's paragraph in one line, without its advice to run the file's code."""
    if match := re.search(r"GLOBAL (\S+)|Unsupported class (\S+)", message):
        name = match[1] or match[2]
        return f"refused, because loading it would run code ({name}); save its tensors alone, as safetensors"
    return "damaged, or not a checkpoint of PyTorch"


def _unwrapped(content: object) -> object:
    if isinstance(content, Mapping):
        for key in WRAPPERS:
            if isinstance(content.get(key), Mapping):
                return content[key]
    return content


def _named_tensors(content: object, path: Path) -> dict[str, Tensor]:
    if not isinstance(content, Mapping) or not content:
        raise ModelError(f"{path}: holds a {type(content).__name__} without named tensors")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ModelError(f"{path}: {str(key)!r} is a {type(value).__name__}, not a named tensor")
    prefix = "module." if all(key.startswith("module.") for key in content) else ""
    return {key.removeprefix(prefix): value.detach() for key, value in content.items()}


READERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    ".safetensors": _read_safetensors,
    ".pth": _read_pickle,
    ".pt": _read_pickle,
    ".param": read_ncnn,
    ".bin": read_ncnn,
}
"""Readers by suffix in lower case."""
