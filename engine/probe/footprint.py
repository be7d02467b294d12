"""Measures what running a network costs: memory and time at two tile shapes, which give a line.

The numbers belong to a machine, so they live in the user's cache folder, never in the model file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from engine.bands.stream import RowStream
from engine.device.memory import PeakMemory, accelerator_module
from engine.device.queue import OutOfDeviceMemory, synchronize
from engine.plan.measured import Footprint
from engine.run.stage import Stage

_SMALL, _LARGE = 96, 192

_METHOD = "one run after a warm-up, steady heap, 1 and 16 MiB"
"""Part of the cache's key: numbers of another way to measure are not comparable."""


def measure(
    run: Callable[[int, int], object], device: torch.device, align: int = 1, largest: int = _LARGE
) -> Footprint:
    """Cost of ``run(height, width)``. Bytes are the growth of the peak over the start, on the device that computes.

    An accelerator takes memory in pieces of up to 20 MiB, so its shapes are larger, unless they do not fit.
    """
    own = accelerator_module(device) is not None
    small, large = min(_SMALL, largest // 2), largest
    for factor in (2, 1) if own else (1,):
        sides = [max(align, n * factor // align * align) for n in (small, large)]
        sides[1] = max(sides[1], 2 * sides[0])
        try:
            (low, _), (high, seconds) = (_peak(run, side, device) for side in sides)
            break
        except OutOfDeviceMemory:
            if factor == 1:
                raise
    small, large = sides
    per_pixel = max(0.0, (high - low) / (large**2 - small**2))
    return Footprint(max(0, int(high - per_pixel * large**2)), per_pixel, seconds / large**2)


def measure_stream(stage: Stage) -> Footprint:
    """Seconds of streaming a stage for each LR pixel, by what was executed, since so small a picture is mostly border.

    Its bytes are counted, not measured: they are in the stage's stream plan.
    """
    plan = stage.stream_plan(_LARGE // stage.align * stage.align)
    stream = RowStream(plan, stage.device)
    band = torch.rand(1, stage.inputs, plan.band, plan.width, device=stage.device)
    seconds = math.inf
    for _ in range(3):  # the first time makes the primitives of these shapes
        before, start = stream.macs, time.perf_counter()
        stream.start(0, _SMALL)
        for _ in range(0, _SMALL + plan.delay, plan.band):
            for _ in stage.push(stream, band):
                pass
        synchronize(stage.device)
        seconds = min(seconds, time.perf_counter() - start)
    pixels = (stream.macs - before) / plan.macs(plan.band) * plan.band * plan.width
    return Footprint(0, 0.0, seconds / pixels)


def _peak(run: Callable[[int, int], object], side: int, device: torch.device) -> tuple[int, float]:
    run(side, side)  # buffers and primitives of this shape
    with PeakMemory(device) as peak:
        start = time.perf_counter()
        run(side, side)
        synchronize(device)
        seconds = time.perf_counter() - start
    return (peak.host - peak.start if accelerator_module(device) is None else peak.device - peak.device_start), seconds


def cached(key: tuple[str, ...], measure_it: Callable[[], Footprint]) -> Footprint:
    """The footprint for ``key`` on this machine, measured when it is not in the cache yet."""
    path = cache_folder() / "footprints" / f"{_machine_key(key)}.json"
    try:
        return Footprint(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        footprint = measure_it()
    store_json(path, asdict(footprint))
    return footprint


def cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "ourgan-engine"


def store_json(path: Path, data: object) -> None:
    """Write atomically; a cache that cannot be written costs time, not correctness."""
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(data))
        os.replace(part, path)
    except OSError:
        return


def _machine_key(key: tuple[str, ...]) -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    text = json.dumps([_METHOD, *key, device, platform.node(), torch.__version__, torch.get_num_threads()])
    return hashlib.sha256(text.encode()).hexdigest()[:24]
