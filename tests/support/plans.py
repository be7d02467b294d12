"""Small plans and measurements by hand, without a model."""

import math
from dataclasses import replace

from engine.geometry import Box
from engine.plan.canvas import Canvas
from engine.plan.measured import Budget, Footprint, Measured, MeasuredStage
from engine.plan.plan import Plan
from engine.plan.sides import shards_of
from engine.plan.stage import StagePlan, step_of

GIB = 1 << 30


def stage_of(height, width, tile, halo, align=1, scale=4, position=0, sigma=0.0, **changes):
    """A stage's cut; ``position`` counts from 0; ``tile``: a side, or (rows, columns)."""
    rows, columns = square(tile)
    return StagePlan(
        step=step_of(position), height=height, width=width, scale=scale, align=align, halo=halo, tile=columns,
        tile_rows=rows, sigma=sigma, **changes,
    )  # fmt: skip


def square(side):
    """(height, width) of a side; of a pair, itself."""
    return (side, side) if isinstance(side, int) else side


def chain(base=(135, 256), scales=(4, 4, 4), halo=24, align=8):
    """The stages of a render with the smallest tiles, from which a layout chooses."""
    return stages_of(base, [align] * len(scales), [halo] * len(scales), scales, align)


def stages_of(base, tiles, halos, scales, align=1):
    """The cuts of a chain over a base of (height, width)."""
    stages, (height, width) = [], base
    for position, (tile, halo, scale) in enumerate(zip(tiles, halos, scales, strict=True)):
        is_last = position == len(scales) - 1
        stages.append(stage_of(height, width, tile, halo, align, scale, position, is_image=is_last))
        height, width = height * scale, width * scale
    return tuple(stages)


def plan_of(size=(700, 1000), base=None, cores=(16, 32), halos=(8, 4), roi=None, scales=(4, 4), align=1, **changes):
    """A plan of tiles; ``cores``: tile of every stage, a side or (rows, columns), as are ``shard`` and ``chunk``."""
    base = base or tuple(-(-n // math.prod(scales)) for n in size)
    stages = stages_of(base, cores, halos, scales, align)
    shard, chunk = shards_of(stages[-1].grid.cell)
    changes |= {name: square(changes[name]) for name in ("shard", "chunk") if name in changes}
    fields = {
        "canvas": size,
        "roi": roi or Box(0, 0, *size),
        "base": base,
        "stages": stages,
        "shard": shard,
        "chunk": chunk,
        "seed": 1,
        "model_digest": "0123",
        "precision": "fp32",
        "backend": "cpu",
    }
    return Plan(**(fields | changes))


def bands_of(size=(700, 1000), band=16, **changes):
    """The same plan in bands, with strips of ``cores`` LR columns."""
    plan = plan_of(size, **changes)
    return replace(plan, executor="bands", stages=tuple(replace(s, band=band) for s in plan.stages))


def cost_of(fixed=0, per_pixel=0.0, seconds=0.0, *, bands=None, **changes):
    """A measured stage of scale 4; ``bands``: its ``BandCost``."""
    fields = {"scale": 4, "align": 1, "radius": 0}
    return MeasuredStage(tiles=Footprint(fixed, per_pixel, seconds), bands=bands, **(fields | changes))


def measured_of(stages, *, host=64 * GIB, device=None, disk=1 << 50, base=None, baseline=0, **changes):
    """Measurements of these stages with a budget; ``base``: footprint of step 1."""
    fields = {
        "canvas": Canvas((700, 1000), (44, 63), len(stages)),
        "precisions": ("fp32",) * len(stages),
        "budget": Budget(host, device, disk),
    }
    return Measured(stages=tuple(stages), base=base, baseline=baseline, **(fields | changes))
