"""Peak memory against image size, with one budget and a small network (16 channels, growth 16, 1 block).

    python benchmarks/bench_memory.py [tiles | bands]

Tiles: is memory constant from 4K to half a gigapixel, and below the projection of the plan? Writes results/memory.csv.
Bands: is memory constant in the height, from 8K to 128K rows, linear in the width, and within 10 % of the
projection? Writes results/bands_memory.csv. The command line renders every size in its own process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from harness import publish, small_model
from PIL import Image

HEIGHTS = ("1024x8192", "1024x32768", "1024x131072")
WIDTHS = ("4096x2048", "8192x2048", "16384x2048")
SIZES = ("4096x2160", "8192x4320", "16384x8640", "32768x17280")
TILE, BUDGET = 512, "3GiB"
MIB = 1 << 20


def render(model, size, folder, *options):
    """Run report of one render; the store is deleted with the folder."""
    report = folder / "report.json"
    command = [Path(sys.executable).parent / "engine", "render", model.path, "--size", size, "--memory", BUDGET]
    command += [
        "--precision",
        "fp32",
        "--overlap",
        "8",
        "--out",
        folder / "out.zarr",
        "--overwrite",
        "--report",
        report,
    ]
    subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL)
    return json.loads(report.read_text())


def row_of(size, report, cut):
    width, height = (int(n) for n in size.split("x"))
    measured, projection = report["measured"], report["projection"]
    return {
        "size": size,
        "megapixels": round(width * height / 1e6, 1),
        **cut,
        "budget": BUDGET,
        "stages": len(report["plan"]["stages"]),
        "measured": round(measured["working_peak"] / MIB, 1),
        "projected": round(projection["working"] / MIB, 1),
        "seconds": round(measured["seconds"], 1),
    }


def measure(table, model, folder, sizes, cut, *options):
    for size in sizes:
        row = row_of(size, render(model, size, folder, *options), cut)
        publish(table, row)


def main(kind):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = small_model(folder, 3, channels=16 if kind == "tiles" else 64, blocks=1, growth=16)
        if kind == "tiles":
            measure("memory", model, folder, SIZES, {"tile": TILE}, "--executor", "tiles", "--tile", str(TILE))
        else:
            noise = np.random.default_rng(0)  # incompressible data takes the most memory
            picture = folder / "picture.png"  # step 1 is not tiled and would grow with the height
            for size in (*WIDTHS, *HEIGHTS):
                width, height = (int(n) // 16 for n in size.split("x"))
                Image.fromarray(noise.integers(0, 256, (height, width, 3), np.uint8)).save(picture)
                options = ("--executor", "bands", "--stages", "2", "--init", str(picture))
                measure("bands_memory", model, folder, (size,), {"executor": "bands"}, *options)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "tiles")
