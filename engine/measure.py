"""Measurements that a plan needs. Runs networks, writes nothing but the user's cache, renders nothing."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from engine.device.choose import check_half, check_precisions, fast_half
from engine.device.heap import malloc_trim
from engine.device.memory import device_bytes, device_limit, free_device, free_host, process_peak, resident
from engine.device.queue import OutOfDeviceMemory, full_float32, memory_errors
from engine.device.runtime import memory_module
from engine.errors import BudgetError, InputError, UsageError, option
from engine.io.objects import Place, anchor_of, local_copy
from engine.io.original import OriginalPicture
from engine.io.photo import Source, TensorSource
from engine.kernels import tuning
from engine.model.bundle import Model
from engine.pixels import PLAIN, PixelFormat
from engine.plan.canvas import Canvas, canvas_of_picture, canvas_of_scene, wrapped_picture, wrapped_scene
from engine.plan.cost import GIB, budget_error, readable
from engine.plan.layouts import EXECUTORS, candidates
from engine.plan.limits import SATURATING, saturating_pixels
from engine.plan.make import MissingStatistics, region
from engine.plan.measured import (
    BandCost,
    Budget,
    Fallback,
    Measured,
    MeasuredStage,
    MissingMeasurement,
    PrecisionError,
    StageProfile,
)
from engine.plan.request import AUTO, Request
from engine.probe import cache, count, footprint, precision, profiles, reach
from engine.run.base import base_image
from engine.run.stage import Stage, StageFactory

Log = Callable[[str], None]

_SPREAD = 1.02
"""Peaks of equal processes differ: one that planned had 658 MiB, and one that planned and rendered 661."""


def measure(
    model: Model,
    request: Request,
    factory: StageFactory,
    *,
    out: Place,
    picture: OriginalPicture | None = None,
    log: Log = lambda _: None,
    like: Measured | None = None,
) -> Measured:
    """Measure what every plan of a request needs; ``complete`` measures more for plans that need it.

    Errors of the request are raised before anything is measured.

    Args:
        model: model to render.
        request: request of the user.
        factory: stages of the model on the device; the render uses the same ones.
        out: output, whose disk is looked at.
        picture: picture that replaces step 1.
        log: receives a line before each measurement.
        like: measurements of the same model for another picture, whose choice of precision is taken.

    Raises:
        UsageError: the request contradicts itself or the model.
        InputError: the output's folder is not one.
    """
    device, before = factory.device, process_peak()
    tuning.remember(cache.Group("tiles"))
    canvas = _canvas(model, request, picture)
    region(request, canvas)
    budget = _budget(request, device, out, picture)
    _check_picture(picture, budget)
    in_bands = any(EXECUTORS[name].layout.in_bands for name in candidates(request, device.type))
    with memory_errors(), device_limit(device, request.vram), full_float32():
        if like is not None and len(like.precisions) == canvas.stages:
            precisions, error = like.precisions, like.precision_error
        else:
            precisions, error = _precisions(model, request, canvas.stages, device, budget, log)
        stages = factory.stages(precisions)
        band_costs = [_band_cost(model, request, i, s, log) if in_bands else None for i, s in enumerate(stages)]
        device_baseline = _device_baseline(stages, device)
    fallbacks = [_fallback(model, i, s, bands) for i, (s, bands) in enumerate(zip(stages, band_costs, strict=True))]
    base = None
    if picture is None:
        with memory_errors():
            base = footprint.base_footprint(model, budget.host, request.wraps)
    malloc_trim()
    return Measured(
        canvas=canvas,
        stages=tuple(
            MeasuredStage(
                scale=stage.scale,
                align=stage.align,
                radius=stage.radius,
                inputs=stage.inputs,
                sigma=described.sigma,
                bands=bands,
                on_device=memory_module(device) is not None,
                fp32=fallback,
                profile=profile,
            )
            for stage, described, profile, bands, fallback in zip(
                stages, model.stages, _known_profiles(model, request, picture), band_costs, fallbacks, strict=False
            )
        ),
        base=base,
        baseline=_baseline(picture),
        measuring=_peak_above(before),
        device_baseline=device_baseline,
        budget=budget,
        precisions=precisions,
        precision_error=error,
        device=device.type,
        saturating=_saturating(device),
        backend=f"{device.type}, torch {torch.__version__}",
        model_digest=model.original.digest,
        noise_gain=_noise_gain(model, canvas.stages),
        picture_digest=picture.digest if picture else None,
        picture_bytes=picture.bytes_read if picture else 0,
        picture_tiles=picture.tiles if picture else None,
        pixels=picture.pixels if picture else PixelFormat(depth=request.depth or PLAIN.depth),
        profile=picture.profile_digest if picture else None,
    )


def complete(
    measured: Measured,
    missing: MissingMeasurement,
    model: Model,
    request: Request,
    factory: StageFactory,
    *,
    picture: OriginalPicture | None = None,
    log: Log = lambda _: None,
) -> Measured:
    """The measurements with the missing kind, which a plan turned out to need.

    Args:
        measured: measurements so far.
        missing: raised by the planning.
        model, request, factory, picture, log: as for ``measure``.
    """
    stages, before = factory.stages(measured.precisions), process_peak()
    with memory_errors(), device_limit(factory.device, request.vram), full_float32():
        if isinstance(missing, MissingStatistics):
            changed = _with_statistics(measured, missing, model, request, factory, picture, log)
        elif missing.kind == "tile costs":
            limit = None if factory.device.type != "cpu" else measured.budget.host  # a device finds its own limit
            costs = [footprint.stage_footprint(model, index, stage, log, limit) for index, stage in enumerate(stages)]
            changed = [replace(s, tiles=cost) for s, cost in zip(measured.stages, costs, strict=True)]
        else:
            found = profiles.measure_for_render(
                model, len(stages), request.halo_policy, picture, factory.device, log, measured.budget.networks
            )
            changed = [replace(s, profile=profile) for s, profile in zip(measured.stages, found, strict=True)]
    malloc_trim()
    measuring = max(measured.measuring, _peak_above(before))
    return replace(measured, stages=tuple(changed), baseline=_baseline(picture), measuring=measuring)


def base_source(
    model: Model, picture: OriginalPicture | None, size: tuple[int, int], seed: int, wraps: tuple[bool, bool]
) -> Source:
    """The base image of (height, width): the picture, or the image of step 1 for a seed, which may repeat."""
    if picture is not None:
        return picture if picture.size == size else picture.resampled(size)
    assert model.base_generator is not None
    with memory_errors():
        image = base_image(model.base_generator, seed, size, wraps)
    malloc_trim()  # step 1 leaves a heap of many small maps that no tile can use
    return TensorSource(image)


def _with_statistics(
    measured: Measured,
    missing: MissingStatistics,
    model: Model,
    request: Request,
    factory: StageFactory,
    picture: OriginalPicture | None,
    log: Log,
) -> list[MeasuredStage]:
    """The stages with recorded statistics, which the factory keeps, and with the error of tiles."""
    free = measured.budget.networks - (resident() if measured.budget.device is None else measured.device_baseline)
    costs = [stage.footprint for stage in measured.stages]
    recorded = reach.record_stages(
        missing.stages,
        factory.stages(measured.precisions),
        [stage.reach for stage in measured.stages],
        base_source(model, picture, measured.canvas.base, request.seed, request.wraps),
        request.seed,
        [math.isqrt(max(0, int((free - cost.fixed) / max(1.0, cost.per_pixel)))) for cost in costs],
        log,
    )
    changed = []
    for stage, found in zip(measured.stages, recorded, strict=True):
        digest = factory.keep(found.statistics) if found.statistics is not None else ""
        changed.append(replace(stage, statistics=digest, whole_error=found.error))
    return changed


def default_memory(free: int) -> int:
    """Half of the free memory, rounded down to a power of two GiB, so that plans do not change from day to day.

    Below 2 GiB, as in a small container, it is three quarters, as the idle process takes much of it.
    """
    half = free // 2 // GIB
    return GIB << (half.bit_length() - 1) if half else min(GIB, free * 3 // 4)


def _canvas(model: Model, request: Request, picture: OriginalPicture | None) -> Canvas:
    if picture is None and model.base_generator is None:
        raise UsageError(f"{model.path}: no step 1 in this model; give a picture to start from with {option('init')}")
    scales = [stage.scale for stage in model.stages]
    aligns = [model.network(index).align for index in range(len(scales))] if any(request.wraps) else []
    if picture is not None:
        canvas = canvas_of_picture(request.shape_for(picture.size), picture.size, scales, request.stages)
        return wrapped_picture(canvas, request.wraps, picture.size, scales, aligns) if any(request.wraps) else canvas
    assert model.base_size is not None
    if request.scale is not None:
        raise UsageError(
            f"{option('scale', f'{request.scale:g}')}: needs a picture to enlarge ({option('init')}); give {option('size')}"
        )
    canvas = canvas_of_scene(request.shape_for(model.base_size), model.base_size, scales, request.stages)
    if any(request.wraps):
        canvas = wrapped_scene(canvas, request.wraps, scales, aligns)
    return canvas.with_margin(_margin(model, canvas.stages))


def _noise_gain(model: Model, stages: int) -> tuple[float, ...]:
    """Factors of the noise channels of the first ``stages`` steps; empty if all are 1."""
    gains = model.noise_gain[:stages]
    return gains if any(gain != 1 for gain in gains) else ()


def _margin(model: Model, stages: int) -> int:
    """The model's margin, rounded up so that the output begins on the last stage's window."""
    factor = math.prod(s.scale for s in model.stages[: stages - 1])
    align = model.network(stages - 1).align
    step = align // math.gcd(align, factor)
    return -(-model.manifest.margin // step) * step


def _precisions(
    model: Model, request: Request, count: int, device: torch.device, budget: Budget, log: Log
) -> tuple[tuple[str, ...], PrecisionError | None]:
    """Precision of every stage, and the measured error of the chain: None where it is float32's own."""

    def errors(half: str) -> list[PrecisionError]:
        return precision.precision_errors(model, count, half, device, request.init and local_copy(request.init), log)

    networks = [model.network(index) for index in range(count)]
    if request.precision == AUTO and not all(network.has_halves for network in networks):
        return ("fp32",) * count, None
    if request.precision == AUTO:
        half = fast_half(device)
        fits = resident() + precision.bytes_needed(model, count) <= budget.host
        if half is None or not fits or not footprint.half_pays(half, device):
            return ("fp32",) * count, None
        by_first = errors(half)
        first = next((k for k, error in enumerate(by_first) if error.tolerable), count)
        return ("fp32",) * first + (half,) * (count - first), by_first[first] if first < count else None
    names = tuple(request.precision.split(","))
    chosen = names * count if len(names) == 1 else names
    check_precisions(chosen, count)
    for index, (name, network) in enumerate(zip(chosen, networks, strict=True)):
        if name not in ("fp32", *network.halves):
            raise UsageError(
                f"{option('precision', request.precision)}: {model.stages[index].architecture} does not run in {name}; "
                f"use {' or '.join(('fp32', *network.halves))}"
            )
    check_half(chosen, device)
    first = next((k for k, name in enumerate(chosen) if name != "fp32"), count)
    if len(set(chosen[first:])) != 1:
        return chosen, None  # a mixture that is not measured
    return chosen, errors(chosen[-1])[first]


