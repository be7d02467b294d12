"""GPU benchmarks in one script, called by benchmarks/gpu.sh.

    python benchmarks/bench_gpu.py [SECTION ...] [--device cuda] [--tiny] [--out FOLDER]

ceilings    Peak rates of the machine: copies on the device, from and to the host; matrix products in fp16, bf16 and fp32.
kernels     Every kernel against its PyTorch twin: checked, timed, and as a share of the peak rates (bench_kernels.py).
networks    RRDBNet 64x23 and SwinIR-M: eager PyTorch, channels-last, compiled, with our kernels (bench_networks.py).
precision   Error of fp16 and bf16 against fp32 on a photograph, in 8-bit levels.
render      A photograph to 4096x2160 and 16384x8640: batched with --vram 1GiB, 1.25GiB and 8GiB, bands with 8GiB, and for
            comparison the same weights in half precision in tiles of 512 with 10 pixels of padding (RealESRGANer's loop)
            and on the whole image where it fits. Seconds, memory peaks, projections, difference from the whole image in fp32.
busy        A render under torch's profiler: share of the time that the device is busy; the summary is written beside the CSV.

Rows (section, case, quantity, value) are appended to results/gpu_<machine>.csv. Without a CUDA device nothing is measured.
``--device cpu --tiny --out FOLDER`` is a rehearsal on the CPU: every section runs on small shapes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import bench_kernels
import bench_networks
import numpy as np
import pyvips
import torch
import zarr
from bench_bands import photo
from harness import RESULTS, add_row, milliseconds
from safetensors.torch import save_file
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from engine import archs
from engine.archs.esrgan import RRDBNet
from engine.device.memory import PeakMemory
from engine.device.queue import OutOfDeviceMemory, memory_errors, synchronize
from engine.errors import EngineError
from engine.job import Job
from engine.kernels.launch import is_interpreting, use_kernel
from engine.model.bundle import load
from engine.model.checkpoints import read_checkpoint
from engine.model.packaged import find_packaged
from engine.plan.request import Request
from engine.probe.precision import chain_errors
from engine.run.stage import Stage

GIB = 1 << 30
RENDERS = (("batched", "1GiB"), ("batched", "1.25GiB"), ("batched", "8GiB"), ("bands", "8GiB"))
HALO = 40  # RealSR-DF2K: largest seam error below one level (benchmarks/results/seams.csv)
RENDER = "import sys; from engine.cli.app import main; main(sys.argv[1:])"


class Bench:
    """One run: device, shapes (tiny or real) and folder of its rows."""

    def __init__(self, device, tiny, out):
        self.device = device
        self.tiny = tiny
        self.out = out
        self._ceilings = None

    @property
    def name(self):
        machine = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return "gpu_" + re.sub(r"[^a-z0-9]+", "_", machine.lower()).strip("_")

    def row(self, section, case, quantity, value):
        text = f"{value:.5g}" if isinstance(value, float) else value
        print(f"{section}, {case}: {quantity} {text}", flush=True)
        add_row(self.name, {"section": section, "case": case, "quantity": quantity, "value": text}, self.out)

    def rows(self, section, case, values):
        for quantity, value in values.items():
            if value != "":
                self.row(section, case, quantity, value)

    @property
    def repeats(self):
        return 1 if self.tiny else 20

    @property
    def ceilings(self):
        """(GB/s of a copy, TFLOP/s of a product in half precision), measured once per run."""
        if self._ceilings is None:
            size, side = (1 << 20, 64) if self.tiny else (1 << 30, 8192)
            self._ceilings = (
                bench_kernels.copy_speed(self.device, size),
                bench_kernels.product_speed(self.device, side),
            )
        return self._ceilings

    def weights(self, folder):
        """Checkpoint of RRDBNet: RealSR if installed, otherwise random weights."""
        if not self.tiny:
            try:
                return find_packaged("realsr")
            except EngineError:
                print("RealSR weights are not installed; random weights of the same size are used", flush=True)
        path = folder / "random.safetensors"
        torch.manual_seed(0)
        network = RRDBNet(16, 1, 8) if self.tiny else RRDBNet()
        torch.nn.init.constant_(network.conv_last.bias, 0.5)
        save_file(network.state_dict(), path)
        return path


def ceilings(bench):
    side = 64 if bench.tiny else 8192
    bench.row("ceilings", "copy on the device", "gb_s", bench.ceilings[0])
    bench.row("ceilings", "product fp16", "tflop_s", bench.ceilings[1])
    for dtype in (torch.bfloat16, torch.float32):
        speed = bench_kernels.product_speed(bench.device, side, dtype)
        bench.row("ceilings", f"product {str(dtype).removeprefix('torch.')}", "tflop_s", speed)
    size = 1 << (16 if bench.tiny else 28)
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=bench.device.type == "cuda")
    resident = torch.empty(size, dtype=torch.uint8, device=bench.device)
    for case, source, target in (("host to device", pinned, resident), ("device to host", resident, pinned)):
        spent = milliseconds(bench.device, lambda s=source, t=target: t.copy_(s, non_blocking=True), bench.repeats)
        bench.row("ceilings", case, "gb_s", size / spent / 1e6)
    bench.row("ceilings", "kernels", "compiled", int(use_kernel(bench.device, None)))


def kernels(bench):
    """Report a kernel that differs from its twin as a row and, at the end, as an error."""
    runs_kernels = bench.device.type == "cuda" or is_interpreting()
    wrong = []
    if bench.device.type == "cuda":
        bench_kernels.check_addresses(bench.device)
    for name, (cases, side) in bench_kernels.CASES.items():
        for case in cases(bench.device, 48 if bench.tiny else side):
            if not runs_kernels:
                case.run = lambda _, run=case.run: run(False)
            try:
                row = bench_kernels.measure(name, case, bench.device, *bench.ceilings, bench.repeats)
            except (AssertionError, RuntimeError) as error:
                wrong.append(f"{name}, {case.name}: {str(error).splitlines()[0]}")
                bench.row("kernels", f"{name} {case.name}", "wrong", wrong[-1])
                continue
            bench.rows("kernels", f"{row.pop('kernel')} {row.pop('case')}", row)
    if wrong:
        raise SystemExit("kernels that are wrong: " + "; ".join(wrong))


def networks(bench):
    for name in ("esrgan", "swinir"):
        network = bench_networks.network_of(name, bench.device, bench.tiny)
        for tile in (16,) if bench.tiny else (128, 256, 512):
            torch.compiler.reset()
            with bench_networks.full_precision(), torch.inference_mode():
                for row in bench_networks.rows(name, network, tile, bench.device, repeats=bench.repeats):
                    case = f"{row.pop('network')} {row.pop('tile')} {row.pop('variant')}"
                    bench.rows("networks", case, row | {"of_product": row["tflops"] / bench.ceilings[1]})


def precision(bench):
    with tempfile.TemporaryDirectory() as folder:
        weights = read_checkpoint(bench.weights(Path(folder)))
    builders = {
        "rrdbnet": lambda: archs.build(weights),
        "swinir-m, random": lambda: bench_networks.network_of("swinir", torch.device("cpu"), bench.tiny),
    }
    content = photo(*((64, 64) if bench.tiny else (512, 512)))[None].to(bench.device)
    for name, build in builders.items():
        full = Stage(build(), bench.device, "fp32")
        for half in ("fp16", "bf16"):
            fast = Stage(build(), bench.device, half)
            (error,) = chain_errors([full.network], [fast.network], [0.0], content, full.align)
            for quantity in ("mean", "p999", "max"):
                bench.row("precision", f"{name} {half}", f"{quantity}_levels", getattr(error, quantity))


def padded_tiles(network, picture, tile, pad=10, scale=4):
    """RealESRGANer's loop: padded tiles, cropped into an output of the whole size on the device."""
    height, width = picture.shape[2:]
    output = picture.new_zeros(1, 3, height * scale, width * scale)
    for y in range(0, height, tile):
        for x in range(0, width, tile):
            top, left = max(0, y - pad), max(0, x - pad)
            bottom, right = min(y + tile, height), min(x + tile, width)
            part = network(picture[:, :, top : min(bottom + pad, height), left : min(right + pad, width)])
            part = part[:, :, (y - top) * scale :, (x - left) * scale :]
            output[:, :, y * scale : bottom * scale, x * scale : right * scale] = part[
                :, :, : (bottom - y) * scale, : (right - x) * scale
            ]
    return output


