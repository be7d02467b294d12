"""Origin of an exported picture, recorded inside it: software, seed, model, licences and the request that made it.

One line of ASCII JSON: the description of a TIFF, and the EXIF description of a flat picture. ``read_description`` finds it
again, so that a repeated command knows what is done.
"""

from __future__ import annotations

import html
import importlib.metadata
import json
from collections.abc import Mapping
from typing import Any

import pyvips
from PIL import Image

REQUEST = "request"
"""Entry of the provenance and of the description: digest of the request that made the picture."""

_KEYS = ("seed", "noise_gain", "model_digest", "licences", REQUEST)
_EXIF, _TIFF = "exif-ifd0-ImageDescription", "image-description"

_DESCRIPTION, _X_RESOLUTION, _Y_RESOLUTION, _RESOLUTION_UNIT = 0x010E, 0x011A, 0x011B, 0x0128
_INCH = 2
"""EXIF's number of the unit."""

_EXIF_CHARACTERS = 30_000
"""Longest description in EXIF, which JPEG limits to 64 KB; libvips keeps the text twice."""

_LONGEST = 1 << 20
"""Characters of a description that are looked at: it comes from a file."""


def description(provenance: Mapping[str, Any]) -> str:
    """The store's provenance in one line of ASCII JSON."""
    plan = provenance.get("plan")
    fields = {**(plan if isinstance(plan, dict) else {}), **provenance}
    return json.dumps({"software": software(), **{key: fields[key] for key in _KEYS if key in fields}})


def software() -> str:
    """Name and version of this package."""
    try:
        return f"ourgan-engine {importlib.metadata.version('ourgan-engine')}"
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that was never installed
        return "ourgan-engine"


def short_description(provenance: Mapping[str, Any]) -> str:
    """``description`` for EXIF: without the licences where they are too long for it."""
    text = description(provenance)
    return text if len(text) <= _EXIF_CHARACTERS else description({**provenance, "licences": ["see the model"]})


def exif(text: str, dpi: tuple[float, float]) -> bytes:
    """EXIF with a description and the (horizontal, vertical) resolution in dots per inch."""
    tags = Image.Exif()
    tags[_DESCRIPTION], tags[_X_RESOLUTION], tags[_Y_RESOLUTION], tags[_RESOLUTION_UNIT] = text, *dpi, _INCH
    return tags.tobytes()


def describe(image: pyvips.Image, provenance: Mapping[str, Any]) -> None:
    """Give a picture of libvips its description in EXIF."""
    image.set_type(pyvips.GValue.gstr_type, _EXIF, short_description(provenance))


def read_description(image: pyvips.Image) -> dict[str, Any]:
    """Description of a picture that this package wrote; empty for any other."""
    fields = set(image.get_fields())
    for name in (_EXIF, _TIFF):
        if name in fields:
            try:
                text = str(image.get(name))[:_LONGEST]
                if text.startswith("<"):  # OME-TIFF has it in its XML
                    text = html.unescape(text[max(0, text.find("{")) :])
                # libvips appends the type and the length to the text of EXIF.
                found, _ = json.JSONDecoder().raw_decode(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(found, dict):
                return found
    return {}
