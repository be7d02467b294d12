"""Reach of border artefacts into an image, and the width of step 1's margin that removes them.

    python benchmarks/bench_margin.py [MODEL ...]

Renders 4096x2160 with margins of 0, 4, 8 and 12 pixels of step 1, three seeds each. The differences of neighbouring pixels, across
each side and along it, are taken at several distances from the side and compared with those 256 to 512 pixels inside, beyond
any border effect; 1 is no frame. Appends to results/margin.csv.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from harness import add_row, render

from engine.model.bundle import DEFAULT, load
from engine.plan.request import Request

MARGINS = (0, 4, 8, 12)
SEEDS = range(3)
SIZE = (4096, 2160)
RINGS = ((0, 2), (2, 8), (8, 32), (32, 64), (64, 128))
INSIDE = (256, 512)


def steps(image):
    """Side -> mean absolute differences across it and along it, at every distance from it."""
    sides = {"top": image, "bottom": image[::-1], "left": image.T, "right": image.T[::-1]}
    near = {side: turned[: INSIDE[1] + 1] for side, turned in sides.items()}
    return {side: [np.abs(np.diff(rows, axis=axis)).mean(1) for axis in (0, 1)] for side, rows in near.items()}


def main(paths):
    for path in paths:
        for margin in MARGINS:
            model, ratios = load(path).with_margin(margin), defaultdict(list)
            for seed in SEEDS:
                image = render(model, Request(size=SIZE, seed=seed)).mean(0, dtype=np.float32)
                for side, (across, along) in steps(image).items():
                    for name, values in (("across", across), ("along", along)):
                        inside = values[slice(*INSIDE)].mean()
                        for first, last in RINGS:
                            ratios[side, name, f"{first}-{last}"].append(values[first:last].mean() / inside)
            for (side, name, ring), values in ratios.items():
                row = {"model": Path(path).stem, "margin": margin, "side": side, "step": name, "pixels": ring}
                add_row("margin", row | {"of_inside": round(float(np.mean(values)), 3), "images": len(SEEDS)})
            for name in ("across", "along"):
                worst = {
                    r: max(np.mean(v) for (_, n, ring), v in ratios.items() if (n, ring) == (name, r))
                    for r in (f"{first}-{last}" for first, last in RINGS)
                }
                text = ", ".join(f"{ring} px {value:.2f}" for ring, value in worst.items())
                print(
                    f"{Path(path).stem}, margin {margin:2}, steps {name}, largest of the four sides: {text}", flush=True
                )


if __name__ == "__main__":
    main(sys.argv[1:] or [str(DEFAULT)])
