"""Guards of libvips, which it reads from the environment when it is loaded."""

from __future__ import annotations

import os

MAX_COORD = 1_000_000
"""Largest side of a picture that libvips opens or writes, in pixels. A header of some bytes can claim any size."""


def guard_pictures() -> None:
    """Block loaders that libvips itself does not trust, such as SVG, and sides that no picture has.

    Without effect once pyvips is loaded.
    """
    os.environ["VIPS_BLOCK_UNTRUSTED"] = "1"
    os.environ.setdefault("VIPS_MAX_COORD", str(MAX_COORD))
