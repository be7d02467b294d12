"""Seam error by halo, for real weights on real photographs.

    python benchmarks/bench_seams.py [realsr x4plus]

Question: which halo, in low-resolution pixels, keeps the seam error below a given level? Writes results/seams.csv, one row per
halo.
"""

from __future__ import annotations

import sys

from harness import PHOTOS, add_row

from engine import archs
from engine.model.checkpoints import read_checkpoint
from engine.model.packaged import find_packaged
from engine.probe.content import photograph_crops
from engine.probe.erf import effective_radius
from engine.probe.seam import seam_curve

HALOS = (0, 4, 10, 16, 24, 32, 48, 64, 96)


def main(names):
    for name in names:
        network = archs.build(read_checkpoint(find_packaged(name)))
        content = [c for photo in sorted(PHOTOS.glob("*.jpg")) for c in photograph_crops(photo, network.align)[:1]]
        absolute, square = effective_radius(network, content, network.scale, network.align)
        curve, _ = seam_curve(network, content, network.scale, network.align)
        points = {p.halo: p for p in curve}
        print(f"{name}: R98 {absolute.get('0.98', 'beyond the crop')} by |g|, {square.get('0.98')} by g^2")
        print("halo   mean   99.9 %   max  (levels of 255)")
        for halo in HALOS:
            if (p := points.get(halo)) is None:
                continue
            print(f"{halo:4} {p.mean:6.2f} {p.p999:8.2f} {p.max:6.2f}")
            radii = {"r98_abs": absolute.get("0.98", ""), "r98_square": square.get("0.98", "")}
            add_row("seams", {"weights": name, **radii, "halo": halo, "mean": p.mean, "p999": p.p999, "max": p.max})


if __name__ == "__main__":
    main(sys.argv[1:] or ["realsr", "x4plus"])