def _band_cost(model: Model, request: Request, index: int, stage: Stage, log: Log) -> BandCost | None:
    """Cost of bands; None when the network cannot be streamed and bands are not requested by name."""
    try:
        return footprint.band_cost(model, index, stage, log)
    except UsageError:
        if request.executor != AUTO:
            raise
        return None


def _fallback(model: Model, index: int, stage: Stage, bands: BandCost | None) -> Fallback | None:
    """Memory of a stage in float32 beside half precision, on a device that has memory of its own."""
    if stage.precision == "fp32" or memory_module(stage.device) is None:
        return None
    return count.fallback(model, index, in_bands=bands is not None)


def _device_baseline(stages: Sequence[Stage], device: torch.device) -> int:
    """Bytes of the device that are held before the work, including libraries that are loaded in a first run."""
    if memory_module(device) is not None:
        for stage in stages:
            side = math.lcm(64, stage.align)
            with suppress(OutOfDeviceMemory):  # the plan refuses what does not fit, and names what would
                stage.run(torch.zeros(1, stage.inputs, side, side, device=device))
    return device_bytes(device)


def _saturating(device: torch.device) -> int:
    """LR pixels that occupy the whole device, from its properties where it tells them."""
    if (module := memory_module(device)) is None:
        return SATURATING
    properties = module.get_device_properties(device)
    multiprocessors, cache = (getattr(properties, name, 0) for name in ("multi_processor_count", "L2_cache_size"))
    return saturating_pixels(multiprocessors, cache) if multiprocessors and cache else SATURATING


