"""Headers of picture files: the format, its pages, and samples whose meaning is unknown, which are refused.

libvips guesses where a header says little, and does not report enough of it. The module decodes nothing.
"""

from __future__ import annotations

import logging
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

from engine.causes import raise_if_exhausted
from engine.errors import InputError

CAMERA_RAW, TIFF, PNG, AVIF, BMP, PNM = "camera raw", "TIFF", "PNG", "AVIF", "BMP", "PNM"

SELDOM_READ = (
    "HEIC",
    "PFM",
    "JPEG 2000",
    "JPEG XL",
    "OpenEXR",
    "Radiance HDR",
    "Photoshop",
    "Windows icon",
    "PDF",
    "SVG",
)
"""Formats that libvips does not read, or not from those whom nobody knows (SVG opens other files)."""

_BEGINNINGS = {
    CAMERA_RAW: rb"II\*\0....CR|II(?:RO|RS|U\0)|MMOR|FUJIFILMCCD|....ftypcrx",
    TIFF: rb"II[*+]\0|MM\0[*+]",
    PNG: rb"\x89PNG\r\n\x1a\n",
    AVIF: rb"....ftyp.{0,40}?avi[fs]",
    "HEIC": rb"....ftyp(?:hei|hev|mif|msf)",
    BMP: rb"BM",
    PNM: rb"P[1-7]\s",
    "PFM": rb"P[Ff]\s",
    "JPEG 2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL ",
    "OpenEXR": rb"v/1\x01",
    "Radiance HDR": rb"#\?R",
    "Photoshop": rb"8BPS",
    "Windows icon": rb"\0\0\x01\0",
    "PDF": rb"%PDF-",
    "SVG": rb"\s*<(?:svg|\?xml)",
}
"""Regular expressions of the first bytes, for every format that is treated or named in some way; the first match wins."""

_HEAD = 4096
"""Bytes at the beginning of a file that are searched."""

MAX_PAGES = 1000
"""Pages of a TIFF that are counted: its chain of pages may be a circle."""

_UNCOMPRESSED = 1

_LARGEST_STRIP = 50 << 20
"""Bytes of a compressed strip or tile above which libvips refuses a TIFF."""

_MOST_STRIPS = 1 << 20
"""Strips or tiles whose sizes are looked at."""

_TIFF_BITS = (1, 2, 4, 8, 16)
_TIFF_FLOATS = (16, 32)
_FLOAT_COLOURS = ("MINISBLACK", "RGB")
_FLOAT = 3
_TIFF_KINDS = {1: "uint", 2: "int", 3: "float", 5: "complex int", 6: "complex"}
"""Names of the tag SampleFormat."""
_TIFF_COLOURS = {
    "MINISWHITE": ("grey", 1),
    "MINISBLACK": ("grey", 1),
    "PALETTE": ("a palette", 1),
    "RGB": ("RGB", 3),
    "YCBCR": ("YCbCr", 3),
    "CIELAB": ("CIELAB", 3),
    "SEPARATED": ("CMYK", 4),
}
"""Name, and samples a pixel without alpha, by the tag PhotometricInterpretation."""
_TIFF_ALPHA = (1, 2)
"""Values of the tag ExtraSamples that mean alpha, premultiplied or not."""

_SRGB_PRIMARIES, _SDR_TRANSFERS = (1, 2), (1, 2, 6, 13, 14, 15)
"""CICP codes (ITU-T H.273) of sRGB or unspecified primaries, and of transfer functions that decoders treat as sRGB's."""
_DEVELOP = "develop it to TIFF or JPEG"

_GAMMAS = (0.42, 0.50)
"""Range of a PNG's gamma that sRGB's curve stands for; its own is 0.45455."""

SAVE_AS = "save it as grey, RGB or RGBA of 8 or 16 bits in sRGB"
"""Advice for samples that are not understood."""
SAVE_AGAIN = "save it again or take another"
"""Advice for damaged files."""


def head(path: Path) -> bytes:
    """First bytes of a file."""
    with path.open("rb") as file:
        return file.read(_HEAD)


def format_of(path: Path) -> str:
    """Name of a file's format; empty for any format outside the table."""
    beginning = head(path)
    return next((name for name, magic in _BEGINNINGS.items() if re.match(magic, beginning, re.DOTALL)), "")


def check_header(path: Path, name: str) -> int:
    """Check what libvips would guess or ignore.

    Args:
        path: the file.
        name: its format.

    Returns:
        Pages or frames; 0 if this module does not count them.

    Raises:
        InputError: samples of unknown scale or meaning, or coded for HDR; a raw file of a camera.
    """
    if name == CAMERA_RAW:
        raise InputError(f"{path}: a camera's raw file; {_DEVELOP}")
    if name == TIFF:
        return _check_tiff(path)
    if name == PNG:
        return _check_png(path)
    if name == AVIF:
        _check_avif(path)
    return 0


@cache
def _tifffile() -> ModuleType:
    """tifffile, which takes 0.15 s to import. It logs what it finds odd, and by default that goes to the terminal."""
    import tifffile

    tifffile.logger().addHandler(logging.NullHandler())
    return tifffile


