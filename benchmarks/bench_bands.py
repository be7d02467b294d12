"""Rendering in bands compared with the whole image, with tiles and with RealESRGANer's tiles, with real weights.

    python benchmarks/bench_bands.py [exact] [work] [time] [widths] [beside]

exact   Difference from the whole image in float32, for RRDBNet 64x23 (RealSR-DF2K), SwinIR-M (amplified random weights) and a
        chain of two RRDBNets: one strip, strips with the exact halo, two band heights, random first rows. Writes
        results/bands_exact.csv.
work    Multiply-adds executed, relative to those of the whole image, for a 16384x8640 frame; counted in a narrow column of it.
        Writes results/bands_work.csv.
time    Seconds for a 16384x8640 frame: bands in one strip; tiles as planned for 3 GiB (auto halo); tiles of 512 with 10 pixels
        of padding as in RealESRGANer (plain PyTorch, float32). The methods run in turn on parts of the frame, and their times
        are scaled to it. Writes results/bands_time.csv.
widths  Microseconds for each input pixel of pictures of 256 rows and 256 to 4096 columns in bfloat16. Writes
        results/bands_widths.csv.
beside  Gain from writing shards while the next are computed, over writing each before the next: a render of noise, which
        compresses worst, by a network so small that writing matters. Writes results/bands_beside.csv.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
import unittest.mock
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path

import torch
from bench_exact import networks, whole_image
from harness import PHOTOS, publish, small_model
from PIL import Image

from engine import archs
from engine.bands.stream import RowStream, StreamPlan
from engine.container import cpu_count
from engine.geometry import Box
from engine.io.photo import PictureSource, TensorSource
from engine.job import Job
from engine.model.build import build
from engine.model.checkpoints import read_checkpoint
from engine.model.packaged import find_packaged
from engine.plan.canvas import Canvas
from engine.plan.cost import GIB
from engine.plan.halo import HaloPolicy
from engine.plan.measured import Budget, Measured, MeasuredStage
from engine.plan.request import Request
from engine.plan.stage import StagePlan, step_of
from engine.plan.tiles import choose_tiles
from engine.probe.footprint import stage_footprint
from engine.probe.profiles import measure_profiles
from engine.run.pipeline import row_chain
from engine.run.rows import RowStreams
from engine.run.stage import Stage

FRAME = (2160, 4096)  # LR pixels of 16384 x 8640
CPU = torch.device("cpu")


def photo(height, width):
    """Photograph [3, height, width], mirrored where it is too small."""
    source = PictureSource(PHOTOS / "picosdeeuropa-crop.jpg")
    picture = source.read(Box(0, 0, *source.size))
    while picture.shape[1] < height:
        picture = torch.cat([picture, picture.flip(1)], 1)
    while picture.shape[2] < width:
        picture = torch.cat([picture, picture.flip(2)], 2)
    return picture[:, :height, :width].contiguous()


class Streams(RowStreams):
    """Row streams with bands of a given height."""

    def __init__(self, band):
        super().__init__()
        self._band = band

    def of(self, position, stage, width, queue):
        return RowStream(StreamPlan(stage.graph, self._band, width, 4, workers=cpu_count()))


def exact_cuts(stages, size, **changes):
    """Cuts of a chain with exact halos, over an image of ``size``."""
    cuts = []
    for position, stage in enumerate(stages):
        halo = -(-stage.radius // stage.align) * stage.align
        fields = {"halo": halo, "tile": stage.align, "sigma": 0.0} | changes
        cuts.append(
            StagePlan(
                step=step_of(position), height=size[0], width=size[1], scale=stage.scale, align=stage.align, **fields
            )
        )
        size = cuts[-1].grid.bounds.shape
    return cuts


def streamed(stages, image, band, strip, first=0):
    """Output of a chain of stages from row ``first`` on, in strips of ``strip`` output columns."""
    cuts, parts = exact_cuts(stages, image.shape[1:], band=band), []
    width = cuts[-1].grid.width
    for x in range(0, width, strip):
        columns = (x, min(x + strip, width))
        rows = row_chain(cuts, stages, TensorSource(image), columns, seed=0, streams=Streams(band))
        parts.append(torch.cat([block.pixels for block in rows.rows(first)], 1))
    return torch.cat(parts, 2)


def report(title, case, result, whole):
    difference = float((result - whole).abs().max())
    eight_bit = int(((result * 255).round() != (whole * 255).round()).sum())
    row = {"network": title, "case": case, "values": whole.numel(), "max_difference": f"{difference:.1e}"}
    row["differing_8bit"] = eight_bit
    publish("bands_exact", row)


def exact():
    random.seed(0)
    cases = {"RRDBNet 64x23": ((397, 33), (21, 771), 64), "SwinIR-M": ((391, 21), (21, 391), 32)}
    for title, network in networks():
        stage = Stage(network, CPU, "fp32")
        tall_size, wide_size, strip = cases[title]
        tall, wide = photo(*tall_size), photo(*wide_size)
        whole = whole_image(stage, tall)
        for band in (16, 24):
            report(
                title, f"{tall_size[1]}x{tall_size[0]}, bands of {band}", streamed([stage], tall, band, 1 << 20), whole
            )
        first = random.randrange(whole.shape[1])
        begun = streamed([stage], tall, 16, 1 << 20, first)
        report(title, f"{tall_size[1]}x{tall_size[0]}, begun at row {first}", begun, whole[:, first:])
        strips = streamed([stage], wide, 16, strip * 4)
        report(title, f"{wide_size[1]}x{wide_size[0]}, strips of {strip}", strips, whole_image(stage, wide))
        if title.startswith("RRDBNet"):
            small = photo(27, 22)
            chained = whole_image(stage, whole_image(stage, small))
            report(title, "22x27 through two stages", streamed([stage, stage], small, 16, 1 << 20), chained)


def real(precision):
    return Stage(archs.build(read_checkpoint(find_packaged("realsr"))), CPU, precision)


def work():
    stage = real("fp32")
    plan = stage.stream_plan(16)
    stream = RowStream(plan)
    stream.start(0, FRAME[0])
    band, given = torch.zeros(1, 3, plan.band, plan.width), 0
    while given < FRAME[0] * stage.scale:
        given += push(stage, stream, band)
    row = {"network": "RRDBNet 64x23", "rows": FRAME[0], "band": plan.band}
    row |= {"executed": stream.macs, "whole": plan.macs(FRAME[0]), "ratio": round(stream.macs / plan.macs(FRAME[0]), 5)}
    publish("bands_work", row)


def seconds_of(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def push(stage, stream, band):
    return sum(rows.shape[2] for _, rows in stage.push(stream, band))


def picture_seconds(stage, width, rows):
    """Yield seconds of whole pictures, as bands are still computed when ``push`` returns."""
    plan = stage.stream_plan(width)
    stream = RowStream(plan)
    band = photo(plan.band, width)[None].contiguous(memory_format=torch.channels_last)

    def run():
        stream.start(0, rows)
        for _ in range(0, rows + plan.delay, plan.band):
            push(stage, stream, band)

    while True:
        yield seconds_of(run)


def band_seconds(stage, rows=192):
    """Yield seconds per frame in one strip, from pictures of fewer rows by their multiply-adds."""
    plan = stage.stream_plan(FRAME[1])
    scale = plan.macs(FRAME[0]) / plan.macs(rows)
    yield from (seconds * scale for seconds in picture_seconds(stage, FRAME[1], rows))


def tile_seconds(stage, shape, count):
    tile = photo(*shape)[None].contiguous(memory_format=torch.channels_last)
    return seconds_of(lambda: stage.run(tile)) * count


def customary_seconds(network, tile=512, pad=10):
    """Seconds per frame for RealESRGANer's loop: tiles of 512 with 10 pixels on every side, in PyTorch's memory format."""
    rows, columns = (-(-n // tile) for n in FRAME)
    picture = photo(tile + 2 * pad, tile + 2 * pad)[None]
    with torch.inference_mode():
        return (
            seconds_of(lambda: network(picture)) * rows * columns * (FRAME[0] * FRAME[1]) / (rows * columns * tile**2)
        )


def planned(stage):
    """Plan of this frame's tiles for 3 GiB, with the halo for a seam error of one level."""
    model = build(None, ["realsr"])
    profile = measure_profiles(model, PHOTOS / "picosdeeuropa-crop.jpg")[0]
    halo = HaloPolicy().choose(profile, stage.radius, stage.align)
    (cut,) = exact_cuts([stage], FRAME, halo=halo, is_image=True)
    measured = Measured(
        canvas=Canvas(FRAME, FRAME, 1),
        stages=(
            MeasuredStage(
                scale=stage.scale, align=stage.align, radius=stage.radius, tiles=stage_footprint(model, 0, stage)
            ),
        ),
        base=None,
        baseline=400 << 20,
        budget=Budget(3 * GIB, None, 1 << 50),
        precisions=("fp32",),
    )
    (chosen,) = choose_tiles([cut], measured, batched=False)
    return chosen


