"""Values that are rounded to the other of two levels: other threads and instructions, and other tiles, bands and regions.

    python benchmarks/bench_rounding.py threads
    python benchmarks/bench_rounding.py sizes [--count 60] [--seed 0]

``threads``: by how much may pixels differ when a render is resumed on another machine? The default model in bands, 1024x768,
in processes of their own, against one thread and all instructions. Appends rows to results/rounding.csv.

``sizes``: how exact is float32 in tiles, bands and regions? Random sizes of a small RRDBNet and a small SwinIR, two steps,
against the whole image as one tile. Appends a row to results/rounding_sizes.csv.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from harness import add_row, render  # noqa: E402
from support import small  # noqa: E402

import engine  # noqa: E402
from engine.geometry import Box  # noqa: E402
from engine.model.bundle import load  # noqa: E402
from engine.plan.request import Request  # noqa: E402

SIZE = "1024x768"
CASES = {
    "2 threads": {"OMP_NUM_THREADS": "2"},
    "AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
}
"""Changes of the environment."""

WAYS = "tiles", "bands", "batched", "region in tiles", "region in bands"


def process_render(out, precision, changes):
    """Pixels of the image in a process with a changed environment."""
    words = f"render --size {SIZE} --precision {precision} --executor bands --memory 2GiB --out {out} -q".split()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **changes}
    subprocess.run([sys.executable, "-m", "engine", *words], env=environment, check=True, stdout=subprocess.DEVNULL)
    store = engine.open(out)
    return store.read(), store.provenance["instructions"]


def threads():
    with tempfile.TemporaryDirectory() as name:
        for precision in ("fp32", "bf16"):
            usual, instructions = process_render(Path(name) / f"{precision}.zarr", precision, {})
            for index, (case, changes) in enumerate(CASES.items()):
                other, _ = process_render(Path(name) / f"{precision}-{index}.zarr", precision, changes)
                difference = np.abs(usual.astype(int) - other)
                row = {
                    "precision": precision,
                    "usual": f"1 thread, {instructions}",
                    "other": case,
                    "values": usual.size,
                    "differing": int((difference > 0).sum()),
                    "max_levels": int(difference.max()),
                }
                show("rounding", row)


def sizes(count, first):
    torch.set_num_threads(1)
    differing, values, counts, worst, levels = 0, 0, 0, 0.0, 0
    with tempfile.TemporaryDirectory() as name:
        models = []
        for network in (small.rrdb(), small.swinir()):
            folder = Path(name) / str(len(models))
            folder.mkdir()
            models.append(load(small.bundle(folder, network)))
        for seed in range(first, first + count):
            way, difference = compare(models[seed % 2], random.Random(seed))
            other = int((difference > 0).sum())
            print(
                f"seed {seed}, {way}: {other} of {difference.size} values, at most {difference.max()} levels",
                flush=True,
            )
            differing += other > 0
            counts += other
            values += difference.size
            levels = max(levels, int(difference.max()))
            if "region" not in way:  # one value may be many of a small region's
                worst = max(worst, other / difference.size)
    row = {"first": first, "renders": count, "differing_renders": differing, "values": values, "differing": counts}
    show("rounding_sizes", row | {"worst_one_in": round(1 / worst) if worst else "", "max_levels": levels})


def compare(model, chance):
    """A way to render a random size, and the differences of its values from those of one tile."""
    width, height, way = chance.randint(100, 400), chance.randint(100, 400), chance.choice(WAYS)
    common = {
        "size": (width, height),
        "stages": 2,
        "precision": "fp32",
        "seed": chance.randrange(1000),
        "overlap": "exact",
    }
    whole = render(model, Request(**common, executor="tiles", tile=max(width, height)))
    executor = way.split()[-1]
    options = {"executor": executor} | ({"tile": 8 * chance.randint(1, 8)} if executor != "bands" else {})
    if way.startswith("region"):
        x, y = chance.randrange(width - 60), chance.randrange(height - 60)
        box = Box(y, x, y + chance.randint(20, 60), x + chance.randint(20, 60))
        options["roi"] = box
        whole = whole[:, box.y0 : box.y1, box.x0 : box.x1]
    return way, np.abs(render(model, Request(**common, **options)).astype(int) - whole)


def show(name, row):
    print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    add_row(name, row)


def main():
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("part", choices=("threads", "sizes"))
    words.add_argument("--count", type=int, default=60)
    words.add_argument("--seed", type=int, default=0)
    options = words.parse_args()
    if options.part == "threads":
        threads()
    else:
        sizes(options.count, options.seed)


if __name__ == "__main__":
    main()
