"""The steps of benchmarks/gpu_quick.py, one in each process: python benchmarks/gpu_steps.py STEP DEVICE OUT [--tiny]

machine    Driver, versions, the context's memory; ceilings: copies on the device and to the host, products of matrices.
kernels    Every kernel against its PyTorch twin: equal values, and its time as a share of the ceilings (bench_kernels.py).
render     The default model at 4096x3072 without options and with --vram 1.25GiB, and a region against the CPU in fp32.
networks   RRDBNet 64x23 and SwinIR-M in half precision, several ways (gpu_networks.py).
profile    The 15 kernels of one batch that take longest, by name and share.
frames     A picture of 4096x2160 to 16384x8640 by RRDBNet 64x23, in tiles and in bands: seconds, peaks and projections, and two
           regions against fp32.
recovery   Memory taken away after the plan; a layer that overflows half precision; a killed render resumed.
tests      The tests that are marked ``gpu``.

Weights of RRDBNet 64x23 are random: speed does not depend on them, and nothing must be fetched.
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
from pathlib import Path

import bench_kernels
import gpu_networks
import gpu_quick
import numpy as np
import pyvips
import torch
import zarr
from harness import PHOTOS, milliseconds
from safetensors.torch import save_file
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from engine.archs.esrgan import RRDBNet
from engine.job import Job
from engine.kernels.launch import is_interpreting, use_kernel
from engine.model.bundle import load
from engine.plan.request import Request

GIB = 1 << 30
HALO = 40
"""Halo of RealSR-DF2K with a largest seam error below one level (benchmarks/results/seams.csv)."""


class Bench:
    """One step: its device, its shapes (tiny or real), its rows and its working folder."""

    def __init__(self, step: str, device: str, out: Path, work: Path, *, is_tiny: bool) -> None:
        self.step = step
        self.device = torch.device(device)
        self.out = out
        self.work = work
        self.is_tiny = is_tiny
        self.repeats = 1 if is_tiny else 10
        self._ceilings: tuple[float, float] | None = None

    def row(self, case: str, quantity: str, value: object) -> None:
        text = f"{value:.5g}" if isinstance(value, float) else value
        print(f"{self.step}, {case}: {quantity} {text}", flush=True)
        gpu_quick.add_row(self.out, self.step, case, quantity, text)

    def rows(self, case: str, values: dict[str, object]) -> None:
        for quantity, value in values.items():
            if value not in ("", None):
                self.row(case, quantity, value)

    @property
    def ceilings(self) -> tuple[float, float]:
        """(GB/s of a copy, TFLOP/s of a product in half precision), measured once in a process."""
        if self._ceilings is None:
            size, side = (1 << 20, 64) if self.is_tiny else (1 << 30, 8192)
            copy = bench_kernels.copy_speed(self.device, size)
            self._ceilings = copy, bench_kernels.product_speed(self.device, side)
        return self._ceilings

    def engine(self, *words: object) -> tuple[int, str]:
        """Run the command line in its own process; returns (exit code, last line of its messages)."""
        done = subprocess.run(
            [sys.executable, "-m", "engine", *map(str, words)], stderr=subprocess.PIPE, text=True, check=False
        )
        sys.stdout.write(done.stderr)
        return done.returncode, (done.stderr.strip().splitlines() or [""])[-1]

    def weights(self) -> Path:
        """Checkpoint of an RRDBNet with random weights: 64x23, or a small one."""
        path = self.work / "random.safetensors"
        network = gpu_networks.network_of("esrgan", torch.device("cpu"), tiny=self.is_tiny)
        save_file({name: value.contiguous() for name, value in network.state_dict().items()}, path)
        return path

    def picture(self, width: int, height: int) -> Path:
        """Photograph of this size, mirrored where it is too small."""
        path = self.work / f"{width}x{height}.png"
        source = pyvips.Image.new_from_file(str(PHOTOS / "picosdeeuropa-crop.jpg"))
        source.embed(0, 0, width, height, extend="mirror").write_to_file(str(path))
        return path

    def scene(self) -> list[object]:
        """Options of a render as a new user gives them: the default model, or for the rehearsal a small one and a picture."""
        if self.is_tiny:
            return [self.weights(), "--init", self.picture(64, 48), "--overlap", 4]
        return ["--size", "4096x3072", "--seed", 7]

    @property
    def on_device(self) -> list[object]:
        """``--device`` where it is not the default one."""
        return ["--device", "cpu"] if self.device.type == "cpu" else []

    def render(self, case: str, out: Path, *options: object) -> bool:
        """Render by the command line, with rows of its report; returns whether it succeeded."""
        report = out.with_suffix(".json")
        code, line = self.engine("render", *options, "--out", out, "--report", report)
        if code:
            self.row(case, "refused", line)
            return False
        content = json.loads(report.read_text())
        measured, projection = content["measured"], content["projection"]
        self.rows(
            case,
            {
                "seconds": float(measured["seconds"]),
                "projected_seconds": float(projection["seconds"]),
                "device_peak_gib": measured["device_peak"] / GIB,
                "device_projected_gib": projection["device"] / GIB,
                "host_peak_gib": measured["host_peak"] / GIB,
                "host_projected_gib": projection["host"] / GIB,
                "executor": content["plan"]["executor"],
                "cores": str(measured["cores"]),
                "batches": str(projection["batches"]),
                "redone": measured["tiles_redone_in_fp32"],
            },
        )
        return True

    def compare(self, case: str, store: Path, roi: tuple[int, int, int, int], exact: Path) -> None:
        """Rows of the difference, in levels, between a region of a store and a store of that region alone."""
        x, y, width, height = roi
        pixels = zarr.open_group(store, mode="r")["0"][:, y : y + height, x : x + width].astype(np.int16)
        difference = np.abs(pixels - zarr.open_group(exact, mode="r")["0"][:])
        self.row(case, "max_levels", int(difference.max()))
        self.row(case, "mean_levels", float(difference.mean()))


def machine(bench: Bench) -> None:
    query = "name,driver_version,memory.total,memory.used,clocks.max.sm"
    for name, command in {
        "nvidia-smi": ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
        "compute processes": ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader"],
    }.items():
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
            bench.row("machine", name, done.stdout.strip() or "none")
        except OSError as error:
            bench.row("machine", name, str(error))
    bench.row("machine", "torch", torch.__version__)
    bench.row("machine", "cudnn", torch.backends.cudnn.version())
    if bench.device.type == "cuda":
        properties = torch.cuda.get_device_properties(bench.device)
        bench.row("machine", "multiprocessors", properties.multi_processor_count)
        bench.row("machine", "l2_mib", properties.L2_cache_size / 2**20)
        free, total = torch.cuda.mem_get_info(bench.device)
        bench.row("machine", "memory_gib", total / GIB)
        bench.row("machine", "in use with a context, gib", (total - free) / GIB)
    bench.row("machine", "kernels are compiled", int(use_kernel(bench.device, None)))
    bench.row("copy on the device", "gb_s", bench.ceilings[0])
    bench.row("product float16", "tflop_s", bench.ceilings[1])
    side = 64 if bench.is_tiny else 8192
    for dtype in (torch.bfloat16, torch.float32):
        speed = bench_kernels.product_speed(bench.device, side, dtype)
        bench.row(f"product {str(dtype).removeprefix('torch.')}", "tflop_s", speed)
    size = 1 << (16 if bench.is_tiny else 28)
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=bench.device.type == "cuda")
    resident = torch.empty(size, dtype=torch.uint8, device=bench.device)
    for case, source, target in (("host to device", pinned, resident), ("device to host", resident, pinned)):
        spent = milliseconds(bench.device, lambda s=source, t=target: t.copy_(s, non_blocking=True), bench.repeats)
        bench.row(case, "gb_s", size / spent / 1e6)


def kernel_errors(name: str, device: str, is_tiny: bool) -> list[str]:
    """Differences of a kernel from its twin on small cases, in a process of its own: all kernels compile at the same time."""
    cases, _ = bench_kernels.CASES[name]
    wrong = []
    for case in cases(torch.device(device), 48 if is_tiny else 128):
        try:
            bench_kernels.largest_error(case)
        except Exception as error:  # a kernel that does not compile is a row too
            wrong.append(f"{name}, {case.name}: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
    return wrong


def kernels(bench: Bench) -> None:
    """A kernel that differs from its twin is a row and, at the end, an error."""
    can_run = bench.device.type == "cuda" or is_interpreting()
    wrong: list[str] = []
    if can_run:
        jobs = [(name, str(bench.device), bench.is_tiny) for name in bench_kernels.CASES]
        with multiprocessing.get_context("spawn").Pool(len(jobs)) as pool:
            wrong += [text for texts in pool.starmap(kernel_errors, jobs) for text in texts]
    if bench.device.type == "cuda":
        bench_kernels.check_addresses(bench.device)
    for name, (cases, side) in bench_kernels.CASES.items():
        for case in cases(bench.device, 48 if bench.is_tiny else side):
            if not can_run:  # the rehearsal times the twin twice
                case.run = lambda _, run=case.run: run(False)
            try:
                row = bench_kernels.measure(name, case, bench.device, *bench.ceilings, bench.repeats)
            except Exception as error:
                wrong.append(f"{name}, {case.name}: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
                continue
            bench.rows(f"{row.pop('kernel')} {row.pop('case')}", row)
    for text in wrong:
        bench.row("kernels", "wrong", text)
    if wrong:
        raise SystemExit(f"{len(wrong)} kernels are wrong")


def render(bench: Bench) -> None:
    scene, roi = bench.scene(), (64, 64, 64, 64) if bench.is_tiny else (1536, 1280, 512, 512)
    exact = bench.work / "exact.zarr"
    region = ["--device", "cpu", "--precision", "fp32", "--roi", ",".join(map(str, roi)), "--out", exact]
    code, line = bench.engine("render", *scene, *region)
    if code:
        bench.row("region on the CPU", "refused", line)
    for case, options in {
        "default": [],
        "--vram 1.25GiB": ["--vram", "1.25GiB"],
        "--executor bands": ["--executor", "bands"],
    }.items():
        store = bench.work / f"{case.replace(' ', '_')}.zarr"
        if bench.render(case, store, *scene, *bench.on_device, *options) and not code:
            bench.compare(case, store, roi, exact)


def networks(bench: Bench) -> None:
    for name in ("esrgan", "swinir"):
        network = gpu_networks.network_of(name, bench.device, tiny=bench.is_tiny)
        for tile in (16,) if bench.is_tiny else (464,) if name == "esrgan" else (256,):
            for row in gpu_networks.rows(name, network, tile, bench.device, bench.repeats):
                case = f"{row.pop('network')} {row.pop('tile')} {row.pop('variant')}"
                if "tflops" in row:
                    row["of_product"] = row["tflops"] / bench.ceilings[1]
                bench.rows(case, row)


def profiles(bench: Bench) -> None:
    """Kernels by their share of the device's time; all of the table goes to ``profile.txt``."""
    is_cuda = bench.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * is_cuda
    kind = DeviceType.CUDA if is_cuda else DeviceType.CPU
    side = 16 if bench.is_tiny else 256
    for name in ("esrgan", "swinir"):
        network = gpu_networks.half(gpu_networks.network_of(name, bench.device, tiny=bench.is_tiny))
        x = torch.rand(1, 3, side, side, device=bench.device).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            for _ in range(2):
                network(x)
            with profile(activities=activities) as trace:
                network(x)
                if is_cuda:
                    torch.cuda.synchronize(bench.device)
        spent: dict[str, float] = {}
        count = 0
        for event in trace.events():
            if event.device_type == kind:
                spent[event.name] = spent.get(event.name, 0.0) + event.time_range.elapsed_us()
                count += 1
        total = sum(spent.values())
        bench.row(f"{name} {side}x{side}", "launches", count)
        bench.row(f"{name} {side}x{side}", "ms", total / 1e3)
        for kernel in sorted(spent, key=spent.__getitem__, reverse=True)[:15]:
            bench.row(f"{name} {side}x{side}", f"share of {kernel[:120]}", spent[kernel] / total)
        with (bench.out / "profile.txt").open("a") as file:
            file.write(f"{name} {side}x{side}\n{trace.key_averages().table(row_limit=40)}\n")