def timed(repeats=3):
    full, half = real("fp32"), real("bf16")
    plain = archs.build(read_checkpoint(find_packaged("realsr")))
    plan = planned(full)
    print(f"tiles of {plan.tile_shape}, core {plan.core_text}, halo {plan.halo}, {len(plan.grid)} of them", flush=True)
    half_bands, full_bands = band_seconds(half), band_seconds(full)
    ways = {
        "bands bf16": lambda: next(half_bands),
        "bands fp32": lambda: next(full_bands),
        "tiles bf16": lambda: tile_seconds(half, plan.tile_shape, len(plan.grid)),
        "tiles fp32": lambda: tile_seconds(full, plan.tile_shape, len(plan.grid)),
        "tiles of 512, pad 10, plain PyTorch fp32": lambda: customary_seconds(plain),
    }
    found = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            if repeat == 0:
                way()  # warm-up: libraries choose algorithms, the stream fills
                continue
            found[name].append(way())
            print(f"{name}: {found[name][-1]:.0f} s a frame", flush=True)
    median = {name: statistics.median(values) for name, values in found.items()}
    for name, seconds in median.items():
        row = {"way": name, "frame": "16384x8640", "seconds": round(seconds, 1), "threads": torch.get_num_threads()}
        row["bands_fp32_times"] = round(seconds / median["bands fp32"], 3)
        row["bands_bf16_times"] = round(seconds / median["bands bf16"], 3)
        publish("bands_time", row)


