"""Memory and time of running a network: two tile shapes give a line.

The numbers belong to a machine, so they live in the user's cache, never in the model file.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, replace

import torch
from torch import Tensor

from engine.bands.stream import RowStream, StreamPlan
from engine.device.choose import PRECISIONS
from engine.device.memory import PeakMemory
from engine.device.queue import OutOfDeviceMemory, synchronize
from engine.device.runtime import hardware_name, library_versions, memory_module
from engine.model.bundle import Model
from engine.plan.measured import BandCost, Footprint
from engine.probe import cache
from engine.probe.sides import BYTES_OF_STEP_1, BYTES_PER_PIXEL, side_within
from engine.run.base import base_image
from engine.run.stage import Stage

_SMALL, _LARGE = 96, 192
"""Sides of the two tiles, in LR pixels."""

_BASE_LARGE = 256
"""Larger side for step 1."""

_SMALLEST = 48
"""Smallest larger side."""

_HALF_SHARE = 0.9
"""Share of float32's time that half precision may take to be worth its error."""

_STREAM_SECONDS = 3.0
"""Time after which the speed of a row stream is not measured once more."""

_METHOD = "one run after a warm-up, steady heap, 1 and 16 MiB"
"""Part of the cache's key: numbers of another method are not comparable."""

_CPU = torch.device("cpu")

Log = Callable[[str], None]


def stage_footprint(
    model: Model, index: int, stage: Stage, log: Log = lambda _: None, limit: int | None = None
) -> Footprint:
    """Cost of a stage's tiles on this machine, measured once.

    Args:
        model: model of the stage.
        index: index of the stage.
        stage: the stage on its device.
        log: receives a line before the measurement.
        limit: bytes of host memory that the process may take.
    """
    largest = side_within(limit, _LARGE, _SMALLEST, BYTES_PER_PIXEL)

    def run(height: int, width: int) -> Tensor:
        tile = torch.rand(1, stage.inputs, height, width, device=stage.device)
        return stage.run(tile.contiguous(memory_format=torch.channels_last))

    def measure_it() -> Footprint:
        log(f"step {index + 2}: measuring memory and speed on this machine (once)")
        return measure(run, stage.device, stage.align, largest)

    key = ("sr", str(stage.default_chunks), model.original.weights_digest(index), str(stage.device), stage.precision)
    return cached(key if largest == _LARGE else (*key, str(largest)), measure_it, stage.device)


def band_cost(model: Model, index: int, stage: Stage, log: Log = lambda _: None) -> BandCost:
    """Cost of streaming a stage in bands on this machine: speed measured once, memory counted.

    Raises UsageError when the network cannot be streamed.
    """
    by_kernel = any(op.rule.by_kernel for op in stage.graph.ops)
    shape = str([(s.band, s.block) for s in stage.stream_plan(64 * stage.align).segments]) + " conv3x3" * by_kernel

    def measure_it() -> Footprint:
        log(f"step {index + 2}: measuring the speed in bands on this machine (once)")
        return measure_stream(stage)

    key = ("bands", model.original.weights_digest(index), str(stage.device), stage.precision, shape)
    return replace(band_memory(stage), seconds_per_pixel=cached(key, measure_it, stage.device).seconds_per_pixel)


def band_memory(stage: Stage) -> BandCost:
    """Memory of streaming a stage in bands, counted; its time is left at 0.

    Raises UsageError when the network cannot be streamed.
    """

    def held(plan: StreamPlan) -> int:
        return plan.nbytes + (plan.temporary_bytes if stage.device.type != "cpu" else 0)

    narrow, wide, wider = (stage.stream_plan(columns * stage.align) for columns in (64, 4096, 8192))
    per_column = (held(wider) - held(wide)) / (wider.width - wide.width)
    return BandCost(
        band=narrow.band,
        bytes_per_column=per_column,
        seconds_per_pixel=0.0,
        fixed=int(held(wide) - per_column * wide.width),
        narrow_bytes_per_column=held(narrow) / narrow.width,
        beyond=wide.beyond,
        context=wide.context,
    )


def base_footprint(model: Model, limit: int | None = None, wraps: tuple[bool, bool] = (False, False)) -> Footprint:
    """Cost of step 1 on the host, measured once.

    Args:
        model: model of step 1.
        limit: bytes of host memory that the process may take.
        wraps: whether its image repeats along (rows, columns), which takes padded copies of its maps.
    """
    generator = model.base_generator
    assert generator is not None
    largest = side_within(limit, _BASE_LARGE, _SMALLEST, BYTES_OF_STEP_1)

    def run(height: int, width: int) -> Tensor:
        return base_image(generator, 0, (height, width), wraps)

    key = ("structure", model.original.digest, "cpu", *("wrap",) * any(wraps))
    key += () if largest == _BASE_LARGE else (str(largest),)
    return cached(key, lambda: measure(run, torch.device("cpu"), largest=largest))


