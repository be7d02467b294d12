"""Causes behind the exceptions of libraries: the error of the system, its path, and exhausted memory.

PyTorch, safetensors and libvips report a full disk or exhausted memory as exceptions of their own, often without the path.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

EXHAUSTED = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM})
"""Errors of the machine, not of the path that was named: space, quota, file size, hardware, descriptors, memory."""

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Errors of a file system that takes no more bytes."""

_NUMBER = re.compile(r"(?:os error|code:) (\d+)")
"""Rust's text of an error of the system, which safetensors passes on."""

_MAPPED = re.compile(r"unable to \w+ .*<(.*)>.*: .* \((\d+)\)", re.DOTALL)
"""PyTorch's text of an error of the system with a file that it maps."""

_VIPS = re.compile(r"system error: (.+)")
"""libvips' text of an error of the system."""

_MEMORY = re.compile(
    r"allocate memory|out of memory|bad_alloc|tried to allocate|not enough memory"
    r"|could not create a (?:primitive|memory)"  # oneDNN
    r"|libdeflate_alloc_compressor"
)

_PILLOW = re.compile(r"encoding error [12]|(?:codec configuration|out of memory) error when writing image file")
"""Pillow's texts of exhausted memory: libwebp's VP8_ENC_ERROR_OUT_OF_MEMORY and VP8_ENC_ERROR_BITSTREAM_OUT_OF_MEMORY, a stream
of zlib that cannot be made, and its own."""


def system_error(error: BaseException) -> OSError | None:
    """The error of the system behind an exception; None if there is none. It may lack a path."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if isinstance(current, OSError) and current.errno is not None:
            return current
        if (match := _NUMBER.search(str(current))) and type(current).__module__.startswith("safetensors"):
            number = int(match[1])
            return OSError(number, os.strerror(number))
        if isinstance(current, RuntimeError) and (match := _MAPPED.match(str(current))):
            return OSError(int(match[2]), os.strerror(int(match[2])), match[1])
        if type(current).__module__.startswith("pyvips") and (match := _VIPS.search(str(current))):
            number = next((each for each in EXHAUSTED if os.strerror(each) == match[1].strip()), 0)
            if number:
                return OSError(number, os.strerror(number))
        # PyTorch's writer raises a RuntimeError while it handles the system's error; other contexts are chance.
        is_torch = isinstance(current, RuntimeError) and not current.__suppress_context__
        current = current.__cause__ or (current.__context__ if is_torch else None)
    return None


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give errors of the system a path: writing to an open file raises them without one.

    Raises:
        OSError: as the block, with ``path`` where it named none; also in place of a library's exception for it.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    except Exception as error:
        cause = system_error(error) if _is_of_library(error) else None
        if cause is None:
            raise
        raise OSError(cause.errno, cause.strerror, str(cause.filename or path)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception, of whatever class, means that memory is exhausted."""
    if isinstance(error, OSError | ValueError) and _PILLOW.fullmatch(str(error)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or bool(_is_of_library(error) and _MEMORY.search(str(error)))


def _is_of_library(error: BaseException) -> bool:
    """Whether an exception is of PyTorch, safetensors or libvips, as far as its class says."""
    return isinstance(error, RuntimeError) or type(error).__module__.startswith(("pyvips", "safetensors"))


def raise_if_exhausted(error: Exception) -> None:
    """Raise an exception again that says nothing of the file it was met in: memory, threads or descriptors are exhausted,
    or the disk failed.

    Where any other exception means a damaged file, this goes first: a file must not be called damaged, or be removed, for
    want of memory.
    """
    system = system_error(error)
    is_machine = system is not None and system.errno in EXHAUSTED
    if is_machine or is_out_of_memory(error) or is_out_of_threads(error):
        raise error


def is_out_of_threads(error: BaseException) -> bool:
    """Whether an exception means that no further thread can be started."""
    return isinstance(error, RuntimeError) and "can't start new thread" in str(error)