def _baseline(picture: OriginalPicture | None) -> int:
    """Resident bytes of the idle process, with the memory that decoding the picture will take."""
    return resident() + (picture.memory if picture is not None else 0)


def _peak_above(before: int) -> int:
    """Peak of a process's resident bytes if it rose above an earlier peak, which may be that of other work; else 0."""
    return int(_SPREAD * peak) if (peak := process_peak()) > before else 0


def _check_picture(picture: OriginalPicture | None, budget: Budget) -> None:
    """Refuse a picture whose decoding does not fit, before anything reads its pixels."""
    if picture is None:
        return
    if (need := _baseline(picture)) > budget.host:
        raise budget_error(
            "memory", f"decoding {picture.path}", need=need, limit=budget.host, idle=resident(),
            remedy="a tiled TIFF, which is decoded region by region",
        )  # fmt: skip
    folder = tempfile.gettempdir()
    if picture.temporary > (free := shutil.disk_usage(folder).free):
        raise BudgetError(
            f"disk: decoding {picture.path} takes a temporary file of {readable(picture.temporary)}, more than "
            f"{readable(free)} free in {folder}; set TMPDIR to another folder, or make it a tiled TIFF"
        )


def _free_disk(out: Place, picture: OriginalPicture | None) -> int:
    """Free bytes at the nearest folder that exists, without a picture's temporary file on the same disk."""
    folder = next(p for p in anchor_of(out).absolute().parents if p.exists())
    if not folder.is_dir():
        raise InputError(f"{out}: {folder} is not a folder; choose another {option('out')}")
    free = shutil.disk_usage(folder).free
    if picture is not None and folder.stat().st_dev == Path(tempfile.gettempdir()).stat().st_dev:
        return max(0, free - picture.temporary)
    return free


def _budget(request: Request, device: torch.device, out: Place, picture: OriginalPicture | None) -> Budget:
    return Budget(
        host=request.memory or default_memory(free_host()),
        device=None if memory_module(device) is None else request.vram or free_device(device),
        disk=_free_disk(out, picture),
        holds_store=isinstance(out, Path),
    )


def _known_profiles(model: Model, request: Request, picture: OriginalPicture | None) -> Sequence[StageProfile | None]:
    """Profiles of all stages from the model file or the user's cache; None where nothing is known."""
    known: list[StageProfile | None] = [*(profiles.known_profiles(model, request.halo_policy, picture) or ())]
    return known + [None] * (len(model.stages) - len(known))
