"""Pictures side by side, each with a label below it, as one file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.causes import raise_if_exhausted
from engine.errors import InputError, option
from engine.io.files import replacing

if TYPE_CHECKING:
    import pyvips

_LABEL = 36
"""Height of a label in pixels."""

_GAP = 8
_WHITE, _INK = 255, 32


def write_sheet(path: Path, pictures: Sequence[np.ndarray[Any, Any]], labels: Sequence[str]) -> None:
    """Write a sheet of equally large pictures, row by row, in about as many columns as rows of 4:3.

    Args:
        path: file to write; it appears whole or not at all.
        pictures: uint8 [h, w, 3] each.
        labels: one for each picture.

    Raises:
        InputError: the file cannot be written.
    """
    import pyvips

    height, width, _ = pictures[0].shape
    columns = max(1, min(len(pictures), math.ceil(math.sqrt(len(pictures) * 4 / 3 * (height + _LABEL) / width))))
    cells = [_cell(picture, label) for picture, label in zip(pictures, labels, strict=True)]
    sheet = pyvips.Image.arrayjoin(cells, across=columns, shim=_GAP, background=[_WHITE] * 3)
    sheet = sheet.embed(
        _GAP, _GAP, sheet.width + 2 * _GAP, sheet.height + 2 * _GAP, background=[_WHITE] * 3, extend="background"
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            part.write_bytes(sheet.write_to_buffer(path.suffix.lower()))
    except (OSError, pyvips.Error) as error:
        raise_if_exhausted(error)
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise InputError(f"{path}: cannot be written ({reason}); choose another {option('out')}") from error


def _cell(picture: np.ndarray[Any, Any], label: str) -> pyvips.Image:
    """A picture above its label."""
    import pyvips

    image = pyvips.Image.new_from_array(np.ascontiguousarray(picture)).copy(interpretation="srgb")
    cell = image.embed(0, 0, image.width, image.height + _LABEL, extend="background", background=[_WHITE] * 3)
    text = pyvips.Image.text(label, font="sans", dpi=110, width=image.width)
    ink = (text * ((_INK - _WHITE) / 255) + _WHITE).cast("uchar")
    return cell.insert(ink.bandjoin([ink, ink]), 4, image.height + (_LABEL - text.height) // 2)
