"""Simulate many workers that render a terapixel into an object store: discrete events, deterministic by seed.

    python benchmarks/simulate_workers.py

Nothing here runs a network. The work is the plan of ``engine plan --size 1048576x1048576 --workers N``: 1,048,576 shards of 1024
pixels and 349,525 of the pyramid. The seconds of a shard are planned, not measured: the hours of that command, without step 1,
by the number of shards. The bytes of a shard are measured (store_bytes.csv). The rest is assumed: failures, stragglers, strips
narrow enough for as many shares as are asked for, and the limits of an object store (3,500 requests to put a second for each
prefix, 10 GB/s in all).

Ways to divide the work:

one share                   For each worker. The slowest worker ends last.
eight shares                For each worker, taken in order by whoever is free, as xargs -P and job arrays do.
eight shares, 64 prefixes   As before, with requests spread over 64 prefixes. The engine does not do that.

Writes results/simulation.csv and docs/images/simulation.png.
"""

from __future__ import annotations

import csv
import heapq
import random
from dataclasses import dataclass
from pathlib import Path

from harness import RESULTS, add_row

SHARDS = 1 << 20
ROW = 1 << 10
"""Shards of a row, in order of which shares are ranges."""
PYRAMID = 4 / 3
SHARD_PIXELS = 1 << 20
START_SECONDS = 30.0
"""Start of a worker: its container, the model and the plan; step 1 is not counted, as a picture replaces it at this size."""
FAILURES_PER_HOUR = 0.02
STRAGGLERS, SLOWER = 0.03, 2.5
"""Share of workers that run slower, and by how much."""
PUTS_PER_SECOND, BYTES_PER_SECOND = 3500.0, 10e9
SEEDS = range(5)
COUNTS = (1, 8, 64, 256, 512, 1000)


@dataclass(frozen=True)
class Device:
    """A kind of worker."""

    shard_seconds: float
    """Seconds of a shard: ``engine plan --workers 64`` says 1,160 hours of two cores without step 1, and 16 hours of a GPU."""
    warm_rows: float
    """Rows of shards that a share of bands repeats in three steps of the default model: 203 and 354 rows of pixels of 1024. A
    GPU computes whole bands at both ends of a share.
    """


DEVICES = {"CPU": Device(4.0, 0.2), "RTX 4090": Device(0.055, 0.35)}


@dataclass(frozen=True)
class Way:
    """A way to divide the work."""

    per_worker: int
    """Shares for each worker."""
    prefixes: int
    """Prefixes of the object store that requests spread over."""


WAYS = {"one share": Way(1, 1), "eight shares": Way(8, 1), "eight shares, 64 prefixes": Way(8, 64)}


def stored_bytes() -> float:
    """Bytes of a shard in the store, by the latest row of store_bytes.csv."""
    with (RESULTS / "store_bytes.csv").open(newline="") as file:
        return float(list(csv.DictReader(file))[-1]["ratio"]) * SHARD_PIXELS * 3


def simulate(workers: int, way: Way, device: Device, seed: int) -> float:
    """Hours until the last share ends."""
    shard_seconds = device.shard_seconds
    chance = random.Random(f"{workers} {way} {shard_seconds} {seed}")
    slow = [SLOWER if chance.random() < STRAGGLERS else 1.0 for _ in range(workers)]
    shares = min(workers * way.per_worker, SHARDS)
    count = SHARDS / shares
    warm = device.warm_rows * min(ROW, count) * (shares > 1)
    # All workers share the store: each gets its part of the requests and of the bandwidth.
    put = max(PYRAMID / (PUTS_PER_SECOND * way.prefixes), PYRAMID * stored_bytes() / BYTES_PER_SECOND)
    queue = [(START_SECONDS * slow[k], k) for k in range(workers)]
    heapq.heapify(queue)
    end, left = 0.0, shares
    while left:
        now, worker = heapq.heappop(queue)
        left -= 1
        compute = (count + warm) * shard_seconds * slow[worker]
        time = max(compute, count * put * workers)  # writes go on beside the computing, until the store binds
        hours = time / 3600
        failures = sum(chance.random() < FAILURES_PER_HOUR * hours / 20 for _ in range(20))
        time += failures * (
            START_SECONDS + (warm + ROW) * shard_seconds * slow[worker]
        )  # the row in hand, and a new warm-up
        end = max(end, now + time)
        heapq.heappush(queue, (now + time, worker))
    return end / 3600


def ideal(workers: int, shard_seconds: float) -> float:
    """Hours of equal workers without a start, a failure or a warm-up."""
    return SHARDS * shard_seconds / workers / 3600


def main() -> None:
    """Simulate all numbers of workers, and draw the efficiencies."""
    found: dict[tuple[str, str], list[float]] = {}
    for kind, device in DEVICES.items():
        for name, way in WAYS.items():
            for workers in COUNTS:
                hours = sorted(simulate(workers, way, device, seed) for seed in SEEDS)
                efficiency = ideal(workers, device.shard_seconds) / hours[len(hours) // 2]
                found.setdefault((kind, name), []).append(efficiency)
                add_row("simulation", {
                    "device": kind, "way": name, "workers": workers, "shares": workers * way.per_worker,
                    "hours": f"{hours[len(hours) // 2]:.3g}", "worst_hours": f"{hours[-1]:.3g}",
                    "efficiency": f"{efficiency:.3f}", "seeds": len(SEEDS),
                })  # fmt: skip
    plot(found)


def plot(found: dict[tuple[str, str], list[float]]) -> None:
    """Efficiency over the number of workers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    for axes, device in zip(figure.subplots(1, 2, sharey=True), DEVICES, strict=True):
        for name in WAYS:
            axes.plot(COUNTS, found[device, name], marker="o", label=name)
        axes.set(xscale="log", xlabel="workers", title=f"1,048,576 x 1,048,576, {device}", ylim=(0, 1.05))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("efficiency (simulated)")
    figure.axes[0].legend()
    target = Path(__file__).parents[1] / "docs" / "images" / "simulation.png"
    target.parent.mkdir(exist_ok=True)
    figure.savefig(target, dpi=80)


if __name__ == "__main__":
    main()
