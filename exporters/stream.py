"""One level of a pyramid as a virtual, uncompressed BigTIFF that libvips reads through a callback.

A raw format with a shorter header would do as well, but libvips as packaged for Python reads none of them from a callback.

libvips only prints an exception that leaves the callback, takes it for the end of the file, and may report success with
rows missing. So the callback never raises: it keeps the error and ends the file, and ``check`` raises the error.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyvips

from engine.causes import naming, raise_if_exhausted
from engine.errors import EngineError, Interrupted
from engine.exporters.pyramid import Pixels
from engine.exporters.rows import RowReader
from engine.exporters.view import View
from engine.pixels import PixelFormat

STRIP_ROWS = 16
"""Rows per strip of the TIFF. libvips reads strip by strip and holds several of them, at the whole width."""


class LevelStream:
    """A readable, seekable file of one level, which holds one strip.

    Args:
        pyramid: the open store.
        level: index of the level.
        on_rows: called with the number of rows that have been read so far.

    Attributes:
        error: the first error of a read; None while all is well.
    """

    def __init__(self, pyramid: View, level: int, on_rows: Callable[[int], None]) -> None:
        self._level = pyramid.levels[level]
        self._on_rows = on_rows
        self._row_bytes = self._level.width * pyramid.pixels.bytes
        self._header = tiff_header(self._level.height, self._level.width, pyramid.pixels)
        self._size = len(self._header) + self._level.height * self._row_bytes
        self._position = 0
        self._reader = RowReader(pyramid, level)
        self._strip: Pixels | None = None
        self._top = -1
        self.error: BaseException | None = None

    def source(self) -> pyvips.SourceCustom:
        """The file as an input of libvips."""
        source = pyvips.SourceCustom()
        source.on_read(self.read)
        source.on_seek(self.seek)
        return source

    def read(self, length: int) -> bytes | None:
        """Up to ``length`` bytes; None at the end and after an error."""
        if self.error is not None or self._position >= self._size:
            return None
        try:
            chunk = self._slice(length)
        except BaseException as error:
            self.error = error
            return None
        self._position += len(chunk)
        return chunk

    def seek(self, offset: int, whence: int) -> int:
        """Move to ``offset`` relative to ``whence`` (``os.SEEK_...``) and return the new position."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def stop(self, error: BaseException) -> None:
        """End the file at the next read."""
        self.error = self.error or error

    def process(self, work: Callable[[pyvips.Image], None], path: Path, what: str) -> None:
        """Let libvips read all rows, and close the stream.

        Args:
            work: function of the image. It runs in another thread, so that an interrupt reaches this one: it ends the
                stream, and libvips gives up.
            path: file that is written, for messages.
            what: verb and object, for the message of a failure.

        Raises:
            EngineError: libvips failed.
        """
        try:
            with ThreadPoolExecutor(1) as thread:
                try:
                    thread.submit(lambda: work(self._image())).result()
                except pyvips.Error as error:
                    self.check()  # raises the cause, if reading the pyramid failed
                    with naming(path):
                        raise_if_exhausted(error)
                    reason = " ".join(str(error).split())
                    raise EngineError(
                        f"{path}: libvips could not {what} ({reason}); look at the memory and the disk, then repeat the command"
                    ) from error
                except BaseException:
                    self.stop(Interrupted("export stopped"))
                    raise
        finally:
            self.close()
        self.check()

    def _image(self) -> pyvips.Image:
        return pyvips.Image.new_from_source(self.source(), "", access="sequential", fail_on="error")

    def check(self) -> None:
        """Raise the error of a read, if there was one."""
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        """Free the rows."""
        self._reader.close()
        self._strip = None

    def _slice(self, length: int) -> bytes:
        if self._position < len(self._header):
            return self._header[self._position : self._position + length]
        row, column = divmod(self._position - len(self._header), self._row_bytes)
        top = row // STRIP_ROWS * STRIP_ROWS
        if self._strip is None or top != self._top:
            bottom = min(top + STRIP_ROWS, self._level.height)
            self._strip, self._top = self._reader.read(top, bottom), top
            self._on_rows(bottom)
        start = (row - top) * self._row_bytes + column
        return self._strip.reshape(-1).view("uint8")[start : start + length].tobytes()


def vips_interpretation(pixels: PixelFormat) -> str:
    """Name that libvips has for the colours of these pixels."""
    grey, rgb = ("b-w", "srgb") if pixels.depth == 8 else ("grey16", "rgb16")
    return grey if pixels.colours == 1 else rgb


def tiff_header(height: int, width: int, pixels: PixelFormat) -> bytes:
    """The BigTIFF header, directory and strip tables that precede the rows of an image."""
    strips = -(-height // STRIP_ROWS)
    row_bytes = width * pixels.bytes
    tables = 16 + 8 + (10 + pixels.has_alpha) * 20 + 8  # header, number of tags, tags, no next directory
    first = tables + 2 * 8 * strips
    counts = [min(STRIP_ROWS, height - i * STRIP_ROWS) * row_bytes for i in range(strips)]
    offsets = [first + i * STRIP_ROWS * row_bytes for i in range(strips)]
    short, long, long8 = (3, "H"), (4, "I"), (16, "Q")
    tags = [
        _tag(256, long, [width]),
        _tag(257, long, [height]),
        _tag(258, short, [pixels.depth] * pixels.channels),
        _tag(259, short, [1]),  # uncompressed
        _tag(262, short, [1 if pixels.colours == 1 else 2]),  # black is zero, or RGB
        _tag(273, long8, offsets, tables),
        _tag(277, short, [pixels.channels]),  # samples per pixel
        _tag(278, long, [STRIP_ROWS]),
        _tag(279, long8, counts, tables + 8 * strips),
        _tag(284, short, [1]),  # interleaved
        *([_tag(338, short, [2])] if pixels.has_alpha else []),  # alpha by which colours are not multiplied
    ]
    directory = struct.pack("<Q", len(tags)) + b"".join(tags) + struct.pack("<Q", 0)
    return struct.pack("<2sHHHQ", b"II", 43, 8, 0, 16) + directory + struct.pack(f"<{2 * strips}Q", *offsets, *counts)


def _tag(code: int, field_type: tuple[int, str], values: list[int], offset: int = 0) -> bytes:
    """A directory entry; values of more than 8 bytes are stored at ``offset``."""
    number, letter = field_type
    value = struct.pack(f"<{len(values)}{letter}", *values)
    value = value if len(value) <= 8 else struct.pack("<Q", offset)
    return struct.pack("<HHQ", code, number, len(values)) + value.ljust(8, b"\0")
