"""Count networks as a GPU would run them, and forecast renders of enlarged pictures on GPUs that are not there.

    python benchmarks/bench_forecast.py

Nothing here is measured: operations and live bytes are counted on PyTorch's meta device, and ceilings are published ones
(engine/plan/gpus.py). Rows go to benchmarks/results/forecast_counts.csv and forecast.csv; docs/results.md shows them as forecasts.
"""

from __future__ import annotations

import torch
from harness import add_row

from engine.archs.esrgan import RRDBNet
from engine.archs.swinir import SwinIR
from engine.forecast import network_times
from engine.plan.canvas import Canvas
from engine.plan.cost import GIB
from engine.plan.gpus import CONTEXT, GPUS, Gpu
from engine.plan.limits import saturating_pixels
from engine.plan.make import make_plan, project
from engine.plan.measured import Budget, Footprint, Measured, MeasuredStage
from engine.plan.request import Request
from engine.plan.roofline import Counts
from engine.probe.count import META, WIDTH, band_counts, tile_bytes, tile_counts
from engine.run.stage import Stage

NETWORKS = {
    "RRDBNet 64x23": (lambda: RRDBNet(), 40),
    "RRDBNet 64x3": (lambda: RRDBNet(blocks=3), 14),
    "SwinIR-M": (lambda: SwinIR(), 40),
}
"""Name -> (network, halo that a render takes)."""

IMAGES = {(2160, 4096): 1.0, (8640, 16384): 1.25, (34560, 65536): 1.25}
"""(height, width) -> limit of VRAM in GiB."""

CARDS = ("rtx-3060", "rtx-4090", "h100")
UNLIMITED = 1 << 60


def planned(stage: Stage, counts: Counts, memory: Footprint, halo: int, size: tuple[int, int], gpu: Gpu, vram: float):
    """(plan, projection, times) of enlarging a picture four times within ``vram`` GiB."""
    weights = sum(t.numel() * t.itemsize for t in stage.network.parameters())
    cost = MeasuredStage(scale=4, align=stage.align, radius=stage.radius, tiles=memory, on_device=True)
    measured = Measured(
        canvas=Canvas(size, (size[0] // 4, size[1] // 4), 1),
        stages=(cost,),
        base=None,
        baseline=0,
        device_baseline=CONTEXT + weights,
        budget=Budget(UNLIMITED, int(vram * GIB), UNLIMITED),
        precisions=("fp16",),
        device="cuda",
        saturating=saturating_pixels(gpu.multiprocessors, gpu.cache << 20),
    )
    plan = make_plan(Request(overlap=str(halo), executor="batched"), measured)
    projection = project(plan, measured)
    return plan, projection, network_times(plan, projection, [counts], gpu)


def main() -> None:
    for name, (make, halo) in NETWORKS.items():
        with torch.device("meta"):
            stage = Stage(make().eval().requires_grad_(False), META, "fp16")
        counts, memory = tile_counts(stage), tile_bytes(stage)
        for way, counted in (("tiles", counts), (f"bands of {WIDTH} columns", band_counts(stage, WIDTH))):
            row = {"network": name, "way": way, "mflop": f"{counted.flops_per_pixel / 1e6:.2f}"}
            row |= {"kilobytes": f"{counted.bytes_per_pixel / 1e3:.0f}", "launches": counted.launches}
            row |= {"memory": f"{memory.per_pixel:.0f}" if way == "tiles" else ""}
            print(row, flush=True)
            add_row("forecast_counts", row)
        for card in CARDS:
            for size, limit in IMAGES.items():
                for vram in (limit, GPUS[card].memory):
                    plan, projection, times = planned(stage, counts, memory, halo, size, GPUS[card], vram)
                    height, width = plan.stages[0].tile_shape
                    bound, share = next(iter(times.shares.items()))
                    row = {
                        "network": name, "gpu": GPUS[card].name, "image": f"{size[1]}x{size[0]}", "vram": f"{vram:g}",
                        "tile": f"{width}x{height}", "tiles": projection.tasks[0], "batch": projection.batches[0],
                        "work": f"{projection.lr_pixels[0] * 16 / (size[0] * size[1]):.3f}",
                        "device": f"{projection.device / GIB:.2f}", "seconds": f"{times.total:.3g}",
                        "bound": bound, "share": f"{share:.2f}",
                    }  # fmt: skip
                    print(row, flush=True)
                    add_row("forecast", row)


if __name__ == "__main__":
    main()
