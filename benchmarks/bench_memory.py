"""Peak memory against the size of the image: same budget, same tile, a small network (16 channels, growth 16, 1 block).

    python benchmarks/bench_memory.py [WIDTHxHEIGHT ...]

Question: is memory flat from 4K to half a gigapixel, and below the plan's projection? Every size is rendered by the command line
in a process of its own. Writes results/memory.csv and docs/memory.png.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import RESULTS, add_row, small_model
from matplotlib.figure import Figure

SIZES = ("4096x2160", "8192x4320", "16384x8640", "32768x17280")
TILE, BUDGET = 512, "3GiB"
MIB = 1 << 20


def render(model, size, folder):
    """The run report of one render; the store is deleted with the folder."""
    report = folder / f"{size}.json"
    command = [
        str(Path(sys.executable).parent / "engine"),
        "render",
        str(model.path),
        "--size",
        size,
        "--tile",
        str(TILE),
    ]
    command += ["--memory", BUDGET, "--overlap", "8", "--out", str(folder / f"{size}.zarr"), "--report", str(report)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads(report.read_text())


def plot():
    with (RESULTS / "memory.csv").open() as file:
        rows = {row["size"]: row for row in csv.DictReader(file)}
    rows = sorted(rows.values(), key=lambda row: float(row["megapixels"]))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    x = [float(row["megapixels"]) for row in rows]
    for key, label, style in (("projected", "projected by the plan", "--"), ("measured", "measured peak", "o-")):
        axes.plot(x, [float(row[key]) for row in rows], style, label=label)
    axes.set(xscale="log", ylim=(0, None), xlabel="image size (megapixels)", ylabel="MiB above the idle process")
    axes.set_title(f"memory of a render, tile {TILE}, --memory {BUDGET}")
    axes.legend(loc="lower right")
    figure.savefig(Path(__file__).parent.parent / "docs" / "memory.png", dpi=110)


def main(sizes):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = small_model(folder, 3, channels=16, blocks=1, growth=16)
        for size in sizes:
            report = render(model, size, folder)
            width, height = (int(n) for n in size.split("x"))
            measured, projection = report["measured"], report["projection"]
            row = {
                "size": size,
                "megapixels": round(width * height / 1e6, 1),
                "tile": TILE,
                "budget": BUDGET,
                "stages": len(report["plan"]["stages"]),
                "measured": round(measured["working_peak"] / MIB, 1),
                "projected": round(projection["working"] / MIB, 1),
                "seconds": round(measured["seconds"], 1),
            }
            print(", ".join(f"{k} {v}" for k, v in row.items()), flush=True)
            add_row("memory", row)
    plot()


if __name__ == "__main__":
    main(sys.argv[1:] or SIZES)
