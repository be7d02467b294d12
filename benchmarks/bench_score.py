"""Samples of a model, rendered and scored by one command, as one row.

    python benchmarks/bench_score.py MODEL PHOTO [SAMPLES]

50 samples of 4096x2160, as in the paper, and the measures without trained weights: diversity relative to the photograph's own
deviation, distance of the rows' mean colours in levels, and distance of 7x7 patches at four sizes in levels, with the
photograph's own beside it. Appends to results/score.csv; the samples are deleted.
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
    command = ["engine", "score", "--against", photo, "--model", model, "--samples", samples, "--size", SIZE, "--json"]
    start = time.monotonic()
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    scores = json.loads(process.stdout)
    row = {"model": Path(model).stem, "size": SIZE, "samples": samples, "seconds": round(time.monotonic() - start)}
    row |= {"diversity": f"{scores['diversity']['pixels']:.3f}", "colour": f"{scores['mean']['colour_profile']:.2f}"}
    for name, values in (("patches", scores["mean"]["patches"]), ("photograph", scores["patch_floor"])):
        row[name] = " ".join(f"{value:.2f}" for value in values)
    print(", ".join(f"{key} {value}" for key, value in row.items()))
    add_row("score", row)


if __name__ == "__main__":
    main(*sys.argv[1:])
