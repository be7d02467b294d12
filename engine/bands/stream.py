"""Row streams: push a picture's rows from top to bottom, get the output's rows as soon as they are complete.

A network is a chain of segments (``engine.bands.segment``). On a CPU the part before the first enlargement is cut into links,
which threads compute for several bands at the same time.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import accumulate
from operator import mul

import torch
from torch import Tensor

from engine.bands.graph import RowGraph, links, split
from engine.bands.needs import Needs, Range, union
from engine.bands.rules import Rows
from engine.bands.segment import STEPS, SegmentPlan, SegmentStream, Spares
from engine.bands.wavefront import Wavefront
from engine.device.heap import raise_mmap_threshold
from engine.device.queue import DeviceQueue, device_queue

_UNBOUNDED = 1 << 40
"""Rows of a picture without ends."""

_HOLES, _MOST_HOLES = 12, 48 << 20
"""Freed temporaries of links that the heap keeps and cannot use again, and their bytes, at most."""

_FEW_OPERATIONS = 4
"""Operations of a link, on average, up to which such holes are counted."""


@dataclass(frozen=True, slots=True)
class Skip:
    """An output, or the network's input, that a later segment reads again."""

    source: int
    """Segment whose output it is; -1 for the network's input."""
    rows: int
    """Rows that the later segment's own input lags behind it."""