@torch.inference_mode()
def to_levels(output):
    """Round [1, 3, H, W] in place to uint8 [3, H, W] on the host."""
    return output[0].clamp_(0, 1).mul_(255).round_().to(torch.uint8).cpu().numpy()


def differences(bench, case, result, expected):
    """Compare two uint8 images [3, H, W] in strips of rows."""
    largest, total, values = 0, 0, 0
    for y in range(0, result.shape[1], 512):
        strip = np.abs(np.asarray(result[:, y : y + 512]).astype(np.int16) - expected[:, y : y + 512])
        largest, total, values = max(largest, int(strip.max())), total + int(strip.sum()), values + strip.size
    bench.rows("render", case, {"max_levels": largest, "mean_levels": total / values})


def in_process(function, *arguments):
    """Call in another process, which frees its device memory at the end: without NVML, an engine that runs at the same time
    would count it as its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def on_device(bench, weights, picture):
    """Network in float32 and picture [1, 3, H, W], both on the device."""
    levels = torch.from_numpy(pyvips.Image.new_from_file(str(picture)).numpy()).to(bench.device)
    return archs.build(read_checkpoint(weights)).to(bench.device), levels.permute(2, 0, 1)[None].float() / 255


def whole_image_fp32(bench, weights, picture, path):
    """Save the whole image in fp32, as uint8, to ``path``, with the tail in strips; return False if memory does not suffice."""
    network, pixels = on_device(bench, weights, picture)
    stage = Stage(network, bench.device, "fp32")
    try:
        np.save(path, to_levels(stage.run(pixels, tail_chunks=64)))
    except OutOfDeviceMemory:
        return False
    return True


def engine_render(bench, folder, weights, picture, executor, vram):
    """Render by the command line in its own process; return (store, run report or error line)."""
    name = f"{picture.stem} {executor} {vram}"
    report, out = folder / f"{name}.json", folder / f"{name}.zarr"
    command = ["render", str(weights), "--init", str(picture), "--vram", vram, "--executor", executor]
    command += ["--device", str(bench.device), "--precision", "fp32" if bench.tiny else "fp16"]
    command += ["--overlap", str(4 if bench.tiny else HALO), "--out", str(out), "--report", str(report)]
    root = str(RESULTS.parent.parent)
    paths = {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    process = [sys.executable, "-c", RENDER, *command]
    done = subprocess.run(process, capture_output=True, text=True, env={**os.environ, **paths})
    if done.returncode:
        return out, (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return out, json.loads(report.read_text())


def engine_rows(bench, case, out, report, expected):
    if isinstance(report, str):
        bench.row("render", case, "refused", report)
        return
    measured, projection = report["measured"], report["projection"]
    sizes = {
        "device_peak_gib": measured["device_peak"],
        "device_projected_gib": projection["device"],
        "device_budget_gib": report["budget"]["device"] or 0,
        "host_peak_gib": measured["host_peak"],
        "host_projected_gib": projection["host"],
    }
    values = {"seconds": measured["seconds"], **{name: size / GIB for name, size in sizes.items()}}
    values |= {"core": measured["cores"][-1], "pieces": projection["tasks"][-1]}
    if projection["batches"]:  # bands have none
        values["batch"] = projection["batches"][-1]
    bench.rows("render", case, values | {"redone": measured["tiles_redone_in_fp32"]})
    if expected is not None:
        differences(bench, case, zarr.open_group(out, mode="r")["0"], expected)


def other_method(bench, case, network, picture, run, expected):
    """Measure another method from the picture on the device to uint8 on the host, without writing."""
    try:
        with PeakMemory(bench.device) as peak, memory_errors(), torch.inference_mode():
            start = time.perf_counter()
            result = to_levels(run(network, picture))
            seconds = time.perf_counter() - start
    except OutOfDeviceMemory as error:
        bench.row("render", case, "refused", str(error))
        return
    sizes = {"device_peak_gib": peak.device / GIB, "host_peak_gib": peak.host / GIB}
    bench.rows("render", case, {"seconds": seconds, **sizes})
    if expected is not None:
        differences(bench, case, result, expected)


def compare(bench, size, weights, picture, renders, exact):
    """Rows of the engine's renders and of the other methods."""
    expected = np.load(exact, mmap_mode="r") if exact else None
    for (executor, vram), result in renders.items():
        engine_rows(bench, f"{size} engine {executor} --vram {vram}", *result, expected)
    network, pixels = on_device(bench, weights, picture)
    dtype, tile = (torch.float32, 16) if bench.tiny else (torch.float16, 512)
    network, pixels = network.to(dtype), pixels.to(dtype)
    other_method(bench, f"{size} tiles of {tile}, pad 10", network, pixels, partial(padded_tiles, tile=tile), expected)
    other_method(bench, f"{size} whole image", network, pixels, lambda n, x: n(x), expected)


