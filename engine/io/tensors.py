"""Files of tensors (safetensors)."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine.causes import is_out_of_memory, naming
from engine.errors import InputError
from engine.io.files import replacing


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a file to read its metadata and its tensors: safetensors' ``safe_open``, which has no types.

    Raises:
        SafetensorError: damage.
        OSError: as the system does, with the path.
    """
    with naming(path):
        try:
            file = safe_open(path, "pt")
        except FileNotFoundError as error:  # safetensors' word for every failure to open
            with path.open("rb"):
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path)) from error
        with file:
            yield file


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file that appears whole or not at all; equal contents are equal bytes.

    Raises InputError when it cannot be written.
    """
    try:
        with replacing(path) as part:
            save_file(dict(tensors), part, metadata=dict(metadata))
            _sort_metadata(part)
            part.chmod(0o666 & ~_umask())  # safetensors makes files that only their owner may read
    except (OSError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be written ({reason}); choose another place") from error


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of the header, which safetensors writes in another order each time."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= size, "the same words take the same bytes"
        file.seek(8)
        file.write(text.ljust(size))


def _umask() -> int:
    """The process' umask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
