"""Standard streams that may be closed, full, or without a reader.

A closed descriptor is opened on the null device first: otherwise the next file would take its number, and messages of
libraries would be written into it.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


class Stream:
    """A text stream that keeps its first error and drops what is written after it.

    Args:
        stream: the stream; None if its descriptor was closed when the process began.

    Attributes:
        error: the first error of a write; None while all is well.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream if stream is not None else open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        self._is_closed = stream is None
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        """Write a text, or drop it. Returns its length."""
        if self._is_closed:
            self._fail(OSError(errno.EBADF, "it is closed"))
        if self.error is None:
            try:
                self._stream.write(text)
            except OSError as error:
                self._fail(error)
            except ValueError:  # closed by a library
                self._fail(OSError(errno.EBADF, "it is closed"))
        return len(text)

    def flush(self) -> None:
        """Flush the stream. Errors are kept, too."""
        if self.error is None:
            try:
                self._stream.flush()
            except OSError as error:
                self._fail(error)
            except ValueError:
                self._fail(OSError(errno.EBADF, "it is closed"))

    def _fail(self, error: OSError) -> None:
        self.error = self.error or error

    def silence(self) -> None:
        """Send a failed stream's buffer nowhere: Python would fail to flush it once more at exit."""
        if self.error is not None and not self._is_closed:
            with suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)
                self._stream.flush()

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._stream, name)


@contextmanager
def lenient_streams() -> Iterator[Stream]:
    """Let writes to stdout and stderr fail without an exception.

    Yields:
        stdout, whose ``error`` says whether results were lost. What stderr loses is dropped.
    """
    _open_closed_descriptors()
    before = sys.stdout, sys.stderr
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be no valid text
    stdout, stderr = Stream(sys.stdout), Stream(sys.stderr)
    sys.stdout, sys.stderr = stdout, stderr
    try:
        yield stdout
    finally:
        for stream in (stdout, stderr):
            stream.flush()
            stream.silence()
        sys.stdout, sys.stderr = before


def _open_closed_descriptors() -> None:
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            with suppress(OSError):
                os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
