"""ICC profiles: named ones, ones read from files, and their descriptions."""

from __future__ import annotations

import hashlib
import io
import struct
from functools import cache
from pathlib import Path

from engine.errors import InputError, option
from engine.io.picture_file import vips
from engine.pixels import PROFILES

LARGEST = 4 << 20
"""Bytes of the largest profile: a store keeps it in its metadata."""

_FIXED = 65536
_ADOBE = {
    # White of the connection space (D50), and primaries adapted to it from D65, as 16.16 fixed-point numbers.
    b"wtpt": (0.95045, 1.0, 1.08905),
    b"rXYZ": (0.60974, 0.31111, 0.01947),
    b"gXYZ": (0.20528, 0.62567, 0.06087),
    b"bXYZ": (0.14919, 0.06322, 0.74457),
}
_ADOBE_GAMMA = 0x0233
"""2.19921875 in 8.8 fixed point, Adobe RGB (1998)'s own."""


def load_profile(value: str | Path) -> bytes:
    """An RGB profile by its name, or from a file.

    Args:
        value: one of ``PROFILES``, or the path of an ICC profile.

    Raises:
        InputError: no such file, or no RGB profile.
    """
    if value == "adobe-rgb":
        return _adobe_rgb()
    if value in PROFILES:
        return bytes(vips().Operation.call("profile_load", value))
    path = Path(value)
    if not path.is_file():
        raise InputError(f"{option('profile', value)}: no such profile; use {', '.join(PROFILES)} or an .icc file")
    if path.stat().st_size > LARGEST:
        raise InputError(f"{path}: {path.stat().st_size} bytes (at most {LARGEST}); use a profile of a colour space")
    data = path.read_bytes()
    if space_of(data) != "RGB":
        raise InputError(f"{path}: not an ICC profile of RGB; use {', '.join(PROFILES)}, or another file")
    return data


def space_of(profile: bytes) -> str:
    """Colour space of a profile: "RGB", "GRAY", "CMYK", ...; empty if it is damaged."""
    from PIL import ImageCms

    try:
        parsed = ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile
        _ = parsed.profile_description  # a text that cannot be decoded is damage
        return parsed.xcolor_space.strip()
    except (OSError, UnicodeDecodeError):
        return ""


def name_of(profile: bytes) -> str:
    """Description of an intact profile, in one line."""
    from PIL import ImageCms

    name = ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.profile_description
    return " ".join((name or "unnamed").split())


def digest_of(profile: bytes) -> str:
    """SHA-256 of a profile."""
    return hashlib.sha256(profile).hexdigest()


@cache
def _adobe_rgb() -> bytes:
    """A profile with the primaries, white and curve of Adobe RGB (1998), version 2. The original may not be copied."""
    curve = struct.pack(">4s4xIH", b"curv", 1, _ADOBE_GAMMA)
    tags = {b"desc": _description("Compatible with Adobe RGB (1998)"), b"cprt": b"text\0\0\0\0CC0\0"}
    tags |= {name: b"XYZ \0\0\0\0" + b"".join(map(_fixed, values)) for name, values in _ADOBE.items()}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    position, table, body = 128 + 4 + 12 * len(tags), b"", b""
    places: dict[bytes, int] = {}
    for name, data in tags.items():
        if data not in places:
            places[data] = position + len(body)
            body += data + b"\0" * (-len(data) % 4)
        table += struct.pack(">4sII", name, places[data], len(data))
    header = struct.pack(
        ">I4sI4s4s4s12s4s4sIIIQI", position + len(body), b"", 0x02100000, b"mntr", b"RGB ", b"XYZ ",
        struct.pack(">6H", 2026, 1, 1, 0, 0, 0), b"acsp", b"", 0, 0, 0, 0, 0,
    ) + b"".join(map(_fixed, (0.9642, 1.0, 0.8249)))  # fmt: skip
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def _fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * _FIXED))


def _description(text: str) -> bytes:
    """A ``textDescriptionType``, whose parts for Unicode and ScriptCode are empty."""
    ascii_text = text.encode() + b"\0"
    return b"desc\0\0\0\0" + struct.pack(">I", len(ascii_text)) + ascii_text + b"\0" * (4 + 4 + 2 + 1 + 67)