def half_pays(half: str, device: torch.device) -> bool:
    """Whether a convolution runs faster in half precision than in float32 on this machine, measured once on a CPU.

    A CPU may have instructions for bf16 and yet be slower with them. Accelerators are trusted.
    """
    if device.type != "cpu":
        return True
    name = _machine_key(("half", half), _CPU)
    stored = cache.read("half", name)
    if not (isinstance(stored, float) and 0 < stored < math.inf):
        stored = _convolution_seconds(PRECISIONS[half]) / _convolution_seconds(torch.float32)
        cache.write("half", name, stored)
    return stored < _HALF_SHARE


@torch.inference_mode()
def _convolution_seconds(dtype: torch.dtype) -> float:
    """Shortest of several runs of a 3x3 convolution of 64 channels."""
    x = torch.rand(1, 64, 128, 256, dtype=dtype).contiguous(memory_format=torch.channels_last)
    conv = torch.nn.Conv2d(64, 64, 3, padding=1).to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    seconds = math.inf
    for _ in range(6):
        start = time.perf_counter()
        conv(x)
        seconds = min(seconds, time.perf_counter() - start)
    return seconds


def measure(
    run: Callable[[int, int], object], device: torch.device, align: int = 1, largest: int = _LARGE
) -> Footprint:
    """Cost of ``run(height, width)``, in bytes of the device that computes and seconds.

    Bytes are the growth of the peak over the start. An accelerator allocates up to 20 MiB at a time, so its tiles are
    twice as large, or as large as its memory permits.

    Args:
        run: runs the network on a tile.
        device: device that computes.
        align: sides are multiples of it.
        largest: side of the larger tile.
    """
    has_memory = memory_module(device) is not None
    small, large = min(_SMALL, largest // 2), largest
    factors = (2.0, 1.0, 0.5) if has_memory else (1.0,)
    for factor in factors:
        sides = [max(align, int(n * factor) // align * align) for n in (small, large)]
        sides[1] = max(sides[1], 2 * sides[0])
        try:
            (low, _), (high, seconds) = (_peak(run, side, device) for side in sides)
            break
        except OutOfDeviceMemory:
            if factor == factors[-1]:
                raise
    small, large = sides
    per_pixel = max(0.0, (high - low) / (large**2 - small**2))
    return Footprint(max(0, int(high - per_pixel * large**2)), per_pixel, seconds / large**2)


def measure_stream(stage: Stage) -> Footprint:
    """Seconds for each LR pixel of streaming a stage, from the operations that ran: a small picture is mostly border.

    Bytes are counted by the stage's stream plan, not measured.
    """
    plan = stage.stream_plan(_LARGE // stage.align * stage.align)
    stream = RowStream(plan, stage.device)
    band = torch.rand(1, stage.inputs, plan.band, plan.width, device=stage.device)
    seconds, begun = math.inf, time.perf_counter()
    for _ in range(3):  # the first run makes the primitives of these shapes
        before, start = stream.macs, time.perf_counter()
        stream.start(0, _SMALL)
        for _ in range(0, _SMALL + plan.delay, plan.band):
            for _ in stage.push(stream, band):
                pass
        synchronize(stage.device)
        seconds = min(seconds, time.perf_counter() - start)
        if time.perf_counter() - begun > _STREAM_SECONDS:
            break
    pixels = (stream.macs - before) / plan.macs(plan.band) * plan.band * plan.width
    return Footprint(0, 0.0, seconds / pixels)


def cached(key: tuple[str, ...], measure_it: Callable[[], Footprint], device: torch.device = _CPU) -> Footprint:
    """The footprint for ``key`` on this machine's ``device``, measured when the cache does not hold it yet."""
    name = _machine_key(key, device)
    stored = cache.read("footprints", name)
    try:
        return Footprint(**cache.numbers(stored))  # type: ignore[arg-type]
    except TypeError:
        footprint = measure_it()
    cache.write("footprints", name, asdict(footprint))
    return footprint


def _peak(run: Callable[[int, int], object], side: int, device: torch.device) -> tuple[int, float]:
    run(side, side)  # buffers and primitives of this shape
    with PeakMemory(device) as peak:
        start = time.perf_counter()
        run(side, side)
        synchronize(device)
        seconds = time.perf_counter() - start
    has_memory = memory_module(device) is not None
    return (peak.device - peak.device_start if has_memory else peak.host - peak.start), seconds


def _machine_key(key: tuple[str, ...], device: torch.device) -> str:
    """Name of a measurement: everything that changes its numbers."""
    hardware = hardware_name(device) or platform.processor() or platform.machine()
    software = [torch.__version__, *library_versions(device)]
    return cache.digest(_METHOD, *key, hardware, platform.node(), *software, torch.get_num_threads())
