"""Small plans by hand, without a model."""

import math
from dataclasses import replace

from engine.geometry import Box
from engine.plan.plan import BANDS, Plan, StagePlan, shard_of


def stage_of(height, width, core, halo, align=1, scale=4, name="stage 1", sigma=0.0):
    return StagePlan(name, height, width, scale, align, halo, core, sigma, None)


def chain(base=(135, 256), scales=(4, 4, 4), halo=24, align=8):
    """The stages of a render, of the smallest cores: what a budget chooses from."""
    stages, (height, width) = [], base
    for index, scale in enumerate(scales):
        stages.append(stage_of(height, width, align, halo, align, scale, f"stage {index + 1}"))
        height, width = height * scale, width * scale
    return tuple(stages)


def plan_of(size=(700, 1000), base=None, cores=(16, 32), halos=(8, 4), roi=None, scales=(4, 4), align=1, **changes):
    height, width = base or tuple(-(-n // math.prod(scales)) for n in size)
    base = (height, width)
    stages = []
    for index, (core, halo, scale) in enumerate(zip(cores, halos, scales, strict=True)):
        stages.append(stage_of(height, width, core, halo, align, scale, f"stage {index + 1}"))
        height, width = height * scale, width * scale
    shard, chunk = shard_of(cores[-1] * scales[-1])
    fields = {
        "canvas": size,
        "roi": roi or Box(0, 0, *size),
        "base": base,
        "stages": tuple(stages),
        "shard": shard,
        "chunk": chunk,
        "seed": 1,
        "model_digest": "0123",
        "precision": "fp32",
        "overlap": "auto",
        "backend": "cpu",
    }
    return Plan(**(fields | changes))


def bands_of(size=(700, 1000), band=16, **changes):
    """The same with strips, ``cores`` LR columns wide, in bands."""
    plan = plan_of(size, **changes)
    return replace(plan, executor=BANDS, stages=tuple(replace(s, band=band) for s in plan.stages))
