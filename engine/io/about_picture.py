"""Facts of a picture that its store keeps for exporters: the ICC profile and the resolution, as JSON."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

_PROFILE, _DPI = "icc_profile", "dpi"


def about_picture(profile: bytes | None, dpi: tuple[float, float] | None) -> dict[str, Any]:
    """Entries of a store's provenance; none for what is not known.

    Args:
        profile: ICC profile of the pixels.
        dpi: (horizontal, vertical) resolution in dots per inch.
    """
    found: dict[str, Any] = {}
    if profile is not None:
        found[_PROFILE] = base64.b64encode(profile).decode()
    if dpi is not None:
        found[_DPI] = list(dpi)
    return found


def stored_profile(provenance: Mapping[str, Any]) -> bytes | None:
    """ICC profile of a store; None without one, or where the entry is damaged."""
    text = provenance.get(_PROFILE)
    try:
        return base64.b64decode(text, validate=True) if isinstance(text, str) else None
    except binascii.Error:
        return None


def stored_dpi(provenance: Mapping[str, Any]) -> tuple[float, float] | None:
    """(horizontal, vertical) resolution of a store's picture in dots per inch; None where it is not known."""
    dpi = provenance.get(_DPI)
    is_pair = isinstance(dpi, list) and len(dpi) == 2 and all(isinstance(n, int | float) and 0 < n < 1e6 for n in dpi)
    return (float(dpi[0]), float(dpi[1])) if is_pair and isinstance(dpi, list) else None