def widths(repeats=2, rows=256):
    stage = real("bf16")
    ways = {width: picture_seconds(stage, width, rows) for width in (256, 512, 1024, 4096)}
    next(ways[256])  # warm-up
    found = {width: [] for width in ways}
    for _ in range(repeats):
        for width, way in ways.items():
            found[width].append(next(way))
    pixel = {width: statistics.median(seconds) / (width * rows) for width, seconds in found.items()}
    for width, seconds in pixel.items():
        row = {"columns": width, "rows": rows, "threads": torch.get_num_threads()}
        row |= {"us_per_pixel": round(seconds * 1e6, 1), "of_fastest": round(seconds / min(pixel.values()), 3)}
        publish("bands_widths", row)


class InTurn(Executor):
    """Executor that runs each task when it is submitted."""

    def __init__(self, *_):
        super().__init__()

    def submit(self, function, *arguments):
        done = Future()
        done.set_result(function(*arguments))
        return done


def rendered(model, picture, out, writer):
    """Seconds of a render: (total, computing, writing)."""
    request = Request(init=picture, stages=1, executor="bands", precision="fp32")
    with unittest.mock.patch("engine.run.bands.ThreadPoolExecutor", writer):
        job = Job.prepare(model, request, out)
        sink = job.open_sink(resume=False, overwrite=True)
        start = time.perf_counter()
        done = list(job.run(sink))
        seconds = time.perf_counter() - start
    return seconds, sum(d.compute_seconds for d in done), sum(d.write_seconds for d in done)


def beside(repeats=5):
    ways = {"beside": ThreadPoolExecutor, "in turn": InTurn}
    found = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = small_model(folder, 1, channels=16, blocks=1, growth=16)
        noise = torch.rand(1024, 1024, 3).mul(255).to(torch.uint8).numpy()
        Image.fromarray(noise).save(folder / "picture.png")
        for _ in range(repeats):
            for way, writer in ways.items():
                found[way].append(rendered(model, folder / "picture.png", folder / "out.zarr", writer))
    in_turn = statistics.median(seconds for seconds, _, _ in found["in turn"])
    for way, runs in found.items():
        seconds, compute, write = (statistics.median(values) for values in zip(*runs, strict=True))
        row = {"way": way, "image": "4096x4096", "threads": torch.get_num_threads(), "seconds": round(seconds, 2)}
        row |= {"compute": round(compute, 2), "write": round(write, 2), "of_in_turn": round(seconds / in_turn, 3)}
        publish("bands_beside", row)


if __name__ == "__main__":
    for name in sys.argv[1:] or ("exact", "work", "time", "widths", "beside"):
        {"exact": exact, "work": work, "time": timed, "widths": widths, "beside": beside}[name]()
