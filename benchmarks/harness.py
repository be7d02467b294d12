"""Shared parts of the benchmarks: rows of benchmarks/results, timing, processes, small models and renders."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import zarr
from safetensors.torch import save_file

from engine.archs.esrgan import RRDBNet
from engine.archs.hpvaegan import BaseGenerator, Config, scale_sizes
from engine.device.queue import synchronize
from engine.job import Job
from engine.model.build import build
from engine.model.bundle import Model
from engine.model.structure_file import write_structure
from engine.plan.request import Request

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PHOTOS = Path(__file__).parent / "photos"


def machine() -> str:
    """Name of the machine in a row: cores, relevant instruction sets and GPU."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [name for name, flag in (("AVX-512", "avx512f"), ("AMX bf16", "amx_bf16")) if flag in flags]
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{os.cpu_count()} cores {platform.machine()} {' '.join(names)}{gpu}"


def add_row(name: str, row: dict[str, object], folder: Path | None = None) -> None:
    """Append a row to ``<name>.csv`` in ``folder``, benchmarks/results by default, after date, machine and torch version."""
    path = (folder or RESULTS) / f"{name}.csv"
    row = {"date": datetime.date.today().isoformat(), "machine": machine(), "torch": torch.__version__, **row}
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def publish(name: str, row: dict[str, object]) -> None:
    """Print a row, and append it to ``<name>.csv``."""
    print(", ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    add_row(name, row)


def milliseconds(device: torch.device, call, repeats: int) -> float:
    """Median time of a call in ms after two warm-up calls: by events on a CUDA device, by the clock elsewhere."""
    times = []
    for k in range(repeats + 2):
        synchronize(device)
        start = time.perf_counter()
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            elapsed = begin.elapsed_time(end)
        else:
            call()
            elapsed = (time.perf_counter() - start) * 1e3
        if k > 1:
            times.append(elapsed)
    return statistics.median(times)


@dataclass(frozen=True, slots=True)
class Ended:
    """A process that ended."""

    code: int
    """Exit code; negative after a signal."""
    output: str
    """Standard output."""
    seconds: float
    """Time from its start to its end."""
    cpu: float
    """User and system time in seconds."""
    peak: int
    """Largest resident memory in MiB."""


def run_process(
    command: Sequence[str | Path], *, cpu_limit: int = 3600, expected: Sequence[int] = (0,), **variables: str
) -> Ended:
    """Run a command in an environment with this checkout's ``engine`` and ``variables``.

    Raises SystemExit for another exit code than ``expected``, and where it takes more than ``cpu_limit`` CPU seconds.
    """
    with tempfile.TemporaryFile("w+") as output:
        start = time.perf_counter()
        process = subprocess.Popen(
            list(map(str, command)),
            stdout=output,
            env=os.environ | {"PYTHONPATH": str(ROOT), **variables},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (cpu_limit, cpu_limit)),
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode not in expected:
            raise SystemExit(f"{command}: ended with exit code {process.returncode} after {seconds:.0f} s")
        output.seek(0)
        cpu = usage.ru_utime + usage.ru_stime
        return Ended(process.returncode, output.read(), seconds, cpu, usage.ru_maxrss >> 10)


def render(model: Model, request: Request) -> np.ndarray:
    """Render into a temporary store and return the whole image, uint8 [3, height, width]."""
    with tempfile.TemporaryDirectory() as folder:
        job = Job.prepare(model, request, Path(folder) / "out.zarr")
        for _ in job.run(job.open_sink(resume=False, overwrite=False)):
            pass
        return zarr.open_array(job.out / "0", mode="r")[:]


def small_model(folder: Path, stages: int, channels: int = 16, blocks: int = 2, growth: int = 8) -> Model:
    """Model of the default architectures with random weights in ``folder``; small, so that any size is cheap to render."""
    torch.manual_seed(0)
    network = RRDBNet(channels=channels, blocks=blocks, growth=growth)
    torch.nn.init.constant_(network.conv_last.bias, 0.5)
    checkpoint = folder / "small.safetensors"
    save_file(network.state_dict(), checkpoint)
    config = Config()
    structure = BaseGenerator(config, scale_sizes((135, 256)))
    structure_file = folder / "structure.safetensors"
    write_structure(structure, structure_file)
    model = build(structure_file, [str(checkpoint)] * stages)
    model.save(folder / "model.safetensors")
    model.path = folder / "model.safetensors"
    return model
