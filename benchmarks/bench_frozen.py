"""Error of tiles of a network that looks at the whole picture: with their own statistics, and with frozen ones.

    python benchmarks/bench_frozen.py DAT_light_x2.pth --size 128x64 --core 32x64 --halo 32

The middle of a photograph is run in one tile, in usual tiles, and in tiles that take recorded statistics as constants
(docs/decisions/0033-frozen-statistics.md). Errors are in levels of 255, in float32.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from harness import PHOTOS, add_row

from engine.geometry import Box
from engine.io.photo import PictureSource, TensorSource
from engine.model.bundle import load
from engine.plan.stage import StagePlan
from engine.probe.reach import record
from engine.run.pipeline import tile_chain
from engine.run.stage import Stage

PHOTO = PHOTOS / "picosdeeuropa-crop.jpg"


def sides(text: str) -> tuple[int, int]:
    """(height, width) of WIDTHxHEIGHT."""
    width, height = map(int, text.split("x"))
    return height, width


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", type=Path)
    parser.add_argument("--size", type=sides, default=(64, 128), help="WIDTHxHEIGHT of the part, in LR pixels")
    parser.add_argument("--core", type=sides, default=(64, 32), help="WIDTHxHEIGHT of a tile without its halo")
    parser.add_argument("--halo", type=int, default=32)
    options = parser.parse_args()
    stage = Stage(load(options.network).new_network(0), torch.device("cpu"), "fp32")
    source = PictureSource(PHOTO)
    height, width = options.size
    top, left = ((n - k) // 2 for n, k in zip(source.size, options.size, strict=True))
    part = TensorSource(source.read(Box(top, left, top + height, left + width)))
    whole = StagePlan(
        step=2, height=height, width=width, scale=stage.scale, align=stage.align, halo=0, tile=width, tile_rows=height,
        sigma=0.0,
    )  # fmt: skip
    cut = replace(whole, halo=options.halo).with_core(options.core)
    with tempfile.TemporaryDirectory() as scratch:

        def image(cut: StagePlan, stage: Stage, name: str):
            return tile_chain([cut], [stage], part, seed=0, scratch=Path(scratch, name))[0]

        everything = Box(0, 0, height * stage.scale, width * stage.scale)
        expected = image(whole.with_core(whole.padded), stage, "whole").read(everything)
        tiles = image(cut, stage, "own")
        own = tiles.read(everything)
        statistics, _ = record(tiles, stage.sites, print)
        frozen = image(cut, stage.with_statistics(statistics), "frozen").read(everything)
    for name, result in (("own", own), ("frozen", frozen)):
        error = (result - expected).abs() * 255
        row = {
            "network": options.network.stem,
            "size": f"{width}x{height}",
            "core": "{1}x{0}".format(*options.core),
            "halo": options.halo,
            "statistics": name,
            "sites": len(stage.sites),
            "mean": f"{error.mean():.4f}",
            "max": f"{error.max():.3f}",
        }
        print(row)
        add_row("frozen", row)


if __name__ == "__main__":
    main()
