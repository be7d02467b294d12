"""Writing a file of tensors (safetensors), whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from engine.errors import InputError


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """To another name first, so that a file of the final name is whole. Raises InputError when it cannot be written."""
    part = path.with_name(path.name + ".part")
    try:
        save_file(dict(tensors), part, metadata=dict(metadata))
        # The library makes files that only their owner may read.
        part.chmod(0o666 & ~_umask())
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be written ({reason}); choose another place") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _umask() -> int:
    """It can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
