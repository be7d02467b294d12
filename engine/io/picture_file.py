"""Opening of picture files by libvips; of PNM and BMP, which the wheel of libvips leaves out, by other means.

The module does not convert colours: its images have the samples of the file.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from engine.errors import InputError
from engine.io.picture_header import BMP, PNM, SAVE_AGAIN, SELDOM_READ, TIFF, check_header, format_of, head

if TYPE_CHECKING:
    import pyvips

DISC_THRESHOLD = "32m"
"""Decoded size above which libvips keeps a picture in a temporary file instead of in memory."""

BMP_PIXELS = 2**25
"""Pixels of the largest BMP, which is decoded in memory at 10 bytes a pixel; a picture of 7680x4320 has fewer."""

_CONVERT = "convert it to PNG, TIFF or JPEG"


@cache
def vips() -> ModuleType:
    """libvips, imported at first use: most renders decode nothing. It reads its threshold from the environment, once."""
    os.environ.setdefault("VIPS_DISC_THRESHOLD", DISC_THRESHOLD)
    import pyvips

    # Its cache of operations goes by file names: a picture that changed would be read as it was.
    pyvips.cache_set_max(0)
    return pyvips  # type: ignore[no-any-return]


@contextmanager
def decoding(path: Path) -> Iterator[None]:
    """Turn an error of libvips into an InputError of one line that names the file and, if it is seldom read, its format."""
    try:
        yield
    except vips().Error as error:
        if (name := format_of(path)) in SELDOM_READ:
            raise InputError(f"{path}: {name} is not read; {_CONVERT}") from error
        if "is not a known file format" in error.detail:
            raise InputError(f"{path}: cannot be read as a picture (unknown format); {_CONVERT}") from error
        detail = error.detail.replace(f"{path}: ", "")
        reason = "; ".join(dict.fromkeys(line.strip() for line in detail.splitlines() if line.strip())) or "damaged"
        raise InputError(f"{path}: cannot be read as a picture ({reason}); {SAVE_AGAIN}") from error


def check_exists(path: Path, kind: str) -> None:
    """Raise InputError unless ``path`` is a readable file; ``kind`` names it in the message."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name one {kind}")
    if not path.is_file():
        raise InputError(f"{path}: no such {kind}")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path}: no permission to read it; change its mode")


def open_upright(path: Path) -> tuple[pyvips.Image, int]:
    """The picture with its EXIF orientation applied, decoded later, and the number of pages or frames in its file.

    Raises:
        InputError: damaged, of a format that is not read, or with samples of unknown meaning.
    """
    name = format_of(path)
    pages = check_header(path, name)
    with decoding(path):
        if name == PNM:
            return _open_pnm(path), 1
        if name == BMP:
            return _open_bmp(path), 1
        image = vips().Image.new_from_file(str(path), fail_on=_strictness(name)).autorot()
        return image, pages or (image.get("n-pages") if image.get_typeof("n-pages") else 1)


def open_thumbnail(path: Path, size: tuple[int, int]) -> pyvips.Image:
    """The upright picture at (height, width), in sRGB but with its alpha, shrunk while it is loaded."""
    height, width = size
    options = {"height": height, "size": "force", "output_profile": "srgb"}
    name = format_of(path)
    with decoding(path):
        if name in (PNM, BMP):
            return open_upright(path)[0].thumbnail_image(width, **options)
        return vips().Image.thumbnail(str(path), width, fail_on=_strictness(name), **options)


def _strictness(name: str) -> str:
    """The lowest severity at which decoding fails.

    libvips only warns about missing strips of a TIFF and fills them with noise. For other formats a warning is harmless.
    """
    return "warning" if name == TIFF else "error"


def _open_pnm(path: Path) -> pyvips.Image:
    """A binary PGM or PPM of 8 or 16 bits, read from the file as it is."""
    space = rb"(?:\s|#[^\n]*\n)+"
    header = re.match(rb"P([56])%b(\d+)%b(\d+)%b(\d+)\s" % (space, space, space), head(path))
    white = int(header[4]) if header else 0
    if header is None or white not in (255, 65535):
        raise InputError(f"{path}: not a binary PGM or PPM whose white is 255 or 65535; {_CONVERT}")
    bands, deep = (1 if header[1] == b"5" else 3), white == 65535
    image = vips().Image.rawload(
        str(path),
        int(header[2]),
        int(header[3]),
        bands,
        offset=header.end(),
        format="ushort" if deep else "uchar",
        interpretation={1: "grey16", 3: "rgb16"}[bands] if deep else {1: "b-w", 3: "srgb"}[bands],
    )
    return image.byteswap() if deep and sys.byteorder == "little" else image


def _open_bmp(path: Path) -> pyvips.Image:
    """A BMP, decoded by Pillow and kept as libvips keeps others: in a temporary file."""
    from PIL import Image

    try:
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
            picture = Image.open(path, formats=["BMP"])
        with picture:
            if picture.width * picture.height > BMP_PIXELS:
                raise Image.DecompressionBombError
            decoded = picture if picture.mode in ("RGB", "RGBA") else picture.convert("RGB")
            pixels, shape = decoded.tobytes(), (decoded.width, decoded.height, len(decoded.getbands()))
    except Image.DecompressionBombError as error:
        limit = f"{BMP_PIXELS / 1e6:.1f} megapixels"
        raise InputError(f"{path}: a BMP is read up to {limit}, and this one is larger; convert it to PNG") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"{path}: cannot be read as a picture ({error}); {SAVE_AGAIN}") from error
    kept = vips().Image.new_temp_file("%s.v")
    vips().Image.new_from_memory(pixels, *shape, "uchar").copy(interpretation="srgb").write(kept)
    return kept
