"""The first look at a render: the image that its networks start from, small, in the metadata of the unfinished store.

A viewer shows it, enlarged, where pixels are not finished. ``ZarrSink.finish`` removes it, so that equal renders are equal
files.
"""

from __future__ import annotations

import base64
import binascii
import io
from typing import Any

import numpy as np
from PIL import Image

FIRST_LOOK = "first_look"
"""Entry of the provenance: a WebP picture of the whole written image, in base64."""

MAX_SIDE = 512
"""Longer side in pixels. Step 1's image is smaller for canvases up to 32768 pixels and three enlargements."""

_MAX_TEXT = 400_000
"""Characters of an entry that is read."""

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def encode_first_look(pixels: Pixels) -> str:
    """Text of the entry for uint8 [h, w, 3] of any size."""
    image = Image.fromarray(pixels)
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.BOX)
    file = io.BytesIO()
    image.save(file, "WEBP", quality=80)
    return base64.b64encode(file.getvalue()).decode("ascii")


def decode_first_look(text: object) -> Image.Image | None:
    """The picture of an entry; None where there is none, or where it is damaged."""
    if not isinstance(text, str) or len(text) > _MAX_TEXT:
        return None
    try:
        image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["WEBP"])
        if max(image.size) > MAX_SIDE:
            return None
        return image.convert("RGB")
    except (OSError, ValueError, binascii.Error, SyntaxError):
        return None
