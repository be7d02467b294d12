"""Pictures encoded on several threads: the bytes of Pillow's own way, and no descriptor that stays open."""

import gc
import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.exporters.encode import encode


def pillow(image, **settings):
    buffer = io.BytesIO()
    image.save(buffer, **settings)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "settings",
    [
        {"format": "JPEG", "quality": 85, "subsampling": 2},
        {"format": "PNG", "compress_level": 6},
        {"format": "WEBP", "quality": 80},
    ],
)
def test_bytes_are_pillows(settings):
    """Also those of a picture that is smaller than the one before."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)) for side in (200, 16, 120, 1)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda image: encode(image, **settings), images * 5))
    assert found == [pillow(image, **settings) for image in images * 5]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files with /proc")
def test_files_end_with_their_threads():
    before = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: encode(Image.new("L", (8, 8)), format="PNG"), range(40)))
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_errors_are_pillows():
    with pytest.raises(OSError, match="cannot write mode"):
        encode(Image.new("RGBA", (4, 4)), format="JPEG")
