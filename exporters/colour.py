"""The colour profile of files whose store has none of its own."""

from __future__ import annotations

from functools import cache

import pyvips


@cache
def srgb_profile() -> bytes:
    """libvips' built-in sRGB profile (480 bytes, CC0). Without a profile each reader would guess the colours."""
    return bytes(pyvips.Operation.call("profile_load", "srgb"))
