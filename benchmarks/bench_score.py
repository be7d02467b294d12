"""Samples of a model, rendered and scored in one go by the command line, as a row.

    python benchmarks/bench_score.py MODEL PHOTO [SAMPLES]

50 samples of 4096x2160, as the paper takes. What needs no trained weights: diversity over the photograph's own deviation, the
distance of the rows' colours in levels, and of 7x7 patches at four sizes, in levels, with the photograph's own beside it.
Appends to results/score.csv; nothing of the samples is kept.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from harness import add_row

SIZE = "4096x2160"


def main(model, photo, samples="50"):
    words = ["engine", "score", "--against", photo, "--model", model, "--samples", samples, "--size", SIZE, "--json"]
    start = time.monotonic()
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    row = {"model": Path(model).stem, "size": SIZE, "samples": samples, "seconds": round(time.monotonic() - start)}
    row |= {"diversity": f"{found['diversity']['pixels']:.3f}", "colour": f"{found['mean']['colour_profile']:.2f}"}
    for name, values in (("patches", found["mean"]["patches"]), ("photograph", found["patch_floor"])):
        row[name] = " ".join(f"{value:.2f}" for value in values)
    print(", ".join(f"{key} {value}" for key, value in row.items()))
    add_row("score", row)


if __name__ == "__main__":
    main(*sys.argv[1:])
