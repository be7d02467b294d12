"""The colour profile of every exported file."""

from __future__ import annotations

from functools import cache

import pyvips


@cache
def srgb_profile() -> bytes:
    """libvips' built-in sRGB profile (480 bytes, CC0). Without a profile each reader would guess the colours."""
    return bytes(pyvips.Operation.call("profile_load", "srgb"))
