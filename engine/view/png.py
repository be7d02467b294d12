"""PNG of tiles at once, and of large regions as a stream whose memory is that of one band of rows."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np

from engine.geometry import Box
from engine.growing import Pixels

_SIGNATURE = b"\x89PNG\r\n\x1a\n"

_LEVEL = 1
"""Effort of zlib: pixels of a photograph hardly become smaller with more."""

_BAND_BYTES = 24 << 20
"""Bytes of pixels that are read at once for a stream."""

_SUB = 1
"""Filter of PNG: every sample less its left neighbour."""


def png_of(pixels: Pixels) -> bytes:
    """A PNG file of uint8 [h, w, 3], sRGB, without loss."""
    height, width, _ = pixels.shape
    return b"".join(
        [_head(width, height), _chunk(b"IDAT", zlib.compress(_filtered(pixels), _LEVEL)), _chunk(b"IEND", b"")]
    )


def png_rows(box: Box, read: Callable[[Box], Pixels], rows: int) -> Iterator[bytes]:
    """A PNG file of a region, part by part.

    Args:
        box: the region.
        read: function that reads a part of it.
        rows: height of a row of chunks, at whose borders bands end.
    """
    yield _head(box.width, box.height)
    compress = zlib.compressobj(_LEVEL)
    band = max(1, _BAND_BYTES // (3 * box.width))
    band = band // rows * rows or band
    y = box.y0
    while y < box.y1:
        end = min(box.y1, (y // band + 1) * band)
        data = compress.compress(_filtered(read(Box(y, box.x0, end, box.x1))))
        if data:
            yield _chunk(b"IDAT", data)
        y = end
    yield _chunk(b"IDAT", compress.flush()) + _chunk(b"IEND", b"")


def _filtered(pixels: Pixels) -> bytes:
    height, width, _ = pixels.shape
    lines = np.empty((height, 1 + 3 * width), np.uint8)
    lines[:, 0] = _SUB
    flat = pixels.reshape(height, 3 * width)
    lines[:, 1:4] = flat[:, :3]
    np.subtract(flat[:, 3:], flat[:, :-3], out=lines[:, 4:])
    return lines.tobytes()


def _head(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return _SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"sRGB", b"\0")


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
