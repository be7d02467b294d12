"""Pictures encoded by Pillow on several threads at once.

Pillow releases Python's lock only while it writes to a descriptor, not while it writes to ``io.BytesIO``. So each thread has
a file in memory. Two threads encode twice as many tiles as one.
"""

from __future__ import annotations

import io
import os
import threading
from typing import Any

from PIL import Image


class _Scratch:
    """A file in memory that is closed with its thread."""

    def __init__(self) -> None:
        self.file = os.fdopen(os.memfd_create("picture"), "w+b", buffering=0)

    def __del__(self) -> None:
        self.file.close()


_threads = threading.local()


def encode(picture: Image.Image, **settings: Any) -> bytes:  # noqa: ANN401 (Pillow's own)
    """Bytes of a picture; ``settings`` are those of ``Image.save``, with the format."""
    if not hasattr(os, "memfd_create"):  # outside Linux
        buffer = io.BytesIO()
        picture.save(buffer, **settings)
        return buffer.getvalue()
    if not hasattr(_threads, "scratch"):
        _threads.scratch = _Scratch()
    file = _threads.scratch.file
    file.seek(0)
    picture.save(file, **settings)
    # The file may be longer: the pages of a larger picture are kept for the next one.
    return os.pread(file.fileno(), file.tell(), 0)
