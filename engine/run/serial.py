"""The reference executor: one tile after the other, computed, then written. Every other one must give its pixels."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from engine.geometry import Box
from engine.io.photo import Source
from engine.io.zarr_store import Sink
from engine.plan.plan import Plan


@dataclass(frozen=True, slots=True)
class BoxWritten:
    """A box of the output that is now on disk. Seconds: pulling it through the stages, and writing it."""

    box: Box
    compute_seconds: float
    write_seconds: float


def run(plan: Plan, image: Source, sink: Sink) -> Iterator[BoxWritten]:
    """Pull every missing box out of ``image`` (canvas coordinates) into ``sink`` (output coordinates)."""
    for box in sink.missing():
        start = time.perf_counter()
        pixels = image.read(box.shift(plan.roi.y0, plan.roi.x0)).numpy()
        computed = time.perf_counter()
        sink.write(box, pixels)
        yield BoxWritten(box, computed - start, time.perf_counter() - computed)