class StreamPlan:
    """Bands and memory of a network that streams a picture of a given width. Holds no tensors."""

    def __init__(
        self,
        graph: RowGraph,
        band: int,
        width: int,
        tail_band: int | None = None,
        block: int | None = None,
        workers: int = 0,
    ) -> None:
        """Cut the network into segments and plan their buffers.

        Args:
            graph: the network.
            band: input rows per push, a multiple of the network's ``align``.
            width: input columns.
            tail_band: input rows whose output the tail (from the first enlargement on) computes at a time, since its
                rows are the largest; a divisor of ``band``. None: ``band``.
            block: columns that an operation computes at a time, so that its output fits the processor's cache. None: all.
            workers: threads that compute links at the same time, at most; below 2 the network is not cut into links.

        Raises:
            ValueError: ``tail_band`` does not divide ``band``.
        """
        if tail_band and band % tail_band:
            raise ValueError(f"tail band: {tail_band} rows do not divide the band of {band}")
        self.band, self.width, self.scale = band, width, int(graph.scale)
        trunk, *tail = split(graph)
        chain = links(trunk)
        self.workers = min(workers, _parallelism((*chain, *tail)))
        if self.workers < 2:
            chain, self.workers = (trunk,), 0
        self.segments: list[SegmentPlan] = []
        for rows, parts in ((Fraction(band), chain), ((tail_band or band) * trunk.scale, tail)):
            for part in parts:
                self.segments.append(SegmentPlan(part, int(rows), width, block))
                rows, width = rows * part.scale, int(width * part.scale)
        self.links = len(chain)
        self.skips = [self._skips(index) for index in range(len(self.segments))]

    def _skips(self, index: int) -> list[Skip]:
        outputs = [self.segments[0].graph.input, *(s.graph.output for s in self.segments)]
        result = []
        for name in self.segments[index].graph.skips:
            source = outputs.index(name) - 1
            result.append(Skip(source, sum(s.delay for s in self.segments[source + 1 : index])))
        return result

    @property
    def parts(self) -> int:
        """Parts in which the output of a band is complete."""
        last, tail = self.segments[self.links - 1], self.segments[self.links :]
        return int(last.band * last.graph.scale) // tail[0].band if tail else 1

    @property
    def delay(self) -> int:
        """Input rows below a row that must be pushed before its output is complete, rounded up."""
        rows = 0
        for segment in reversed(self.segments):
            rows = math.ceil((rows + segment.delay) / segment.graph.scale)
        return rows

    def needs(self, output: Range, low: int, high: int) -> list[Needs]:
        """Needs of every segment for some rows of the output of a picture with the input rows [low, high)."""
        return self._needs(output, low, high)[0]

    def rows_read(self, output: Range, height: int) -> Range:
        """Input rows of a picture of ``height`` rows behind some rows of its output."""
        return self._needs(output, 0, height)[1]

    def _needs(self, output: Range, low: int, high: int) -> tuple[list[Needs], Range]:
        """Needs of every segment, and the rows of the network's input."""
        read = {self.segments[-1].graph.output: output}  # a segment's output is read by the next one, or by a later one
        needs: list[Needs] = []
        for segment, scale in zip(reversed(self.segments), reversed(self._scales), strict=True):
            graph = segment.graph
            needs.append(segment.needs(read[graph.output], (int(low * scale), int(high * scale))))
            for name in graph.inputs:
                if (rows := needs[-1].ranges.get(name)) is not None:
                    read[name] = union(read.get(name), rows)
        return needs[::-1], read[self.segments[0].graph.input]

    @cached_property
    def beyond(self) -> float:
        """Input rows that a band computes above the needed ones, or below them: the mean over the multiply-adds."""
        return self._mean(
            [
                segment.band / scale / (2 * STEPS if op.rule.is_packed else 2)
                for segment, scale in zip(self.segments, self._scales, strict=True)
                for op in segment.graph.ops
            ]
        )

    @cached_property
    def context(self) -> float:
        """Input rows above a row of the output that it follows from, or below it: the mean over the multiply-adds.

        Half the receptive field, if equal layers follow one another.
        """
        rows = self.segments[0].band
        needs = self.needs((0, rows * self.scale), -_UNBOUNDED, _UNBOUNDED)
        return self._mean(
            [
                ((last - first) / (scale * segment.graph.values[op.name].rate) - rows) / 2
                for segment, scale, need in zip(self.segments, self._scales, needs, strict=True)
                for op in segment.graph.ops
                for first, last in [need.ranges[op.name]]
            ]
        )

    def _mean(self, rows: Sequence[float | Fraction]) -> float:
        """Mean over the multiply-adds of all operations; over the operations if none multiplies."""
        work = [
            op.rule.macs * (scale * segment.graph.values[op.name].rate) ** 2
            for segment, scale in zip(self.segments, self._scales, strict=True)
            for op in segment.graph.ops
        ]
        work = work if any(work) else [Fraction(1)] * len(work)
        return float(sum(a * Fraction(b) for a, b in zip(work, rows, strict=True)) / sum(work))

    @cached_property
    def _scales(self) -> list[Fraction]:
        """Rows of each segment's input for each row of the network's."""
        return list(accumulate((s.graph.scale for s in self.segments[:-1]), mul, initial=Fraction(1)))

    @property
    def in_flight(self) -> int:
        """Bands that are computed at the same time, or wait for it, at most."""
        return self.workers + 3 if self.workers else 1

    @property
    def nbytes(self) -> int:
        """Bytes that a stream takes: saved rows, arenas, outputs, temporaries, and weights in an order of their own."""
        lasting = sum(s.state_bytes + s.packed_bytes for s in self.segments)
        arenas = sum(max(a.arena_bytes + a.temporary_bytes for a in self.segments[part]) for part in self.arena_parts)
        return lasting + arenas + self._output_bytes + self._skip_bytes + self._heap_bytes

    @property
    def arena_parts(self) -> list[slice]:
        """Segments of each arena: one for all, or one for the links of each worker and one for the tail."""
        if not self.workers:
            return [slice(None)]
        return [slice(self.links)] * self.workers + [slice(self.links, None)] * (self.links < len(self.segments))

    @property
    def _heap_bytes(self) -> int:
        """Bytes of freed temporaries that the heap cannot use again, as threads allocate at the same time. Measured.

        Links of many operations, such as RRDBNet's, stay within what is counted otherwise.
        """
        operations = sum(len(segment.graph.ops) for segment in self.segments[: self.links])
        if not self.workers or operations > _FEW_OPERATIONS * self.links:
            return 0
        return min(_HOLES * self.temporary_bytes, _MOST_HOLES)

    @property
    def _output_bytes(self) -> int:
        """Bytes of segments' outputs, which are held while the next segment runs."""
        outputs = [s.nbytes(s.graph.output) for s in self.segments]
        if not self.workers:
            return sum(outputs)
        # Each band in flight has one output, and another one while a thread computes; those of the tail are complete rows.
        return (self.in_flight + self.workers) * max(outputs[: self.links]) + self.in_flight * self.parts * outputs[-1]

    @property
    def _skip_bytes(self) -> int:
        """Bytes of outputs that a later segment reads again: of whole bands, of the bands in flight, and of rows of two bands."""
        total = 0
        for segment, skips in zip(self.segments, self.skips, strict=True):
            for name, skip in zip(segment.graph.skips, skips, strict=True):
                total += (math.ceil(skip.rows / segment.band) + 2 + self.in_flight) * segment.nbytes(name)
        return total

    @property
    def temporary_bytes(self) -> int:
        """Largest number of bytes that one operation allocates. A captured graph holds as many again, of its own."""
        return max(s.temporary_bytes for s in self.segments)

    def macs(self, rows: int) -> int:
        """Multiply-adds for ``rows`` input rows, each computed once."""
        total = 0
        for segment in self.segments:
            total += sum(segment.macs(i, int(rows * segment.rate(i))) for i in range(len(segment.graph.ops)))
            rows = int(rows * segment.graph.scale)
        return total

    @cached_property
    def macs_per_pixel(self) -> int:
        """Multiply-adds for each input pixel."""
        return max(1, self.macs(self.band) // (self.band * self.width))


class _DelayLine:
    """Outputs of a segment, or the network's input, that a later segment reads again some rows later."""

    def __init__(self, skip: Skip, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        """``shape``: [band, width, C] of each output."""
        self._skip, self._band = skip, shape[0]
        self._zeros = torch.zeros(1, dtype=dtype).expand(shape)
        self._bands: dict[int, Tensor | None] = {}

    @property
    def source(self) -> int:
        return self._skip.source

    def put(self, band: int, rows: Tensor | None) -> None:
        """Keep a band's rows; None if all lie outside the picture."""
        self._bands[band] = rows

    def take(self, band: int) -> Tensor:
        """Rows beside the later segment's input of a band: zero where none were put."""
        whole, part = divmod(self._skip.rows, self._band)
        older, newer = self._bands.get(band - whole - 1), self._bands.get(band - whole)
        for old in [key for key in list(self._bands) if key < band - whole]:
            del self._bands[old]
        if part == 0 and newer is not None:
            return newer
        halves = ((older, slice(self._band - part, None)), (newer, slice(0, self._band - part)))
        return torch.cat([(self._zeros if rows is None else rows)[cut] for rows, cut in halves])

    def clear(self) -> None:
        self._bands.clear()


def _delay_lines(segment: SegmentPlan, skips: Sequence[Skip]) -> list[_DelayLine]:
    """Delay lines of a segment's skips."""
    values = [segment.graph.values[name] for name in segment.graph.skips]
    return [
        _DelayLine(skip, (segment.band, segment.width, value.channels), value.dtype)
        for skip, value in zip(skips, values, strict=True)
    ]


def _parallelism(parts: Sequence[RowGraph]) -> int:
    """Threads that a chain keeps busy: one that computes the largest part bounds the others."""
    work, scale = [], Fraction(1)
    for part in parts:
        work.append(part.macs() * scale**2)
        scale *= part.scale
    return int(sum(work) / max(work)) if max(work) else 1


class RowStream:
    """A network that processes one picture, or a part of one, band by band."""

    def __init__(self, plan: StreamPlan, device: torch.device | str = "cpu") -> None:
        """Allocate the buffers of ``plan`` on ``device``, where the network's weights are."""
        self.plan = plan
        device = torch.device(device)
        queue = device_queue(device)
        self._states = [segment.new_states(device) for segment in plan.segments]
        self._spares = Spares() if plan.workers else None
        self._arenas = [_Arena(plan, part, self._states, device, queue, self._spares) for part in plan.arena_parts]
        self._free = self._arenas[: plan.workers]
        self._lines = [_delay_lines(*pair) for pair in zip(plan.segments, plan.skips, strict=True)]
        self._fronts: dict[int, tuple[Tensor | None, Rows]] = {}  # band -> output of the last segment that computed it
        self._complete: dict[int, list[tuple[int, Tensor]]] = {}  # band -> complete rows of the output
        # A strong reference would keep the buffers alive until the next garbage collection.
        stream = weakref.proxy(self)
        self._wavefront = (
            Wavefront(plan.links + 1, lambda link, band: stream._run_link(link, band), plan.workers)
            if plan.workers
            else None
        )
        self.start(0, 0)

    def start(self, low: int, high: int, output: Range | None = None) -> None:
        """Start a picture with rows [low, high); the first push brings the rows [low, low + band).

        Args:
            low: first row.
            high: end of the rows.
            output: output rows that are needed, all by default. Others may be zero, or missing.
        """
        if self._wavefront is not None:
            self._wavefront.restart()
        for state in self._states:
            for buffer in state:
                for rows in buffer:
                    rows.zero_()
        for lines in self._lines:
            for line in lines:
                line.clear()
        self._fronts.clear()
        self._complete.clear()
        self._next, self._low, self._high = low, low, high
        scale = self.plan.scale
        first, last = output or (low * scale, high * scale)
        self._last = min(high, -(-last // scale)) + self.plan.delay
        needs = self.plan.needs((first, last), low, high)
        for arena in self._arenas:
            arena.start(needs)

    @torch.inference_mode()
    def push(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Push the next band and yield output rows that are complete, from top to bottom.

        With workers, those of some bands pushed before may be still to come. With the band behind which no row is left to
        compute, all are complete.

        Args:
            x: [1, C, band, width]; zero below the picture. It must stay unchanged until its rows are complete.

        Yields:
            (first row, [rows, width * scale, C]): rows of the picture only, overwritten when the next item is requested.
        """
        rows = Rows(self._next, self.plan.band, self._low, self._high)
        band = (rows.top - rows.low) // self.plan.band
        self._next += self.plan.band
        self._fronts[band] = x[0].permute(1, 2, 0), rows
        self._put(-1, band, self._fronts[band][0])
        if self._wavefront is None:
            for link in range(self.plan.links):
                self._advance(link, band, self._arenas[0])
            yield from self._tail(band, self._arenas[0])
            return
        self._wavefront.submit()
        is_last = self._next >= self._last
        waiting = self._wavefront.submitted - self.plan.in_flight + 1  # the next band follows at once
        self._wavefront.wait(self._wavefront.submitted if is_last else waiting)
        for done in sorted(self._complete):
            yield from self._complete.pop(done)

    def _run_link(self, link: int, band: int) -> None:
        """Compute a link for a band in a free arena; the link behind the last one is the tail."""
        raise_mmap_threshold()
        with torch.inference_mode():
            if link == self.plan.links:
                self._complete[band] = list(self._tail(band, self._arenas[-1]))
                return
            arena = self._free.pop()
            try:
                self._advance(link, band, arena)
            finally:
                self._free.append(arena)

    def _advance(self, link: int, band: int, arena: _Arena) -> None:
        """Compute a link for a band."""
        x, rows = self._fronts.pop(band)
        segment = self.plan.segments[link]
        y, output_rows = None, segment.new_rows(segment.graph.output, rows)
        # Above the picture all values are still zero; below it no link reads what this one would compute.
        if rows.top + rows.count > rows.low and output_rows.top < output_rows.high:
            inputs = None if x is None else [x, *(line.take(band) for line in self._lines[link])]
            y, output_rows = arena.stream(link).push(inputs, rows)
        self._give(link - 1, x)
        self._put(link, band, y)
        self._fronts[band] = y, output_rows

    def _give(self, link: int, output: Tensor | None) -> None:
        """Let the output of a link be overwritten, unless a segment after the next one reads it."""
        if self._spares is None or output is None or link < 0:
            return
        if not any(line.source == link for lines in self._lines for line in lines):
            self._spares.give(output)

    def _put(self, source: int, band: int, rows: Tensor | None) -> None:
        """Keep the output of a segment, or the network's input (-1), for the segments that read it later."""
        for lines in self._lines:
            for line in lines:
                if line.source == source:
                    line.put(band, rows)

    def _tail(self, band: int, arena: _Arena) -> Iterator[tuple[int, Tensor]]:
        """Compute the tail for a band, part by part, and yield the output's rows in the picture."""
        x, rows = self._fronts.pop(band)
        if self.plan.links == len(self.plan.segments):
            yield from _inside(x, rows)
            return
        step = self.plan.segments[-1].band
        for offset in range(0, rows.count, step):
            part = Rows(rows.top + offset, step, rows.low, rows.high)
            if part.top + step > rows.low:
                inputs = None if x is None else [x[offset : offset + step]]
                yield from _inside(*arena.stream(self.plan.links).push(inputs, part))
        self._give(self.plan.links - 1, x)

    @property
    def macs(self) -> int:
        """Multiply-adds executed since the stream was created."""
        return sum(arena.macs for arena in self._arenas)


class _Arena:
    """Streams of some segments, which share the memory for what they hold within a band."""

    def __init__(
        self,
        plan: StreamPlan,
        part: slice,
        states: Sequence[list[list[Tensor]]],
        device: torch.device,
        queue: DeviceQueue,
        spares: Spares | None,
    ) -> None:
        memory = torch.empty(max(s.arena_bytes for s in plan.segments[part]), dtype=torch.uint8, device=device)
        self._streams = {
            index: SegmentStream(plan.segments[index], states[index], memory, queue, spares)
            for index in range(len(plan.segments))[part]
        }

    def start(self, needs: Sequence[Needs]) -> None:
        """Start a picture, of which these rows of every segment are needed."""
        for index, stream in self._streams.items():
            stream.start(needs[index])

    def stream(self, index: int) -> SegmentStream:
        """The stream of a segment."""
        return self._streams[index]

    @property
    def macs(self) -> int:
        """Multiply-adds executed so far."""
        return sum(stream.macs for stream in self._streams.values())


def _inside(x: Tensor | None, rows: Rows) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of an output's rows in the picture, if there are any."""
    if x is not None:
        first, last = max(rows.top, rows.low), min(rows.top + rows.count, rows.high)
        yield first, x[first - rows.top : last - rows.top]
