"""Pictures in memory as inputs of a render, through a temporary file: everything reads pictures from files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np

from engine.errors import UsageError, option


class ArrayLike(Protocol):
    """An array of numpy, or an image of Pillow."""

    @property
    def __array_interface__(self) -> dict[str, Any]: ...


Picture: TypeAlias = Path | str | ArrayLike
"""A file, or an array in sRGB: uint8, uint16, or float32 from 0 to 1; [height, width] or [height, width, channels], grey or RGB
and then alpha."""

_DTYPES = (np.uint8, np.uint16, np.float32)


@contextmanager
def picture_file(picture: Picture | None) -> Iterator[Path | None]:
    """File of a picture; that of an array exists while the context lasts, and has equal bytes for equal pixels.

    Raises:
        UsageError: the array has another shape or dtype.
    """
    if picture is None or isinstance(picture, str | os.PathLike):
        yield None if picture is None else Path(picture)
        return
    pixels = np.asarray(picture)
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    if pixels.ndim not in (2, 3) or not 1 <= channels <= 4 or not pixels.size or pixels.dtype not in _DTYPES:
        raise UsageError(
            f"{option('init')}: an array of {pixels.dtype} {list(pixels.shape)} is no picture; give uint8, uint16 or float32 "
            "[height, width, 1 to 4], such as Pillow's image.convert('RGB')"
        )
    import tifffile

    with tempfile.TemporaryDirectory(prefix="engine-") as folder:
        path = Path(folder) / f"array-{pixels.shape[1]}x{pixels.shape[0]}.tif"
        # Without a description and the name of the software, which change from version to version.
        tifffile.imwrite(
            path,
            pixels if channels > 1 else pixels.reshape(pixels.shape[:2]),
            photometric="rgb" if channels > 2 else "minisblack",
            planarconfig="contig" if channels > 1 else None,
            extrasamples=["unassalpha"] if channels in (2, 4) else [],
            metadata=None,
            software=False,
            compression=None,
        )
        yield path
