"""The colour profile that every exported file carries. Knows nothing of pixels."""

from __future__ import annotations

from functools import cache

import pyvips


@cache
def srgb_profile() -> bytes:
    """libvips' built-in sRGB profile (480 bytes, CC0): a file without one is shown at the mercy of its reader."""
    return bytes(pyvips.Operation.call("profile_load", "srgb"))
