"""A stage: one network on one device in one precision. Knows nothing of images, grids or files."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial

import torch
from torch import Tensor

from engine.archs import Upscaler, to_mixed
from engine.archs.layers import RGB, TAIL_REACH
from engine.bands.check import checked_graph
from engine.bands.graph import RowGraph, radius, read_graph
from engine.bands.stream import RowStream, StreamPlan
from engine.device.choose import PRECISIONS, check_precisions
from engine.device.heap import MMAP_THRESHOLD_IN_NETWORK, MMAP_THRESHOLD_IN_STEPS, malloc_for_network
from engine.device.queue import full_float32, memory_errors
from engine.errors import UsageError
from engine.kernels.launch import use_kernel
from engine.model.bundle import Model
from engine.run.statistics import Site, Statistics, find_sites

BAND, TAIL_BAND = 24, 4
"""Rows of a band, and of a band within the tail, whose rows are 16 times as large, on a CPU.

Higher bands copy less (a dense block keeps 6 rows from band to band) and waste more at both ends of the picture
(docs/log.md has the measurements).
"""

DEVICE_BAND, DEVICE_TAIL_BAND = 32, 8
"""The same on an accelerator, which 16 rows keep busy too shortly: a band has the same launches, however high it is.

Forecast from the launches (docs/decisions/0027); not yet measured on a GPU.
"""

BLOCK = 1024
"""Columns that an operation computes at a time on a CPU, so that its output stays in the cache (docs/log.md).

Narrower blocks cost more in threads that wait for each other.
"""

MAX_WORKERS = 12
"""Threads that compute links of a network at the same time on a CPU. Further ones share the operations of a link."""

TAIL_CHUNKS = 8
"""Chunks in which an accelerator runs a network's tail, whose maps are 16 times as large as the trunk's.

