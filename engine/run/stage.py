"""A stage at work: one network on one device in one precision. Takes a float32 tile, returns the network's output.

Knows nothing of images, grids or files: engine.run.tiles decides what a tile is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import Tensor

from engine.archs import Upscaler
from engine.archs.layers import RGB, TAIL_REACH
from engine.bands.graph import RowGraph, read_graph
from engine.bands.stream import RowStream, StreamPlan
from engine.device.choose import PRECISIONS, check_precisions
from engine.device.heap import malloc_for_network
from engine.device.queue import full_float32, memory_errors

BAND, TAIL_BAND = 16, 4
"""Rows at a time. Higher bands copy less (a dense block keeps 6 rows from band to band) and waste more at both ends of
the picture; the tail's rows are 16 times as large (docs/log.md has what was tried)."""

BLOCK = 1024
"""Columns that an operation makes at a time on a CPU: what it makes stays in the cache, and is not taken anew from the system
for every operation (docs/log.md). Narrower ones cost more in the threads' waiting for each other."""

PIECES = 8
"""On an accelerator the tail of a network runs in so many pieces: its maps, which are 16 times as large as the trunk's, then
take no more memory than the trunk does."""


class Stage:
    """A network moved to ``device`` and cast to ``precision`` (mixed: the first and last convolution and the residual
    stream stay float32). ``full``: where to get its float32 form, for ``exact``.
    """

    def __init__(
        self,
        network: Upscaler,
        device: torch.device,
        precision: str,
        full: Callable[[], Upscaler] | None = None,
    ) -> None:
        check_precisions((precision,), 1)
        self.scale = network.scale
        self.align = network.align
        self.radius = network.radius
        self.noise_channels = network.noise_channels
        self.device = device
        self.precision = precision
        self.pieces = 1 if device.type == "cpu" else PIECES
        self._full = full
        self._exact: Stage | None = None
        if precision != "fp32":
            network.to_mixed(PRECISIONS[precision])
        self.network = network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def inputs(self) -> int:
        """Channels that the network takes: the picture's and its own noise."""
        return RGB + self.noise_channels

    @torch.inference_mode()
    def run(self, tile: Tensor) -> Tensor:
        """``tile`` float32 [1, inputs, h, w], channels-last, on the stage's device. Returns [1, 3, h * scale, w * scale]."""
        if self.pieces > 1:
            batch, _, height, width = tile.shape
            out = tile.new_empty(batch, RGB, height * self.scale, width * self.scale)
            self.fill(out, tile)
            return out
        with memory_errors(), malloc_for_network(), full_float32():
            result: Tensor = self.network(tile)
            return result

    @torch.inference_mode()
    def fill(self, out: Tensor, tiles: Tensor) -> None:
        """The output of ``tiles`` [B, inputs, h, w] into ``out`` [B, 3, h * scale, w * scale], the tail in ``pieces``: strips of
        rows of each image, or some of the images at a time.
        """
        with memory_errors(), malloc_for_network(), full_float32():
            features = self.network.trunk(tiles)
            factor = out.shape[2] // features.shape[2]
            for images, rows in _pieces(features.shape[0], features.shape[2], self.pieces):
                seen = slice(max(0, rows.start - TAIL_REACH), rows.stop + TAIL_REACH)
                output = self.network.tail(features[images, :, seen])
                first = (rows.start - seen.start) * factor
                height = (rows.stop - rows.start) * factor
                target = slice(rows.start * factor, rows.stop * factor)
                out[images, :, target] = output[:, :, first : first + height]

    @property
    def exact(self) -> Stage | None:
        """The same stage in float32, made when it is first asked for; None when this is it, or nobody knows its network."""
        if self.precision == "fp32" or self._full is None:
            return None
        if self._exact is None:
            self._exact = Stage(self._full(), self.device, "fp32")
        self._exact.pieces = self.pieces
        return self._exact

    @cached_property
    def graph(self) -> RowGraph:
        """What the network does to rows; raises UsageError when it cannot be streamed."""
        return read_graph(self.network, self.align, self.inputs)

    def stream_plan(self, width: int) -> StreamPlan:
        """How ``width`` LR columns would be streamed."""
        block = BLOCK if self.device.type == "cpu" else None
        return StreamPlan(self.graph, math.lcm(BAND, self.align), width, TAIL_BAND, block)

    def push(self, stream: RowStream, band: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Push float32 [1, inputs, band, width] into the stage's stream -> (first row, [1, 3, rows, width * scale]) that are
        complete, each to be used before the next is asked for. What operations make on the way is taken from pages that the
        heap keeps from band to band.
        """
        complete = stream.push(band)
        while True:
            with memory_errors(), malloc_for_network(trim=False), full_float32():
                made = next(complete, None)
            if made is None:
                return
            yield made[0], made[1].permute(2, 0, 1)[None]


def _pieces(images: int, rows: int, count: int) -> Iterator[tuple[slice, slice]]:
    """About ``count`` pieces of a batch: (images, rows)."""
    step, strips = max(1, images // count), min(rows, max(1, count // images))
    height = -(-rows // strips)
    for image in range(0, images, step):
        for row in range(0, rows, height):
            yield slice(image, min(image + step, images)), slice(row, min(row + height, rows))
