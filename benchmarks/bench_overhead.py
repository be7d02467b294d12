"""The engine's own overhead: time of a render over the time of the bare network on the same tiles, in one run.

    python benchmarks/bench_overhead.py [repeats]

Uses the real network (RRDBNet 64x23, random weights cost the same) on two stages to 1024x768. Each repeat renders, keeping the
very tiles that the network saw, then runs the bare network on them. Writes results/overhead.csv.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from harness import add_row, small_model

from engine.job import Job
from engine.plan.request import Request


def keep(tiles, _network, inputs):
    tiles.append(inputs[0])


def main(repeats):
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        model = small_model(Path(folder), 2, channels=64, blocks=23, growth=32)
        request = Request(size=(768, 1024), stages=2, overlap="24", tile=64)
        for k in range(repeats):
            job = Job(model, request, Path(folder) / f"out{k}.zarr")
            network, tiles = job.stages[0].network, []  # one module serves both stages: their weights are shared
            hook = network.register_forward_pre_hook(partial(keep, tiles))
            start = time.perf_counter()
            for _ in job.run(job.open_sink(resume=False, overwrite=True)):
                pass
            render = time.perf_counter() - start
            hook.remove()
            start = time.perf_counter()
            with torch.inference_mode():
                for tile in tiles:
                    network(tile)
            bare = time.perf_counter() - start
            ratios.append(render / bare)
            print(f"{len(tiles)} tiles: render {render:.2f} s, bare network {bare:.2f} s, ratio {ratios[-1]:.3f}")
    ratio = statistics.median(ratios)
    print(f"median {ratio:.3f}")
    row = {"ratio": ratio, "min": min(ratios), "max": max(ratios)}
    add_row("overhead", {"tiles": len(tiles), "repeats": repeats, **{k: round(v, 4) for k, v in row.items()}})


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
