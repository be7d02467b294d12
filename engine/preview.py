"""Contact sheet of many seeds: step 1 and its first enlargement, from which one is chosen and rendered large."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from engine.errors import UsageError, option
from engine.geometry import Box
from engine.io.contact_sheet import write_sheet
from engine.io.photo import TensorSource
from engine.io.sink import Array
from engine.job import Job, Log
from engine.model.bundle import Model
from engine.plan.canvas import canvas_of_scene, first_enlargement
from engine.plan.reduction import Reduction
from engine.plan.request import MAX_SEED, Request
from engine.run.finish import Finish
from engine.run.reduce import ReducedImage

THUMBNAIL = 512
"""Longer side of a picture on the sheet, in pixels."""

MAX_SEEDS = 400
"""Seeds of a sheet: its thumbnails are held in memory."""


def contact_sheet(
    model: Model,
    request: Request,
    out: Path,
    count: int,
    *,
    on_seed: Callable[[int], None] = lambda seed: None,
    log: Log = lambda line: None,
) -> Sequence[int]:
    """Write pictures of consecutive seeds, each with its number, as one picture.

    A render of any size that keeps the scene (``engine.plan.canvas``) shows the same picture for the same seed.

    Args:
        model: model with step 1.
        request: request of the render to choose a seed for; its size decides the shape of the pictures.
        out: picture to write: .png, .jpg or .webp.
        count: number of seeds, from ``request.seed`` on.
        on_seed: called after each seed.
        log: receives a line before each measurement.

    Returns:
        The seeds, row by row from the upper left.

    Raises:
        UsageError: the model has no step 1, a picture is given, or the number of seeds is out of range.
        InputError: the sheet cannot be written.
    """
    if model.base_size is None or request.init is not None:
        raise UsageError(f"{option('preview', count)}: needs a model with step 1, and no {option('init')}")
    if not 1 <= count <= MAX_SEEDS or request.seed + count - 1 > MAX_SEED:
        raise UsageError(f"{option('preview', count)}: use 1 to {MAX_SEEDS} seeds, and seeds up to {MAX_SEED}")
    scales = [stage.scale for stage in model.stages]
    shape = request.shape_for(model.base_size)
    if not canvas_of_scene(shape, model.base_size, scales, request.stages).keeps_scene:
        log("another size has another scene: the sheet shows that of smaller sizes, without --stages")
    height, width = first_enlargement(shape, model.base_size, scales[0])
    small = replace(request, size=(width, height), width=None, stages=None, roi=None, dither=False, depth=None)
    job = Job.prepare(model, small, out.with_name(out.name + ".zarr"), log)
    job.check()
    seeds = range(request.seed, request.seed + count)
    thumbnails = []
    for seed in seeds:
        thumbnails.append(_thumbnail(job.pixels(seed)))
        on_seed(seed)
    write_sheet(out, thumbnails, [str(seed) for seed in seeds])
    return seeds


def _thumbnail(pixels: Array) -> Array:
    """uint8 [h, w, 3] with a longer side of at most ``THUMBNAIL``."""
    height, width = pixels.shape[1:]
    factor = min(1.0, THUMBNAIL / max(height, width))
    size = (max(1, math.floor(height * factor)), max(1, math.floor(width * factor)))
    source = TensorSource(torch.from_numpy(pixels.astype(np.float32) / 255))
    reduced = ReducedImage(source, Reduction((height, width), size), Finish())
    return reduced.read(Box(0, 0, *size)).numpy().transpose(1, 2, 0)
