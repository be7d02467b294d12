"""The reference executor: computes one tile after the other, then writes it. Every other executor gives the same pixels."""

from __future__ import annotations

import time
from collections.abc import Iterator

from engine.io.sink import Sink
from engine.run.pipeline import BoxWritten, Pipeline
from engine.run.reduce import canvas_image


def run(pipeline: Pipeline, sink: Sink) -> Iterator[BoxWritten]:
    """Compute and write every missing box, one by one."""
    image, roi = canvas_image(pipeline.plan, pipeline.tiles()[-1], pipeline.finish), pipeline.plan.roi
    for box in sink.missing():
        start = time.perf_counter()
        pixels = image.read(box.shift(roi.y0, roi.x0)).numpy()
        computed = time.perf_counter()
        sink.write(box, pixels)
        yield BoxWritten(box, computed - start, time.perf_counter() - computed)
