"""Bits of one plan under other threads and instructions: the default model, bands, 1024x768.

    python benchmarks/bench_rounding.py

Question: by how much may pixels differ when a render is resumed on another machine? Renders in processes of their own and
compares with one thread and all instructions. Appends rows to results/rounding.csv.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from harness import add_row

import engine

SIZE = "1024x768"
CASES = {
    "2 threads": {"OMP_NUM_THREADS": "2"},
    "AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
}
"""Changes of the environment."""


def render(out, precision, changes):
    """Pixels of the image in a process with a changed environment."""
    words = [
        "render",
        "--size",
        SIZE,
        "--precision",
        precision,
        "--executor",
        "bands",
        "--memory",
        "2GiB",
        "--out",
        out,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **changes}
    subprocess.run(
        [sys.executable, "-m", "engine", *words, "-q"], env=environment, check=True, stdout=subprocess.DEVNULL
    )
    store = engine.open(out)
    return store.read(), store.provenance["instructions"]


def main():
    with tempfile.TemporaryDirectory() as name:
        for precision in ("fp32", "bf16"):
            usual, instructions = render(Path(name) / f"{precision}.zarr", precision, {})
            for index, (case, changes) in enumerate(CASES.items()):
                other, _ = render(Path(name) / f"{precision}-{index}.zarr", precision, changes)
                difference = np.abs(usual.astype(int) - other)
                row = {
                    "precision": precision,
                    "usual": f"1 thread, {instructions}",
                    "other": case,
                    "values": usual.size,
                    "differing": int((difference > 0).sum()),
                    "max_levels": int(difference.max()),
                }
                print(", ".join(f"{k} {v}" for k, v in row.items()), flush=True)
                add_row("rounding", row)


if __name__ == "__main__":
    main()