def render(bench):
    sizes = ((24, 36),) if bench.tiny else ((540, 1024), (2160, 4096))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = bench.weights(folder)
        for height, width in sizes:
            size = f"{width * 4}x{height * 4}"
            picture, exact = save_photo(folder / f"{size}.png", height, width), folder / f"{size}.npy"
            renders = {way: engine_render(bench, folder, weights, picture, *way) for way in RENDERS}
            fits = in_process(whole_image_fp32, bench, weights, picture, exact)
            in_process(compare, bench, size, weights, picture, renders, exact if fits else None)


def save_photo(path, height, width):
    pixels = (photo(height, width) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    pyvips.Image.new_from_array(pixels, interpretation="srgb").write_to_file(str(path))
    return path


def busy(bench):
    """Share of the time covered by kernels on a device, or by operations on a CPU."""
    height, width = (24, 36) if bench.tiny else (1080, 2048)
    kind = DeviceType.CUDA if bench.device.type == "cuda" else DeviceType.CPU
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = bench.weights(folder)
        picture = save_photo(folder / "picture.png", height, width)
        overlap, precision, tile = ("4", "fp32", 16) if bench.tiny else (str(HALO), "fp16", 256)
        request = Request(
            init=picture, overlap=overlap, executor="batched", device=str(bench.device), precision=precision, tile=tile
        )
        for turn in ("first", "second"):  # compilation and algorithm selection happen in the first
            job = Job.prepare(load(weights), request, folder / f"{turn}.zarr")
            sink = job.open_sink(resume=False, overwrite=False)
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (bench.device.type == "cuda")
            with profile(activities=activities) as trace:
                start = time.perf_counter()
                for _ in job.run(sink):
                    pass
                synchronize(bench.device)
                seconds = time.perf_counter() - start
    spans = [(e.time_range.start, e.time_range.end) for e in trace.events() if e.device_type == kind]
    share = covered(spans) / 1e6 / seconds
    case = f"{width * 4}x{height * 4} in tiles of {request.tile}"
    bench.rows("busy", case, {"seconds": seconds, "busy": share, "launches": len(spans)})
    order = "self_cuda_time_total" if bench.device.type == "cuda" else "self_cpu_time_total"
    summary = (bench.out or RESULTS) / f"{bench.name}_trace.txt"
    summary.write_text(f"{case}, {seconds:.3f} s, busy {share:.3f}\n" + trace.key_averages().table(order, 30))


def covered(spans):
    """Length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


SECTIONS = {f.__name__: f for f in (ceilings, kernels, networks, precision, render, busy)}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)}; default: all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="run every section on small shapes")
    parser.add_argument("--out", type=Path, help="folder of the rows; default: benchmarks/results")
    options = parser.parse_args(arguments)
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"unknown section {', '.join(sorted(unknown))}; use {', '.join(SECTIONS)}")
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("bench_gpu: no CUDA device here; nothing was measured")
        return
    if device.type != "cuda" and not (options.tiny and options.out):
        parser.error("no CUDA device: only a rehearsal is possible; give --device cpu --tiny --out FOLDER")
    bench = Bench(device, options.tiny, options.out)
    for name in options.sections or SECTIONS:
        torch.manual_seed(0)
        SECTIONS[name](bench)


if __name__ == "__main__":
    main()