With 8 chunks the tail takes no more memory than the trunk, in tiles of 144 rows or more.
"""


class Stage:
    """A network, moved to a device and cast to a precision.

    In half precision the first and last convolution and the residual path stay float32 (mixed precision).
    """

    def __init__(
        self,
        network: Upscaler,
        device: torch.device,
        precision: str,
        make_fp32: Callable[[], Upscaler] | None = None,
    ) -> None:
        """
        Args:
            network: network in float32; it is cast and moved in place.
            device: device that computes.
            precision: ``fp32``, ``bf16`` or ``fp16``.
            make_fp32: makes another network with the same weights in float32, for ``fp32_fallback``.
        """
        check_precisions((precision,), 1)
        self.scale = network.scale
        self.align = network.align
        self.noise_channels = network.noise_channels
        self.device = device
        self.precision = precision
        self.default_chunks = 1 if device.type == "cpu" else TAIL_CHUNKS
        self._make_fp32 = make_fp32
        self._statistics: Statistics | None = None
        if precision != "fp32":
            network = to_mixed(network, PRECISIONS[precision], kernels=use_kernel(device, None))
        self.network = network.to(device)
        for tensor in (*self.network.parameters(), *self.network.buffers()):
            if tensor.ndim == 4:  # FFTformer has one of five axes, which has no such order
                tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)

    @property
    def inputs(self) -> int:
        """Channels of the input: the picture and the noise channels."""
        return RGB + self.noise_channels

    @cached_property
    def sites(self) -> dict[int, Site]:
        """Operations of the network that look at the whole picture through a small statistic."""
        return find_sites(self.run, self.inputs, self.align, self.device) or {}

    def with_statistics(self, statistics: Statistics) -> Stage:
        """This stage, whose network takes constants for its statistics of the whole picture; the network is shared."""
        stage = copy.copy(self)
        stage.release_fp32()
        stage._statistics = statistics
        return stage

    def _frozen(self) -> AbstractContextManager[object]:
        return nullcontext() if self._statistics is None else self._statistics.frozen()

    @torch.inference_mode()
    def run(self, tile: Tensor, tail_chunks: int | None = None) -> Tensor:
        """Output of a tile.

        Args:
            tile: float32 [1, inputs, h, w], channels-last, on the stage's device.
            tail_chunks: chunks in which the tail runs; by default the device's.

        Returns:
            [1, 3, h * scale, w * scale].
        """
        chunks = tail_chunks or self.default_chunks
        if chunks > 1:
            batch, _, height, width = tile.shape
            out = tile.new_empty(batch, RGB, height * self.scale, width * self.scale)
            self.fill(out, tile, chunks)
            return out
        with memory_errors(), malloc_for_network(), full_float32(), self._frozen():
            result: Tensor = self.network(tile)
            return result

    @torch.inference_mode()
    def fill(self, out: Tensor, tiles: Tensor, tail_chunks: int) -> None:
        """Write the output of a batch into a buffer, with the tail in chunks: strips of rows, or some of the images.

        Args:
            out: [B, 3, h * scale, w * scale].
            tiles: float32 [B, inputs, h, w].
            tail_chunks: number of chunks; it changes memory, not pixels.
        """
        with memory_errors(), malloc_for_network(), full_float32(), self._frozen():
            features = self.network.trunk(tiles)
            factor = out.shape[2] // features.shape[2]
            for images, rows in _chunks(features.shape[0], features.shape[2], tail_chunks):
                seen = slice(max(0, rows.start - TAIL_REACH), rows.stop + TAIL_REACH)
                output = self.network.tail(features[images, :, seen])
                first = (rows.start - seen.start) * factor
                height = (rows.stop - rows.start) * factor
                target = slice(rows.start * factor, rows.stop * factor)
                out[images, :, target] = output[:, :, first : first + height]

    @cached_property
    def fp32_fallback(self) -> Stage | None:
        """The same stage in float32; None if this stage is in float32, or if its network cannot be made again."""
        if self.precision == "fp32" or self._make_fp32 is None:
            return None
        stage = Stage(self._make_fp32(), self.device, "fp32")
        stage._statistics = self._statistics
        return stage

    def release_fp32(self) -> None:
        """Free the weights of ``fp32_fallback``, which is made again when it is needed."""
        self.__dict__.pop("fp32_fallback", None)

    @property
    def graph(self) -> RowGraph:
        """The network's operations on rows. Raises UsageError when it cannot be streamed."""
        if isinstance(self._graph, UsageError):
            raise self._graph.with_traceback(None)
        return self._graph

    @cached_property
    def _graph(self) -> RowGraph | UsageError:
        packs = self.device.type == "cpu"
        try:
            if self.network.is_own or self.device.type == "meta":
                return read_graph(self.network, self.align, self.inputs, packs=packs)
            with memory_errors(), full_float32():
                if self.fp32_fallback is None:
                    return checked_graph(self.network, self.align, self.inputs, packs=packs)
                _ = self.fp32_fallback.graph  # of the same code
            self.release_fp32()
            return read_graph(self.network, self.align, self.inputs, packs=packs)
        except UsageError as error:
            return error

    @cached_property
    def radius(self) -> int:
        """Receptive field, one-sided, in LR pixels: of its row graph where the network does not state it, else ``UNBOUNDED``."""
        if self.network.is_own or isinstance(self._graph, UsageError):
            return self.network.radius
        return radius(self._graph, self.align)

    @property
    def can_stream(self) -> bool:
        """Whether bands can run the network."""
        return not isinstance(self._graph, UsageError)

    def stream_plan(self, width: int) -> StreamPlan:
        """Plan for streaming ``width`` LR columns."""
        if self.device.type == "cpu":
            threads = torch.get_num_threads()
            workers = min(threads, MAX_WORKERS) if threads > 1 else 0
            return StreamPlan(self.graph, math.lcm(BAND, self.align), width, TAIL_BAND, BLOCK, workers)
        return StreamPlan(self.graph, math.lcm(DEVICE_BAND, self.align), width, DEVICE_TAIL_BAND)

    def push(self, stream: RowStream, band: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Push a band into the stage's stream.

        Temporary buffers come from pages that the heap keeps from band to band.

        Args:
            stream: stream of this stage.
            band: float32 [1, inputs, rows, width].

        Yields:
            (first row, [1, 3, rows, width * scale]) of complete rows; use each before the next is requested.
        """
        complete = stream.push(band)
        threshold = MMAP_THRESHOLD_IN_NETWORK if stream.plan.workers else MMAP_THRESHOLD_IN_STEPS
        while True:
            with memory_errors(), malloc_for_network(trim=False, threshold=threshold), full_float32():
                rows = next(complete, None)
            if rows is None:
                return
            yield rows[0], rows[1].permute(2, 0, 1)[None]


class StageFactory:
    """Stages of a model on one device. Steps that share weights and precision share a stage."""

    def __init__(self, model: Model, device: torch.device) -> None:
        self.device = device
        self._model = model
        self._stages: dict[tuple[str, str], Stage] = {}
        self.statistics: dict[str, Statistics] = {}
        """Recorded statistics by their digest."""

    def stages(self, precisions: Sequence[str]) -> list[Stage]:
        """The first stages of the model, one for each precision."""
        return [self.stage(index, precision) for index, precision in enumerate(precisions)]

    def keep(self, statistics: Statistics) -> str:
        """Keep statistics; returns their digest."""
        digest = statistics.digest
        self.statistics[digest] = statistics
        return digest

    def frozen(self, stage: Stage, digest: str) -> Stage:
        """A stage with the statistics of this digest; the stage itself if it is empty."""
        return stage.with_statistics(self.statistics[digest]) if digest else stage

    def stage(self, index: int, precision: str) -> Stage:
        """The stage of a step in a precision."""
        key = (self._model.stages[index].weights, precision)
        if key not in self._stages:
            make_fp32 = partial(self._model.new_network, index)
            self._stages[key] = Stage(self._model.new_network(index), self.device, precision, make_fp32)
        return self._stages[key]


def _chunks(images: int, rows: int, count: int) -> Iterator[tuple[slice, slice]]:
    """About ``count`` chunks of a batch: (images, rows)."""
    step, strips = max(1, images // count), min(rows, max(1, count // images))
    height = -(-rows // strips)
    for image in range(0, images, step):
        for row in range(0, rows, height):
            yield slice(image, min(image + step, images)), slice(row, min(row + height, rows))
