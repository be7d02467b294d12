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
from engine.errors import BudgetError
from engine.forecast import network_times
from engine.plan.canvas import Canvas
from engine.plan.cost import GIB, Projection
from engine.plan.gpus import CONTEXT, GPUS, Gpu
from engine.plan.limits import saturating_pixels
from engine.plan.make import make_plan, project
from engine.plan.measured import BandCost, Budget, Footprint, Measured, MeasuredStage
from engine.plan.plan import Plan
from engine.plan.request import Request
from engine.plan.roofline import Counts, Times
from engine.probe.count import META, WIDTH, as_on, band_counts, tile_bytes, tile_counts
from engine.probe.footprint import band_memory
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

OPERATIONS: dict[str, Gpu | None] = {"PyTorch": GPUS["t4"], "kernels": None}
"""Operations -> a GPU that takes them: PyTorch's alone, or the engine's kernels where they run."""


def planned(
    stage: Stage,
    counts: Counts,
    memory: Footprint | BandCost,
    halo: int,
    size: tuple[int, int],
    gpu: Gpu,
    vram: float,
) -> tuple[Plan, Projection, Times]:
    """Enlarging a picture four times within ``vram`` GiB, in batched tiles or in bands as ``memory`` is of. Raises BudgetError."""
    costs = {"bands": memory} if isinstance(memory, BandCost) else {"tiles": memory}
    weights = sum(t.numel() * t.itemsize for t in stage.network.parameters())
    cost = MeasuredStage(scale=4, align=stage.align, radius=stage.radius, on_device=True, **costs)
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
    plan = make_plan(Request(overlap=str(halo), executor="bands" if "bands" in costs else "batched"), measured)
    projection = project(plan, measured)
    return plan, projection, network_times(plan, projection, [counts], gpu)


def main() -> None:
    for name, (make, halo) in NETWORKS.items():
        for operations, gpu in OPERATIONS.items():
            with as_on(gpu), torch.device("meta"):
                stage = Stage(make().eval().requires_grad_(False), META, "fp16")
                ways: dict[str, tuple[Counts, Footprint | BandCost]] = {
                    "tiles": (tile_counts(stage, gpu), tile_bytes(stage, gpu)),
                    "bands": (band_counts(stage, WIDTH, gpu), band_memory(stage)),
                }
            for way, (counts, memory) in ways.items():
                row: dict[str, object] = {"network": name, "way": way, "operations": operations}
                row |= {
                    "mflop": f"{counts.flops_per_pixel / 1e6:.2f}",
                    "kilobytes": f"{counts.bytes_per_pixel / 1e3:.0f}",
                }
                row |= {"launches": counts.launches}
                row |= {"memory": f"{memory.per_pixel:.0f}" if isinstance(memory, Footprint) else ""}
                print(row, flush=True)
                add_row("forecast_counts", row)
                for card in CARDS:
                    for size, limit in IMAGES.items():
                        for vram in (limit, GPUS[card].memory):
                            try:
                                row = plan_row(stage, counts, memory, halo, size, GPUS[card], vram)
                            except BudgetError as error:
                                print(f"{name}, {way}, {GPUS[card].name}, {size}: {error}", flush=True)
                                continue
                            row = {"network": name, "way": way, "operations": operations, **row}
                            print(row, flush=True)
                            add_row("forecast", row)


def plan_row(
    stage: Stage,
    counts: Counts,
    memory: Footprint | BandCost,
    halo: int,
    size: tuple[int, int],
    gpu: Gpu,
    vram: float,
) -> dict[str, object]:
    """Row of one plan. Raises BudgetError."""
    plan, projection, times = planned(stage, counts, memory, halo, size, gpu, vram)
    last = plan.stages[0]
    height, width = last.tile_shape
    bound, share = next(iter(times.shares.items()))
    return {
        "gpu": gpu.name, "image": f"{size[1]}x{size[0]}", "vram": f"{vram:g}",
        "tile": f"{last.tile} columns" if plan.is_banded else f"{width}x{height}",
        "work": f"{projection.lr_pixels[0] * 16 / (size[0] * size[1]):.3f}",
        "device": f"{projection.device / GIB:.2f}", "seconds": f"{times.total:.3g}",
        "bound": bound, "share": f"{share:.2f}",
    }  # fmt: skip


if __name__ == "__main__":
    main()
