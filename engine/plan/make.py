"""From a request and its measurements to a plan: pure functions, without tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from engine.errors import BudgetError, UsageError, option
from engine.geometry import UNBOUNDED, Box
from engine.plan.canvas import Canvas
from engine.plan.cost import Projection
from engine.plan.halo import HaloPolicy, seam_error
from engine.plan.layouts import EXECUTORS, candidates
from engine.plan.measured import Measured, MissingMeasurement
from engine.plan.plan import Plan
from engine.plan.request import AUTO, Request
from engine.plan.sides import Sides
from engine.plan.stage import StagePlan, step_of
from engine.plan.stored import StoredCut

_CONTEXT = 32
"""LR pixels of context that an inner stage makes beyond the image for the next one: a margin of 8 of step 1, enlarged once.

Enlarged further, a margin would cost as large a share of the last stage's work as of step 1's.
"""

_EXACT_WORK = 2.0
"""Work of an image that wraps with exact context, by that of one period, up to which the context is exact by default: the
receptive field of a deep network may be larger than a small picture.
"""


class MissingStatistics(MissingMeasurement):
    """A plan needs the statistics of the whole picture, or the error of tiles against it, for its halos."""

    def __init__(self, stages: tuple[StagePlan, ...]) -> None:
        """
        Args:
            stages: stages with their halos, without a cut.
        """
        super().__init__("statistics")
        self.stages = stages


def make_plan(request: Request, measured: Measured, cut: StoredCut | None = None) -> Plan:
    """Plan of the requested executor, or of the preferred executor that fits the budget.

    Args:
        request: request of the user.
        measured: measurements for that request.
        cut: cut of a stored plan to continue, in place of a choice.

    Raises:
        BudgetError: no executor fits the budget.
        UsageError: a stage needs a measurement that is missing, the requested executor cannot run the networks, or options
            contradict each other.
        AlignmentError: a margin or a band is not a multiple of its stage's window.
    """
    if cut is not None:
        return _plan(request, measured, cut.executor, cut)
    refusal: BudgetError | None = None
    for name in candidates(request, measured.device):
        if not EXECUTORS[name].layout.is_possible(measured):
            continue
        try:
            return _plan(request, measured, name, None)
        except BudgetError as error:
            refusal = error
    raise refusal or UsageError(
        f"{option('executor', request.executor)}: cannot run the networks of this model; use {option('executor', 'tiles')}"
    )


def project(plan: Plan, measured: Measured, writes: Iterable[Box] | None = None) -> Projection:
    """Cost of a plan for these boxes of whole writes, or for all."""
    projection = EXECUTORS[plan.executor].layout.project(plan, measured, writes)
    return replace(projection, measuring=measured.measuring)


def seam_errors(plan: Plan, measured: Measured) -> tuple[float | None, ...]:
    """Largest seam error of every stage, in levels of 255: 0.0 if exact, None if not measured."""
    edges = EXECUTORS[plan.executor].layout.inner_edges(plan)
    return tuple(
        seam_error(cut, stage, has_inner_edges=has_edges)
        for cut, stage, has_edges in zip(plan.stages, measured.stages, edges, strict=True)
    )


def region(request: Request, canvas: Canvas) -> Box:
    """Region that is written, in canvas pixels. Raises UsageError when it is not inside the canvas."""
    whole = Box(0, 0, *canvas.size)
    roi = request.roi or whole
    if not roi.area or not whole.contains(roi):
        value = f"{roi.x0},{roi.y0},{roi.width},{roi.height}"
        raise UsageError(
            f"{option('roi', value)}: not inside the canvas of {whole.width}x{whole.height}; use X,Y,WIDTH,HEIGHT inside it"
        )
    return roi


def _plan(request: Request, measured: Measured, name: str, cut: StoredCut | None) -> Plan:
    layout, roi = EXECUTORS[name].layout, region(request, measured.canvas)
    tile = request.core if cut is None else cut.tiles[-1]
    # A halo decides no pixel where no edge is inside the image. A region has the pixels of the whole image by exact halos.
    # Neither needs a measurement. An image that wraps continues at its sides, where a requested halo decides.
    stages = None
    is_bounded = all(stage.radius < UNBOUNDED for stage in measured.stages)
    is_uncut = roi.width == measured.canvas.size[1] and not any(measured.canvas.wraps)
    if is_bounded and (is_uncut or request.overlap == AUTO):
        exact = _uncut_stages(HaloPolicy("exact"), request, measured)
        if _work(exact) <= _EXACT_WORK:
            stages = layout.whole(exact, measured, roi.width, tile)
    elif not is_bounded and not any(measured.canvas.wraps):
        one_tile = _uncut_stages(HaloPolicy("0"), request, measured, is_one_tile=True)
        if cut is None:
            stages = layout.whole(one_tile, measured, roi.width, tile)
        else:
            restored = layout.restore(one_tile, measured, roi.width, cut.tiles)
            stages = restored if all(s.tile_shape == s.padded for s in restored) else None
    if stages is None:
        uncut = _uncut_stages(request.halo_policy, request, measured)
        if cut is None:
            stages = layout.choose(uncut, measured, roi.width, tile)
        else:
            stages = layout.restore(uncut, measured, roi.width, cut.tiles)
        stages = _with_statistics(stages, uncut, request, measured)
    shard, chunk = layout.shard(stages[-1], roi.width)
    for stage in stages:
        stage.check()
    precisions = measured.precisions
    return Plan(
        canvas=measured.canvas.size,
        roi=roi,
        base=measured.canvas.base,
        stages=stages,
        shard=shard,
        chunk=chunk,
        seed=request.seed,
        model_digest=measured.model_digest,
        precision=precisions[0] if len(set(precisions)) == 1 else ",".join(precisions),
        backend=measured.backend,
        executor=name,
        init_digest=measured.picture_digest,
        enlarged=measured.canvas.enlarged,
        pixels=measured.pixels,
        profile=measured.profile,
        noise_gain=measured.noise_gain,
    )


def _with_statistics(
    stages: tuple[StagePlan, ...], uncut: tuple[StagePlan, ...], request: Request, measured: Measured
) -> tuple[StagePlan, ...]:
    """The stages with the statistics that they take as constants.

    Raises:
        MissingMeasurement: they were not recorded yet, or the error of tiles against the whole picture was not measured.
        UsageError: that error is above the tolerance, and was not accepted; or the image repeats.
    """
    chosen = []
    for stage, facts in zip(stages, measured.stages, strict=True):
        if facts.reach == "local":
            chosen.append(stage)
            continue
        if any(measured.canvas.wraps):
            raise UsageError(
                f"{option('wrap')}: {stage.name} looks at the whole picture, whose sides it would show; use a model that looks "
                "at a part of it"
            )
        if (error := facts.whole_error) is None:
            _ = [other.footprint for other in measured.stages]  # tells how large the measured part may be
            raise MissingStatistics(uncut)
        if error.max > request.seam_tolerance and not request.accept_error:
            raise UsageError(
                f"{stage.name}: looks at the whole picture, and tiles differ from it by up to {error.max:.2f} levels of 255, "
                f"{error.mean:.2f} on average ({option('seam_tolerance', request.seam_tolerance)}); give "
                f"{option('accept_error', True)} to take that, or more {option('memory')} for one tile"
            )
        chosen.append(replace(stage, statistics=facts.statistics))
    return tuple(chosen)


def _uncut_stages(
    policy: HaloPolicy, request: Request, measured: Measured, *, is_one_tile: bool = False
) -> tuple[StagePlan, ...]:
    """Every stage with its halo and margin, and with the smallest tile; without a halo for one tile."""
    stages: list[StagePlan] = []
    canvas = measured.canvas
    halos = [0 if is_one_tile else policy.choose(s.profile, s.radius, s.align) for s in measured.stages]
    spares = _spares(halos, measured)
    period, margin = canvas.base, canvas.margin  # a period along the axes that wrap
    context = halos[0] + spares[0]
    for position, stage in enumerate(measured.stages):
        is_last = position == len(measured.stages) - 1
        # A margin is enlarged only as far as the next stage needs it as context.
        spare = max(0, margin - -(-_CONTEXT // stage.scale)) // stage.align * stage.align
        cut = StagePlan(
            step=step_of(position),
            height=period[0] + 2 * context * canvas.wraps[0],
            width=period[1] + 2 * context * canvas.wraps[1],
            scale=stage.scale,
            align=stage.align,
            halo=halos[position],
            tile=stage.align,
            sigma=stage.sigma,
            margin=margin if is_last else spare,
            is_image=is_last and measured.is_direct,
            period=_where(canvas.wraps, period),
            start=_where(canvas.wraps, (-context, -context)),
            context=_where(canvas.wraps, (context - spares[position],) * 2),
        )
        stages.append(cut)
        context, margin = spares[position] * stage.scale, (margin - cut.margin) * stage.scale
        height, width = cut.grid.bounds.shape
        period = height - 2 * context * canvas.wraps[0], width - 2 * context * canvas.wraps[1]
    last = stages[-1]
    blend = -(-request.blend // last.align) * last.align
    stages[-1] = replace(last, blend=blend, ramp=request.ramp, dither=request.dither)
    return tuple(stages)


def _spares(halos: Sequence[int], measured: Measured) -> list[int]:
    """Pixels beyond each side of a period that every stage enlarges for the next: its halo, and what that one enlarges.

    They are whole windows in both stages. The last stage enlarges what a reduction reads.
    """
    last, reduction = measured.stages[-1], measured.canvas.reduction
    reach = max(reduction.rows.reach, reduction.columns.reach)
    spares = [-(-reach // (last.scale * last.align)) * last.align]
    for halo, stage, following in zip(halos[:0:-1], measured.stages[-2::-1], measured.stages[:0:-1], strict=True):
        step = math.lcm(stage.align, following.align // math.gcd(following.align, stage.scale))
        spares.append(-(-(halo + spares[-1]) // (stage.scale * step)) * step)
    return spares[::-1]


def _work(stages: Sequence[StagePlan]) -> float:
    """Pixels that stages compute, by those of their sources: above 1 for an image that wraps."""
    return sum(s.height * s.width for s in stages) / sum(math.prod(s.source_shape) for s in stages)


def _where(wraps: tuple[bool, bool], sides: Sides) -> Sides:
    """The sides along the axes that wrap, 0 along others."""
    return sides[0] * wraps[0], sides[1] * wraps[1]
