"""Bounded memory of exports: the peak of a fresh process above its baseline.

VmHWM is read instead of ru_maxrss, which survives exec: a child of a large test process would inherit its peak and any
bound would hold.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures with /proc")

MB = 1 << 20

PROBE = """
import sys
from pathlib import Path
import engine.exporters.deepzoom, engine.exporters.preview, engine.exporters.tiff
from engine.exporters import export

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

baseline = peak()
options = {"workers": 2} if sys.argv[2].endswith((".tif", ".dzi")) else {}
export(Path(sys.argv[1]), Path(sys.argv[2]), **options)
print(peak() - baseline)
"""


@pytest.fixture(scope="module")
def stores(tmp_path_factory, picture, write_store):
    """8192 x 8192 (201 MB of pixels) and two strips, one four times as wide as the other."""
    folder = tmp_path_factory.mktemp("stores")
    block = picture(512, 512)
    shapes = {"square": (8192, 8192), "narrow": (1024, 8192), "wide": (1024, 32768)}
    paths = {}
    for name, (height, width) in shapes.items():
        full = np.tile(block, (height // 512, width // 512, 1))
        levels = [full[:: 2**i, :: 2**i] for i in range(4)]
        paths[name] = write_store(folder / f"{name}.zarr", levels, shard=1024, chunk=512)
    return paths


def peak(store, out):
    environment = os.environ | {"VIPS_CONCURRENCY": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROBE, store, out]
    return int(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


@pytest.mark.slow  # the bound of a wide strip below is the same promise
def test_tiff_does_not_hold_the_image(stores, tmp_path):
    assert peak(stores["square"], tmp_path / "a.tif") < 128 * MB


@pytest.mark.parametrize("suffix", [".tif", ".dzi", ".png", ".jpg"])
def test_memory_is_flat_with_the_width(stores, tmp_path, suffix):
    narrow, wide = (peak(stores[name], tmp_path / f"{name}{suffix}") for name in ("narrow", "wide"))
    assert wide < 128 * MB
    assert wide - narrow < 32 * MB
