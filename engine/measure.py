"""From a request to a plan: measures what the choice needs, and chooses precision, executor, tiles or strips.

Nothing is rendered and nothing is written but the user's cache of measurements.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from engine.device.choose import check_precisions, choose_device, fast_half
from engine.device.heap import malloc_trim
from engine.device.memory import accelerator_module, device_bytes, device_limit, free_device, free_host, resident
from engine.device.queue import full_float32, memory_errors
from engine.errors import BudgetError, InputError, UsageError
from engine.geometry import Box
from engine.io.photo import PictureSource
from engine.model.bundle import Model
from engine.plan import strips as bands
from engine.plan import tiles
from engine.plan.canvas import Canvas, resolve_canvas
from engine.plan.cost import GIB, BandCost, Budget, Projection, StageCost
from engine.plan.measured import PrecisionError, StageProfile
from engine.plan.plan import BANDS, STREAM, TILES, Plan, StagePlan, shard_of
from engine.plan.request import AUTO, Request
from engine.probe import profiles as probe
from engine.run.stage import Stage

_CONTEXT = 32
"""LR pixels of context that an inner stage makes beyond the image for the next one: a margin of 8 of step 1, enlarged once.
Enlarged further, a margin would cost as large a share of the last stage's work as of step 1's."""


class Planner:
    """A request to a model, with everything that is measured to plan it. ``baseline``: resident bytes before the work, and
    ``resident`` those on the device.
    """

    def __init__(self, model: Model, request: Request, out: Path, log: Callable[[str], None]) -> None:
        self.model = model
        self.request = request
        self.device = choose_device(request.device)
        if request.executor == STREAM and not self._may_stream:
            log("no GPU here: --executor stream runs as tiles on the CPU")
        self.picture = PictureSource(request.init) if request.init is not None else None
        self._out = out
        self._log = log
        self.canvas = self._canvas()
        self.roi = self._roi(Box(0, 0, *self.canvas.size))
        with memory_errors(), device_limit(self.device, request.vram), full_float32():
            self.precisions, self.precision_error = self._precision()
            self.stages = [self._stage(index, precision) for index, precision in enumerate(self.precisions)]
            self._costs = [self._cost(index, stage) for index, stage in enumerate(self.stages)]
            self.resident = self._resident()
        self._structure_cost = None if self.picture else StageCost(probe.structure_footprint(model), False)
        malloc_trim()
        self.baseline = resident()
        self.budget = self._budget()

    def choose(self) -> tuple[Plan, Projection]:
        """The plan of the executor that was asked for; else of the first that can make the image within the budget."""
        refusal: BudgetError | None = None
        for executor in self._executors:
            if executor == BANDS and not bands.streamable(self._costs):
                continue
            try:
                plan = self._plan(executor)
            except BudgetError as error:
                refusal = error
            else:
                return plan, self.project(plan)
        assert refusal is not None
        raise refusal

    def continued(self, stored: dict[str, Any]) -> Plan | None:
        """The plan with the cut of a stored one that is to be continued; None when nothing is to be taken from it."""
        cores, executor = _stored_cut(stored)
        if self.request.tile is not None or len(cores) != len(self.stages) or executor not in self._executors:
            return None
        if executor == BANDS and not bands.streamable(self._costs):
            return None
        return self._plan(executor, cores)

    def project(self, plan: Plan, writes: Sequence[Box] | None = None) -> Projection:
        """Cost of a plan for these writes, or for all."""
        known = (plan, self._costs, self._structure_cost, self.baseline, writes)
        return bands.project(*known) if plan.executor == BANDS else tiles.project(*known, self.resident, self.budget)

    def smaller(self, stages: Sequence[StagePlan], position: int) -> tuple[StagePlan, ...] | None:
        """The stages of a plan with a smaller tile for one of them; None when its tile was asked for or is the smallest.

        Another cut is another approximation, so only a tile that was the planner's choice may change.
        """
        core = tiles.smaller_core(stages[position]) if self.request.tile is None else None
        return None if core is None else self.recut(stages, [*(s.core for s in stages[:position]), core])

    def recut(self, stages: Sequence[StagePlan], cores: Sequence[int]) -> tuple[StagePlan, ...]:
        """The first stages with these cores and the seam errors that they then have."""
        result = list(stages)
        for position, core in enumerate(cores):
            stage = replace(stages[position], core=core)
            cut = stage.tile_shape != stage.padded
            error = _seam_error(stage, self.stages[position].radius, self.profiles[position]) if cut else 0.0
            result[position] = replace(stage, seam_error=error)
        return tuple(result)

    def _stage(self, index: int, precision: str) -> Stage:
        place = str(self.device)
        full = partial(self.model.network, index, "fp32", place)
        return Stage(self.model.network(index, precision, place), self.device, precision, full)

    def _resident(self) -> int:
        """Bytes of the device that are held before the work. What libraries load in a first run is among them."""
        if accelerator_module(self.device) is not None:
            for stage in self.stages:
                side = math.lcm(64, stage.align)
                stage.run(torch.zeros(1, stage.inputs, side, side, device=self.device))
        return device_bytes(self.device)

    def _precision(self) -> tuple[tuple[str, ...], PrecisionError | None]:
        """The precision of every stage and the measured error of the chain's end, None where it is float32's own."""
        count = self.canvas.stages
        asked = tuple(self.request.precision.split(","))
        if self.request.precision == AUTO:
            half = fast_half(self.device)
            if half is None:
                return ("fp32",) * count, None
            errors = self._precision_errors(half)
            first = next((k for k, error in enumerate(errors) if error.tolerable), count)
            return ("fp32",) * first + (half,) * (count - first), errors[first] if first < count else None
        chosen = asked * count if len(asked) == 1 else asked
        check_precisions(chosen, count)
        first = next((k for k, name in enumerate(chosen) if name != "fp32"), count)
        if len(set(chosen[first:])) != 1:
            return chosen, None  # not a mixture that is measured
        return chosen, self._precision_errors(chosen[-1])[first]

    def _precision_errors(self, half: str) -> list[PrecisionError]:
        return probe.precision_errors(self.model, self.canvas.stages, half, self.device, self.request.init, self._log)

    def _cost(self, index: int, stage: Stage) -> StageCost:
        asked = (self.model, index, stage, self._log)
        own_memory = accelerator_module(self.device) is not None
        return StageCost(probe.stage_footprint(*asked), own_memory, self._band_cost(*asked), stage.inputs)

    def _band_cost(self, *asked: Any) -> BandCost | None:  # noqa: ANN401
        """None when bands are not wanted, or cannot be had and need not."""
        if BANDS not in self._executors:
            return None
        try:
            return probe.band_cost(*asked)
        except UsageError:
            if self.request.executor == BANDS:
                raise
            return None

    @property
    def _executors(self) -> tuple[str, ...]:
        """What may be chosen from, the best first: on a CPU bands, which leave nothing to a tolerance, take a fraction of the
        memory and are as fast. A tile that is asked for speaks of tiles, unless bands are asked for, too.
        """
        asked = self.request.executor
        if asked == STREAM and not self._may_stream:
            return (TILES,)
        if asked != AUTO:
            return (asked,)
        if self.device.type != "cpu":
            return (STREAM,)
        return (TILES,) if self.request.tile or self.request.blend else (BANDS, TILES)

    @property
    def _may_stream(self) -> bool:
        """On a CPU, where it gains nothing, only when that is asked for by name."""
        return self.device.type != "cpu" or self.request.device is not None

    def _canvas(self) -> Canvas:
        if self.picture is None and self.model.structure is None:
            raise UsageError(f"{self.model.path}: no step 1 in this model; give a picture to start from with --init")
        native = self.picture.size if self.picture else self.model.base_size
        if self.picture and self.request.size:
            _check_aspect(self.picture.size, self.request.size)
        canvas = resolve_canvas(self.request.size, native, [s.scale for s in self.model.stages], self.request.stages)
        return canvas if self.picture else canvas.with_margin(self._margin(canvas.stages))

    def _margin(self, stages: int) -> int:
        """The model's, or as much more as lets what is made begin on the last stage's window."""
        factor = math.prod(s.scale for s in self.model.stages[: stages - 1])
        align = self.model.network(stages - 1).align
        step = align // math.gcd(align, factor)
        return -(-self.model.manifest.margin // step) * step

    def _budget(self) -> Budget:
        folder = next(p for p in self._out.absolute().parents if p.exists())
        if not folder.is_dir():
            raise InputError(f"{self._out}: {folder} is not a folder; choose another --out")
        return Budget(
            host=self.request.memory or default_memory(free_host()),
            device=None if accelerator_module(self.device) is None else self.request.vram or free_device(self.device),
            disk=shutil.disk_usage(folder).free,
        )

    @cached_property
    def profiles(self) -> Sequence[StageProfile | None]:
        """Measured profiles, measuring first where the overlap policy needs them and nobody has."""
        stored = [s.profile for s in self.model.stages]
        if not self.request.halo_policy.needs_profile:
            return stored
        with full_float32():
            profiles = probe.profiles_of(self.model, self.device, self._log)
            return profiles or probe.probe(self.model, self.request.init, self.device, self._log)

    def _plan(self, executor: str, cores: Sequence[int] = ()) -> Plan:
        """``cores``: of a stored plan that is to be continued."""
        profiles = self.profiles[: self.canvas.stages]
        stages, size, margin = [], self.canvas.base, self.canvas.margin
        for index, (stage, profile) in enumerate(zip(self.stages, profiles, strict=True)):
            halo = self.request.halo_policy.choose(profile, stage.radius, stage.align)
            sigma = self.model.stages[index].sigma
            spare = margin if index == len(self.stages) - 1 else _spare(margin, stage)
            name, core = f"stage {index + 1}", stage.align
            stages.append(
                StagePlan(name, *size, stage.scale, stage.align, halo, core, sigma, seam_error=None, margin=spare)
            )
            size, margin = stages[-1].grid.bounds.shape, (margin - spare) * stage.scale
        last = stages[-1]
        stages[-1] = replace(
            last,
            blend=-(-self.request.blend // last.align) * last.align,
            ramp=self.request.ramp,
            dither=self.request.dither,
        )
        planned = (
            self._strips(tuple(stages), cores)
            if executor == BANDS
            else self._tiles(tuple(stages), cores, streaming=executor == STREAM)
        )
        strip = planned[-1].core * planned[-1].scale
        shard, chunk = bands.shard_of_strips(strip, self.roi.width) if executor == BANDS else shard_of(strip)
        plan = Plan(
            canvas=self.canvas.size,
            roi=self.roi,
            base=self.canvas.base,
            stages=planned,
            shard=shard,
            chunk=chunk,
            seed=self.request.seed,
            model_digest=self.model.digest,
            precision=self.precisions[0] if len(set(self.precisions)) == 1 else ",".join(self.precisions),
            overlap=self.request.overlap,
            backend=f"{self.device.type}, torch {torch.__version__}",
            executor=executor,
            init_digest=self.picture.digest if self.picture else None,
        )
        for stage_plan in planned:
            stage_plan.check()
        cut = _cut_stages(plan)
        errors = [
            _seam_error(s, stage.radius, p) if is_cut else 0.0
            for s, stage, p, is_cut in zip(planned, self.stages, profiles, cut, strict=True)
        ]
        return replace(plan, stages=tuple(replace(s, seam_error=e) for s, e in zip(planned, errors, strict=True)))

    def _tiles(self, stages: tuple[StagePlan, ...], cores: Sequence[int], streaming: bool) -> tuple[StagePlan, ...]:
        if cores:
            return _with_cores(stages, cores)
        if self.request.tile is None:
            known = (stages, self._costs, self._structure_cost, self.budget, self.baseline)
            return tiles.choose_cores(*known, self.resident, streaming)
        return _with_cores(stages, [_rounded(self.request.tile, s) for s in stages])

    def _strips(self, stages: tuple[StagePlan, ...], cores: Sequence[int]) -> tuple[StagePlan, ...]:
        core = cores[-1] if cores else self.request.tile
        if core is None:
            return bands.choose_strips(
                stages, self._costs, self._structure_cost, self.budget, self.baseline, self.roi.width
            )
        return bands.with_strips(
            stages, self._costs, min(_rounded(core, stages[-1]), -(-self.roi.width // stages[-1].scale))
        )

    def _roi(self, whole: Box) -> Box:
        roi = self.request.roi or whole
        if not roi.area or not whole.contains(roi):
            raise UsageError(
                f"--roi {roi.x0},{roi.y0},{roi.width},{roi.height}: not inside the canvas of {whole.width}x{whole.height}"
            )
        return roi


def _spare(margin: int, stage: Stage) -> int:
    """Of a stage's margin what need not be enlarged, for the next one to have ``_CONTEXT`` still."""
    return max(0, margin - -(-_CONTEXT // stage.scale)) // stage.align * stage.align


def default_memory(free: int) -> int:
    """Half of what is free, rounded down to a power of two GiB, so that plans do not change from day to day."""
    half = max(1, free // 2 // GIB)
    return GIB << (half.bit_length() - 1)


def _check_aspect(picture: tuple[int, int], size: tuple[int, int]) -> None:
    stretch = (size[1] / size[0]) / (picture[1] / picture[0])
    if not 0.98 <= stretch <= 1.02:
        height = round(size[1] * picture[0] / picture[1])
        raise UsageError(
            f"--size {size[1]}x{size[0]} would stretch the picture of {picture[1]}x{picture[0]} by {abs(stretch - 1):.0%}; "
            f"use {size[1]}x{height}, or leave --size out"
        )


def _cut_stages(plan: Plan) -> list[bool]:
    """Of every stage, whether any of its tiles or strips has an edge inside the image."""
    if plan.executor != BANDS:
        return [s.tile_shape != s.padded for s in plan.stages]
    reads = [plan.reads(strip) for strip in plan.strips()]
    return [any(read[i] != (0, s.padded[1]) for read in reads) for i, s in enumerate(plan.stages)]


def _seam_error(stage: StagePlan, radius: int, profile: StageProfile | None) -> float | None:
    """Of a stage that is cut."""
    if stage.halo >= radius:
        return 0.0
    point = profile.at(stage.halo) if profile else None
    return point.max if point else None


def _stored_cut(plan: dict[str, Any]) -> tuple[list[int], str]:
    """The cores of a stored plan and its executor; none when it is damaged, which is found when the plans are compared."""
    try:
        cores, executor = [stage["core"] for stage in plan["stages"]], str(plan["executor"])
    except (KeyError, TypeError):
        return [], ""
    return (cores, executor) if all(type(core) is int and core > 0 for core in cores) else ([], "")


def _with_cores(stages: Sequence[StagePlan], cores: Sequence[int]) -> tuple[StagePlan, ...]:
    return tuple(replace(s, core=c) for s, c in zip(stages, cores, strict=True))


def _rounded(tile: int, stage: StagePlan) -> int:
    """``--tile`` rounded up to the stage's window, and to an even output so that the pyramid halves it."""
    step = stage.align if stage.align * stage.scale % 2 == 0 else 2 * stage.align
    return -(-tile // step) * step