def samples_error(path: Path, kind: str) -> InputError:
    """Error of samples whose white is a guess or unknown to libvips; ``kind`` names their type, such as float32."""
    return InputError(
        f"{path}: {kind} samples are not read (only uint8, uint16, and of a TIFF float16 and float32); {SAVE_AS}"
    )


def _check_tiff(path: Path) -> int:
    """Number of pages at full size."""
    with _parsed(path) as file:
        page = file.pages.first
        pages = sum(not getattr(each, "is_reduced", False) for each in islice(file.pages, MAX_PAGES))
        tags = page.tags
        colours = tags.valueof("PhotometricInterpretation")
        kind, bits, samples, extra = page.sampleformat, page.bitspersample, page.samplesperpixel, page.extrasamples
    colours = getattr(colours, "name", str(colours))
    if page.is_reduced or colours in ("CFA", "LINEAR_RAW"):
        raise InputError(f"{path}: begins with a thumbnail or a camera's raw samples; {_DEVELOP}")
    if colours not in _TIFF_COLOURS:
        raise InputError(f"{path}: a TIFF of unknown colours ({colours}); {SAVE_AS}")
    is_float = kind == _FLOAT and bits in _TIFF_FLOATS and colours in _FLOAT_COLOURS
    if not (is_float or (kind == 1 and bits in _TIFF_BITS)):
        raise samples_error(path, f"{_TIFF_KINDS.get(kind, 'unknown ')}{bits}")
    if colours == "CIELAB" and bits != 16:  # libvips mistakes 8 bits for a format of its own
        raise InputError(f"{path}: CIELAB of {bits} bits is not read (only of 16); {SAVE_AS}")
    name, known = _TIFF_COLOURS[colours]
    alpha = len(extra) == 1 and extra[0] in _TIFF_ALPHA
    if samples != known + alpha:
        kind = f"{name} {'with' if alpha else 'without marked'} alpha has {known + alpha}"
        raise InputError(f"{path}: {samples} samples a pixel, and {kind}; {SAVE_AS}")
    return pages


def largest_strip(path: Path) -> int:
    """Bytes of the largest compressed strip or tile of a TIFF, which libtiff holds while it decodes, from its header.

    Raises InputError for a damaged header.
    """
    with _parsed(path) as file:
        page = file.pages.first
        counts = page.tags.get("StripByteCounts") or page.tags.get("TileByteCounts")
        if counts is None or page.compression == _UNCOMPRESSED:
            return 0
        return _LARGEST_STRIP if counts.count > _MOST_STRIPS else min(max(page.databytecounts), _LARGEST_STRIP)


@contextmanager
def _parsed(path: Path) -> Iterator[Any]:
    """A TIFF, opened by tifffile. Raises InputError where reading it fails."""
    try:
        with _tifffile().TiffFile(path) as file:
            yield file
    except Exception as error:  # tifffile raises whatever a damaged header leads to
        raise_if_exhausted(error)
        raise InputError(f"{path}: cannot be read as a picture (damaged header); {SAVE_AGAIN}") from error


def _check_png(path: Path) -> int:
    """Number of frames."""
    chunks = _png_chunks(path)
    if b"iCCP" not in chunks:
        if (cicp := chunks.get(b"cICP")) is not None and len(cicp) >= 2:
            _check_cicp(path, cicp[0], cicp[1])
        elif b"sRGB" not in chunks and len(gamma := chunks.get(b"gAMA", b"")) == 4:
            (value,) = struct.unpack(">I", gamma)
            if not _GAMMAS[0] <= value / 1e5 <= _GAMMAS[1]:
                raise InputError(f"{path}: its gamma is {value / 1e5:g} (sRGB: 0.45455); convert it to sRGB")
    animation = chunks.get(b"acTL", b"")
    return int.from_bytes(animation[:4], "big") if len(animation) == 8 else 1


def _png_chunks(path: Path) -> dict[bytes, bytes]:
    """First bytes of every chunk before the pixels, by name."""
    chunks: dict[bytes, bytes] = {}
    with path.open("rb") as file:
        file.seek(8)
        while len(header := file.read(8)) == 8:
            length, name = struct.unpack(">I4s", header)
            if name == b"IDAT":
                break
            chunks[name] = file.read(min(length, 8))
            file.seek(length - len(chunks[name]) + 4, 1)
    return chunks


def _check_avif(path: Path) -> None:
    beginning = head(path)
    if re.search(rb"colr(?:prof|rICC)", beginning) is None and (
        codes := re.search(rb"colrnclx(.{4})", beginning, re.S)
    ):
        _check_cicp(path, *struct.unpack(">HH", codes[1]))


def _check_cicp(path: Path, primaries: int, transfer: int) -> None:
    if primaries not in _SRGB_PRIMARIES or transfer not in _SDR_TRANSFERS:
        raise InputError(
            f"{path}: coded for HDR or a wide gamut (CICP primaries {primaries}, transfer {transfer}); convert it to sRGB"
        )
