"""Overhead of the engine: time of a render divided by the time of the network alone on the same tiles, in one run.

    python benchmarks/bench_overhead.py [repeats]

Runs RRDBNet 64x23 (random weights cost the same) in two steps to 1024x768. Each repeat renders, keeps the input tiles of the
network, then runs the network alone on them. Writes results/overhead.csv.
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
        request = Request(size=(1024, 768), stages=2, overlap="24", tile=64)
        for k in range(repeats):
            job = Job.prepare(model, request, Path(folder) / f"out{k}.zarr")
            network, tiles = job.stages[0].network, []  # one module serves both steps, which share weights
            hook = network.register_forward_pre_hook(partial(keep, tiles))
            start = time.perf_counter()
            for _ in job.run(job.open_sink(resume=False, overwrite=True)):
                pass
            render_seconds = time.perf_counter() - start
            hook.remove()
            start = time.perf_counter()
            with torch.inference_mode():
                for tile in tiles:
                    network(tile)
            network_seconds = time.perf_counter() - start
            ratios.append(render_seconds / network_seconds)
            times = f"render {render_seconds:.2f} s, network alone {network_seconds:.2f} s"
            print(f"{len(tiles)} tiles: {times}, ratio {ratios[-1]:.3f}")
    ratio = statistics.median(ratios)
    print(f"median {ratio:.3f}")
    row = {"ratio": ratio, "min": min(ratios), "max": max(ratios)}
    add_row("overhead", {"tiles": len(tiles), "repeats": repeats, **{k: round(v, 4) for k, v in row.items()}})


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