def frames(bench: Bench) -> None:
    width, height = (36, 24) if bench.is_tiny else (4096, 2160)
    side, halo = (32, 4) if bench.is_tiny else (1024, HALO)
    common = [bench.weights(), "--init", bench.picture(width, height), "--overlap", halo, "--device", bench.device]
    regions = {"top left": (0, 0, side, side), "inside": (width * 4 // 2, height * 4 // 3, side, side)}
    exact = {name: bench.work / f"{name.replace(' ', '_')}.zarr" for name in regions}
    for name, roi in regions.items():
        options = ["--precision", "fp32", "--roi", ",".join(map(str, roi)), "--out", exact[name]]
        code, line = bench.engine("render", *common, *options)
        if code:
            bench.row(f"region {name}", "refused", line)
    precision = "fp32" if bench.is_tiny else "fp16"
    ways = (("bands", "8GiB"), ("batched", "8GiB"), ("batched", "1.25GiB"), ("auto", "4GiB"))
    for executor, vram in ways[:2] if bench.is_tiny else ways:
        case, store = f"{width * 4}x{height * 4} {executor} --vram {vram}", bench.work / f"{executor}{vram}.zarr"
        limits = [] if bench.device.type == "cpu" else ["--vram", vram]
        if bench.render(case, store, *common, "--executor", executor, "--precision", precision, *limits):
            for name, roi in regions.items():
                if exact[name].exists():
                    bench.compare(f"{case}, {name}", store, roi, exact[name])


def recovery(bench: Bench) -> None:
    _memory_is_taken(bench)
    _half_precision_overflows(bench)
    _killed(bench)


def _memory_is_taken(bench: Bench) -> None:
    """Most of the free memory is taken between the plan and the run."""
    if bench.device.type != "cuda":
        bench.row("memory is taken", "skipped", "needs a device that runs out of memory")
        return
    request = Request(init=bench.picture(1024, 540), overlap=str(HALO), executor="batched", device=str(bench.device),
                      precision="fp16")  # fmt: skip
    job = Job.prepare(load(bench.weights()), request, bench.work / "taken.zarr")
    sink = job.open_sink()
    needed = job.projection.device
    free, _ = torch.cuda.mem_get_info(bench.device)
    ballast = torch.empty(max(0, free - needed // 3), dtype=torch.uint8, device=bench.device)
    for _ in job.run(sink):
        pass
    bench.row("memory is taken", "left_gib", (free - ballast.numel()) / GIB)
    bench.row("memory is taken", "planned_gib", needed / GIB)
    bench.row("memory is taken", "finished", int(sink.is_finished))
    bench.row("memory is taken", "cores", str([cut.tile for cut in job.cuts]))


def _half_precision_overflows(bench: Bench) -> None:
    """One layer's values exceed fp16 and return below it in the next: float32 can render them, and no value may be lost."""
    torch.manual_seed(0)
    network = RRDBNet(channels=16, blocks=1, growth=8)
    torch.nn.init.constant_(network.conv_last.bias, 0.5)
    block = network.body[0].rdb1
    with torch.no_grad():
        block.conv1.weight.mul_(1e7)
        for conv in (block.conv2, block.conv3, block.conv4, block.conv5):
            conv.weight[:, 16:24].div_(1e7)
    path = bench.work / "large.safetensors"
    save_file(network.state_dict(), path)
    precision = "bf16" if bench.device.type == "cpu" else "fp16"
    for executor in ("batched", "bands"):
        store = bench.work / f"large-{executor}.zarr"
        options = [path, "--init", bench.picture(96, 64), "--overlap", 8, "--precision", precision]
        bench.render(f"overflow, {executor}", store, *options, "--executor", executor, "--device", bench.device)


def _killed(bench: Bench) -> None:
    """A render is killed with its first shard on disk; resumed, it has the bits of an undisturbed one."""
    scene = [*bench.scene(), *bench.on_device]
    stores = {name: bench.work / f"{name}.zarr" for name in ("whole", "killed")}
    for name, store in stores.items():
        command = [sys.executable, "-m", "engine", "render", *map(str, scene), "--out", str(store)]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        if name == "killed":
            while process.poll() is None and not list(store.glob("0/c/0/*/*")):
                time.sleep(0.01)
            process.kill()
        process.wait()
    code, line = bench.engine("render", *scene, "--resume", "--out", stores["killed"])
    if code:
        bench.row("killed", "refused", line)
        raise SystemExit("a killed render was not resumed")
    pixels = [zarr.open_group(store, mode="r")["0"][:] for store in stores.values()]
    bench.row("killed", "equal", int(np.array_equal(*pixels)))


def tests(bench: Bench) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-o",
        "filterwarnings=default",
        "-m",
        "gpu",
    ]
    paths = sorted(
        str(path) for path in Path(gpu_quick.ROOT, "tests").rglob("test_*.py") if "needs_gpu" in path.read_text()
    )
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([*command, *paths], capture_output=True, text=True, env=environment, check=False)
    print(done.stdout)
    print(done.stderr, file=sys.stderr)
    summary = (done.stdout.strip().splitlines() or [""])[-1]
    bench.row("pytest -m gpu", "summary", summary)
    for line in re.findall(r"^(?:FAILED|ERROR) .*", done.stdout, re.MULTILINE):
        bench.row("pytest -m gpu", "failed", line[:300])
    if done.returncode:
        raise SystemExit(summary)


RUN = {
    "machine": machine,
    "kernels": kernels,
    "render": render,
    "networks": networks,
    "profile": profiles,
    "frames": frames,
    "recovery": recovery,
    "tests": tests,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=list(RUN))
    parser.add_argument("device")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="gpu-") as work:
        RUN[options.step](Bench(options.step, options.device, options.out, Path(work), is_tiny=options.tiny))


if __name__ == "__main__":
    main()
