"""PNG and JPEG by strips of rows, which several threads encode: no library for Python takes a picture row by row.

PNG: every strip is compressed for itself and ends at a whole byte, so that the strips form one stream of zlib. Rows are
stored as differences from the row above with zlib's least effort: smaller and faster than full effort without.

JPEG: every strip is a baseline picture of its own; what its scan holds goes, between restart markers, into one scan. A
decoder starts again at each marker, as each picture does.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.exporters.about import exif
from engine.exporters.encode import encode
from engine.exporters.pyramid import Pixels
from engine.exporters.rows import STRIP_BYTES
from engine.pixels import PixelFormat
from engine.plan.print_size import MM_PER_INCH

FULL_CHROMA_QUALITY = 90
"""Least JPEG quality without chroma subsampling, as in libvips."""

_EFFORT = 1
"""Level of zlib."""

_UP = 2
"""PNG's filter: every byte less the one above."""

_PNG_COLOUR = {1: 0, 2: 4, 3: 2, 4: 6}
"""Channels -> PNG's colour type."""

_ADLER = 65521
"""Modulus of zlib's checksum."""


class PngEncoder:
    """PNG of 8 or 16 bits.

    Args:
        width, height: size in pixels.
        pixels: channels and depth.
        profile: ICC profile to embed, or None.
        dpi: (horizontal, vertical) resolution in dots per inch.
        about: description of the picture.
    """

    def __init__(
        self,
        width: int,
        height: int,
        pixels: PixelFormat,
        *,
        profile: bytes | None,
        dpi: tuple[float, float],
        about: str,
    ) -> None:
        self.rows = max(1, STRIP_BYTES // (width * pixels.bytes))
        self._size, self._pixels, self._profile, self._dpi, self._about = (width, height), pixels, profile, dpi, about
        self._adler = 1
        self._is_first = True

    def head(self) -> bytes:
        per_metre = [round(each * 1000 / MM_PER_INCH) for each in self._dpi]
        parts = [
            b"\x89PNG\r\n\x1a\n",
            _chunk(b"IHDR", struct.pack(">IIBBBBB", *self._size, self._pixels.depth, _PNG_COLOUR[self._pixels.channels], 0, 0, 0)),
            _chunk(b"iCCP", b"icc\0\0" + zlib.compress(self._profile)) if self._profile is not None else b"",
            _chunk(b"pHYs", struct.pack(">IIB", *per_metre, 1)),
            _chunk(b"eXIf", exif(self._about, self._dpi).removeprefix(b"Exif\0\0")),
        ]  # fmt: skip
        return b"".join(parts)

    def encode(self, pixels: Pixels, above: Pixels | None) -> tuple[bytes, int, int]:
        """Compressed rows, their checksum and their number of bytes."""
        lines = self._bytes(pixels)
        filtered = np.empty((lines.shape[0], 1 + lines.shape[1]), np.uint8)
        filtered[:, 0] = _UP
        np.subtract(lines[0], 0 if above is None else self._bytes(above)[0], out=filtered[0, 1:])
        np.subtract(lines[1:], lines[:-1], out=filtered[1:, 1:])
        stream = zlib.compressobj(_EFFORT, zlib.DEFLATED, -15)
        data = stream.compress(filtered.data) + stream.flush(zlib.Z_SYNC_FLUSH)
        return data, zlib.adler32(filtered.data), filtered.nbytes

    def join(self, part: tuple[bytes, int, int]) -> bytes:
        data, adler, count = part
        start = b"\x78\x01" if self._is_first else b""
        self._is_first = False
        self._adler = _adler_of_both(self._adler, adler, count)
        return _chunk(b"IDAT", start + data)

    def tail(self) -> bytes:
        last = b"\x03\x00"  # an empty block that ends the stream
        return _chunk(b"IDAT", last + struct.pack(">I", self._adler)) + _chunk(b"IEND", b"")

    def _bytes(self, pixels: Pixels) -> NDArray[np.uint8]:
        """Rows of bytes, the high byte of a sample first."""
        if pixels.dtype == np.uint16:
            pixels = pixels.astype(">u2")
        return np.ascontiguousarray(pixels).reshape(pixels.shape[0], -1).view(np.uint8)


class JpegEncoder:
    """Baseline JPEG of 8 bits; transparency is flattened on white.

    Args:
        width, height: size in pixels.
        pixels: channels and depth of the strips.
        quality: 1 to 100.
        profile: ICC profile to embed, or None.
        dpi: (horizontal, vertical) resolution in dots per inch.
        about: description of the picture.
    """

    def __init__(
        self,
        width: int,
        height: int,
        pixels: PixelFormat,
        *,
        quality: int,
        profile: bytes | None,
        dpi: tuple[float, float],
        about: str,
    ) -> None:
        has_chroma = pixels.colours == 3
        is_halved = has_chroma and quality < FULL_CHROMA_QUALITY
        self._unit = 16 if is_halved else 8
        self.rows = max(1, STRIP_BYTES // (width * pixels.bytes * self._unit)) * self._unit
        self._size, self._pixels, self._profile, self._dpi, self._about = (width, height), pixels, profile, dpi, about
        self._settings: dict[str, Any] = {"format": "JPEG", "quality": quality}
        if has_chroma:
            self._settings["subsampling"] = 2 if is_halved else 0
        self._count = 0

    def head(self) -> bytes:
        """Segments of a small picture with the same tables, but the size, and the interval of restarts."""
        small = np.zeros((1, 1, self._pixels.channels), np.uint8)
        about = exif(self._about, self._dpi)
        data = self._save(small, icc_profile=self._profile, dpi=tuple(round(each) for each in self._dpi), exif=about)
        width, height = self._size
        interval = -(-width // self._unit) * (self.rows // self._unit)
        parts = [b"\xff\xd8"]
        for marker, segment in _segments(data):
            if marker == 0xC0:
                segment = segment[:5] + struct.pack(">HH", height, width) + segment[9:]
            if marker == 0xDA:
                parts.append(b"\xff\xdd" + struct.pack(">HH", 4, interval))
            parts.append(segment)
        return b"".join(parts)

    def encode(self, pixels: Pixels, above: Pixels | None) -> bytes:
        """Contents of the scan."""
        data = self._save(_opaque(pixels) if self._pixels.has_alpha else pixels)
        start = 2 + sum(len(segment) for _, segment in _segments(data))
        return data[start:-2]

    def join(self, part: bytes) -> bytes:
        mark = bytes((0xFF, 0xD0 + (self._count - 1) % 8)) if self._count else b""
        self._count += 1
        return mark + part

    def tail(self) -> bytes:
        return b"\xff\xd9"

    def _save(self, pixels: Pixels, **about: Any) -> bytes:  # noqa: ANN401
        colours = pixels[..., : self._pixels.colours]
        picture = Image.fromarray(np.ascontiguousarray(colours[..., 0] if self._pixels.colours == 1 else colours))
        return encode(picture, **self._settings, **about)


def _opaque(pixels: Pixels) -> Pixels:
    """Colours of [H, W, colours and alpha] uint8 on white."""
    alpha = pixels[..., -1:].astype(np.uint16)
    flat: Pixels = ((pixels[..., :-1] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    return flat


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Marker and bytes of every segment of a JPEG up to that of the scan, without the mark of its start."""
    at = 2
    while True:
        marker, length = data[at + 1], struct.unpack_from(">H", data, at + 2)[0]
        yield marker, data[at : at + 2 + length]
        at += 2 + length
        if marker == 0xDA:
            return


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(name)))


def _adler_of_both(first: int, second: int, count: int) -> int:
    """Adler-32 of two texts, one after another, from that of each and the bytes of the second (adler32_combine of zlib)."""
    a, b = (first & 0xFFFF) + (second & 0xFFFF) - 1, (first >> 16) + (second >> 16) + count * ((first & 0xFFFF) - 1)
    return (b % _ADLER) << 16 | a % _ADLER
