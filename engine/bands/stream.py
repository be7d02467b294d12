"""Row streams: push a picture's rows from top to bottom, get the output's rows as soon as they are complete.

All bands have one shape. At the borders, rows outside the picture are zero, which equals a convolution's zero padding; an
operation whose rows all lie outside is skipped.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import torch
from torch import Tensor

from engine.bands.buffers import EXACT, ROOMY, Buffer, BufferPlan, Slot, pack
from engine.bands.graph import Op, RowGraph, schedule, split
from engine.bands.rules import Layout, Rows
from engine.device.queue import WARM_UPS, DeviceQueue, device_queue

_INPUT = -1
"""Position of a segment's input in the order of its operations."""


@dataclass(frozen=True, slots=True)
class ColumnBlock:
    """Columns that an operation computes at a time, all in its output's columns."""

    first: int
    """First column that it computes."""
    last: int
    """End of the columns that it computes."""
    read_first: int
    """First column that it reads."""
    read_last: int
    """End of the columns that it reads."""


@dataclass(frozen=True, slots=True)
class _BufferRead:
    """An operation that reads the first values of a buffer."""

    position: int
    """Position of the operation."""
    values: int
    """Number of values that it reads."""


class SegmentPlan:
    """Buffers and column blocks of a segment, a part of a network between two cuts. Holds no tensors."""

    def __init__(self, graph: RowGraph, band: int, width: int, block: int | None) -> None:
        """Plan bands of ``band`` x ``width`` input pixels, computed ``block`` columns at a time (None: all)."""
        self.graph, self.band, self.width, self.block = graph, band, width, block
        self.schedule = schedule(graph)
        self._position = {graph.input: _INPUT, **{op.name: i for i, op in enumerate(graph.ops)}}
        groups = self._concatenation_reads()
        self._add_single_value_reads(groups)
        self.buffers = [self._buffer(values, reads) for values, reads in groups.items()]
        self.offsets, self.arena_bytes = pack([b for b in self.buffers if not b.slides])

    @property
    def delay(self) -> int:
        """Rows that the output lags behind the input, in output rows."""
        return self.schedule.delay[self.graph.output]

    @property
    def state_bytes(self) -> int:
        """Bytes held from band to band."""
        return sum(b.saved_bytes for b in self.buffers)

    def nbytes(self, name: str) -> int:
        """Bytes that a band adds to a value."""
        value = self.graph.values[name]
        return int(self.band * value.rate) * int(self.width * value.rate) * value.channels * value.dtype.itemsize

    def rate(self, position: int) -> Fraction:
        """Output rows of an operation per input row of the segment."""
        return self.graph.values[self.graph.ops[position].name].rate

    def macs(self, position: int, rows: int) -> int:
        """Multiply-adds that an operation takes for ``rows`` rows of its output."""
        return self.graph.ops[position].rule.macs * rows * int(self.width * self.rate(position))

    def members(self, name: str) -> tuple[str, ...]:
        """Values of a concatenation, nested ones resolved; a value is its own only member."""
        parts = self.graph.concatenations.get(name)
        return (name,) if parts is None else tuple(v for part in parts for v in self.members(part))

    @cached_property
    def _readers(self) -> dict[str, list[int]]:
        """Name of a value or concatenation -> positions of the operations that read it."""
        readers: dict[str, list[int]] = {}
        for position, op in enumerate(self.graph.ops):
            for name in dict.fromkeys(op.inputs):
                readers.setdefault(name, []).append(position)
        return readers

    def _concatenation_reads(self) -> dict[tuple[str, ...], list[_BufferRead]]:
        """Values of each buffer for concatenations -> its readers.

        A concatenation that begins another, longer one shares its buffer.
        """
        groups: dict[tuple[str, ...], list[_BufferRead]] = {}
        names = [n for n in self.graph.concatenations if n in self._readers]
        for name in sorted(names, key=lambda n: -len(self.members(n))):
            members = self.members(name)
            group = next((g for g in groups if g[: len(members)] == members), members)
            groups.setdefault(group, []).extend(_BufferRead(p, len(members)) for p in self._readers[name])
        return groups

    def _add_single_value_reads(self, groups: dict[tuple[str, ...], list[_BufferRead]]) -> None:
        """Add a buffer for each single value, unless all its readers take the value from one that begins with it."""
        for name, positions in self._readers.items():
            if name in self.graph.concatenations:
                continue
            group: tuple[str, ...] = (name,)
            if all(self.graph.ops[position].rule.reads_views for position in positions):
                group = next((g for g in groups if g[0] == name), group)
            groups.setdefault(group, []).extend(_BufferRead(position, 1) for position in positions)

    def _oldest_row(self, read: _BufferRead) -> int:
        """Delay of the first row that an operation reads."""
        op = self.graph.ops[read.position]
        return self.schedule.read[op.name] + op.rule.reach

    def _buffer(self, members: Sequence[str], reads: Sequence[_BufferRead]) -> BufferPlan:
        values, delays = [self.graph.values[m] for m in members], [self.schedule.delay[m] for m in members]
        oldest = max(map(self._oldest_row, reads))
        slots, channel = [], 0
        for index, (member, value, delay) in enumerate(zip(members, values, delays, strict=True)):
            oldest_of_value = max(self._oldest_row(r) for r in reads if r.values > index)
            slots.append(Slot(member, channel, value.channels, oldest - delay, oldest_of_value - delay))
            channel += value.channels
        advance = int(self.band * values[0].rate)
        by_kernel = all(self.graph.ops[read.position].rule.reads_views for read in reads)
        return BufferPlan(
            slots=tuple(slots),
            rows=advance + oldest - min(delays),
            width=int(self.width * values[0].rate),
            channels=channel,
            dtype=values[0].dtype,
            advance=advance,
            oldest=oldest,
            first=min(self._position[m] for m in members),
            last=max(r.position for r in reads),
            slack=ROOMY if by_kernel else EXACT,
        )

    def column_blocks(self, op: Op) -> list[ColumnBlock]:
        """Column blocks of an operation.

        All blocks read the same number of columns, so libraries that prepare for a shape do it once. A block at a side of
        the picture reads more columns inwards and none beyond the side, where the operation pads.
        """
        value, reach = self.graph.values[op.name], op.rule.column_reach
        width, step = int(self.width * value.rate), max(1, int(op.rule.factor))
        if reach is None or self.block is None or width <= self.block:
            return [ColumnBlock(0, width, 0, width)]
        size = -(-width // -(-width // self.block) // step) * step
        read_size = min(width, size + 2 * reach)
        blocks = []
        for first in range(0, width, size):
            last = min(first + size, width)
            read_first = max(0, min(first - reach, width - read_size)) if reach else first
            blocks.append(ColumnBlock(first, last, read_first, read_first + read_size if reach else last))
        return blocks

    @property
    def temporary_bytes(self) -> int:
        """Largest number of bytes that one operation allocates while it runs."""
        return max(self._temporary_bytes(op) for op in self.graph.ops)

    def _temporary_bytes(self, op: Op) -> int:
        """Bytes of an operation's output and workspace, and of the dense copy that a convolution makes of its input."""
        value, columns = self.graph.values[op.name], max(c.read_last - c.read_first for c in self.column_blocks(op))
        rows = int(self.band * value.rate)
        output = value.channels * value.dtype.itemsize if op.rule.compute is not None else 0
        total = rows * columns * (output + op.rule.workspace)
        if op.rule.column_reach is not None and op.rule.macs:
            for name in op.inputs:
                source = self.graph.values[name]
                total += (rows + 2 * op.rule.reach) * columns * source.channels * source.dtype.itemsize
        return total


@dataclass(frozen=True, slots=True)
class _BlockViews:
    """A column block with views of the inputs' rows and columns that it reads."""

    columns: ColumnBlock
    inputs: list[Tensor]


class _SegmentStream:
    """A segment of a network at work.

    Views, buffers and output are allocated once, so a band allocates only the operations' temporaries. Bands away from
    the picture's borders launch the same work, so the queue captures it after a few of them.
    """

    def __init__(self, plan: SegmentPlan, arena: Tensor, queue: DeviceQueue) -> None:
        self.plan = plan
        self._graph = plan.graph
        self._queue = queue
        self._warm_ups = 0
        self._replay: Callable[[], None] | None = None
        value = plan.graph.values[plan.graph.output]
        shape = (int(plan.band * value.rate), int(plan.width * value.rate), value.channels)
        self._output = torch.empty(shape, dtype=value.dtype, device=arena.device)
        self._buffers = _allocate(plan, arena)
        self._destinations: dict[str, list[Tensor]] = {}
        self._lasting_destinations: dict[str, list[Tensor]] = {}  # read in a later band, too
        self._first_used: dict[int, list[Buffer]] = {}  # position -> buffers first or last used there
        self._last_used: dict[int, list[Buffer]] = {}
        for buffer in self._buffers:
            self._first_used.setdefault(buffer.plan.first, []).append(buffer)
            self._last_used.setdefault(buffer.plan.last, []).append(buffer)
            for slot in buffer.plan.slots:
                self._destinations.setdefault(slot.value, []).append(buffer.new_rows(slot))
                if buffer.plan.rows > buffer.plan.advance:
                    self._lasting_destinations.setdefault(slot.value, []).append(buffer.new_rows(slot))
        self._destinations.setdefault(plan.graph.output, []).insert(0, self._output)
        self._blocks = [self._block_views(op) for op in plan.graph.ops]
        self.macs = 0
        """Multiply-adds executed so far."""
        self._inner_macs = sum(plan.macs(i, int(plan.band * plan.rate(i))) for i in range(len(plan.graph.ops)))

    def _block_views(self, op: Op) -> list[_BlockViews]:
        sources = [_view(self._source(op, name), layout) for name, layout in zip(op.inputs, op.layouts, strict=True)]
        blocks = []
        for columns in self.plan.column_blocks(op):
            first, last = (int(n / op.rule.factor) for n in (columns.read_first, columns.read_last))
            pairs = zip(sources, op.layouts, strict=True)
            blocks.append(_BlockViews(columns, [s.narrow(layout.columns, first, last - first) for s, layout in pairs]))
        return blocks

    def _source(self, op: Op, name: str) -> Tensor:
        """Rows of a buffer that an operation reads as its input ``name``."""
        members = self.plan.members(name)
        single = name not in self._graph.concatenations
        buffers = [b for b in self._buffers if b.plan.starts_with(members)]
        buffer = next((b for b in buffers if single and len(b.plan.slots) == 1), buffers[0])
        channels = sum(self._graph.values[m].channels for m in members)
        return buffer.window(self.plan.schedule.read[op.name], op.rule.reach, channels)

    def clear(self) -> None:
        """Set all rows held from band to band to zero."""
        for buffer in self._buffers:
            buffer.clear()

    def push(self, x: Tensor | None, rows: Rows) -> tuple[Tensor | None, Rows]:
        """Add rows to the input.

        Args:
            x: [band, width, C]; None if all rows lie outside the picture.
            rows: position of these rows.

        Returns:
            The output's new rows, which the next push overwrites, or None if all lie outside; and their position.
        """
        self._begin_buffers(_INPUT, rows)
        if x is None:
            self._zero_rows(self._graph.input)
        else:
            for destination in self._destinations[self._graph.input]:
                destination.copy_(x)
        if self._is_inner(rows):
            self._run_inner(rows)
            self.macs += self._inner_macs
        else:
            self._run(rows)
            for position, op in enumerate(self._graph.ops):
                new_rows = self._new_rows(op.name, rows)
                self.macs += 0 if new_rows.outside else self.plan.macs(position, new_rows.count)
        output_rows = self._new_rows(self._graph.output, rows)
        return None if output_rows.outside else self._output, output_rows

    @cached_property
    def _margins(self) -> tuple[Fraction, Fraction]:
        """Input rows above and below a band within which its operations read and compute."""
        above, below = Fraction(0), Fraction(0)
        for op in self._graph.ops:
            rate, delay = self._graph.values[op.name].rate, self.plan.schedule.delay[op.name]
            reach = op.rule.reach * op.rule.factor
            above, below = max(above, (delay + reach) / rate), max(below, (reach - delay) / rate)
        return above, below

    def _is_inner(self, rows: Rows) -> bool:
        """Whether every row that the band reads or computes lies in the picture."""
        above, below = self._margins
        return rows.top - above >= rows.low and rows.top + rows.count + below <= rows.high

    def _run_inner(self, rows: Rows) -> None:
        """Run the operations of an inner band: directly at first, then by replaying the captured launches."""
        if self._replay is None and self._warm_ups == WARM_UPS:
            # A strong reference would keep the segment's buffers alive until the next garbage collection.
            segment = weakref.proxy(self)
            self._replay = self._queue.capture(lambda: segment._run(rows))
        if self._replay is None:
            self._warm_ups += 1
            self._run(rows)
        else:
            self._replay()

    def _run(self, rows: Rows) -> None:
        """Run every operation of a band in order."""
        for position, op in enumerate(self._graph.ops):
            self._begin_buffers(position, rows)
            new_rows = self._new_rows(op.name, rows)
            if new_rows.outside:
                self._zero_rows(op.name)
            else:
                self._run_op(position, op, new_rows)
            self._end_buffers(position, rows)

    def _new_rows(self, name: str, rows: Rows) -> Rows:
        """New rows of a value, given the new rows of the input."""
        scaled = rows.scale(self._graph.values[name].rate)
        return Rows(scaled.top - self.plan.schedule.delay[name], scaled.count, scaled.low, scaled.high)

    def _begin_buffers(self, position: int, rows: Rows) -> None:
        for buffer in self._first_used.get(position, ()):
            if buffer.plan.overlaps_picture(rows):
                buffer.begin_band()

    def _end_buffers(self, position: int, rows: Rows) -> None:
        for buffer in self._last_used.get(position, ()):
            if buffer.plan.overlaps_picture(rows):
                buffer.end_band()

    def _run_op(self, position: int, op: Op, new_rows: Rows) -> None:
        """Compute an operation's new rows at their first destination and copy them to the others."""
        layout, destinations = self._graph.values[op.name].layout, self._destinations[op.name]
        output = _view(destinations[0], layout)
        for block in self._blocks[position]:
            columns, views = block.columns, block.inputs
            count = columns.last - columns.first
            if op.rule.compute is not None:
                y = op.rule.compute(views, new_rows)
                views = [y.narrow(layout.columns, columns.first - columns.read_first, count)]
            op.rule.store(views, output.narrow(layout.columns, columns.first, count))
        _zero_outside(destinations[0], new_rows)
        for destination in destinations[1:]:
            destination.copy_(destinations[0])

    def _zero_rows(self, name: str) -> None:
        """Zero a value's new rows, which all lie outside the picture.

        Needed only where a later band reads them: this band's readers lie outside as well.
        """
        for destination in self._lasting_destinations.get(name, ()):
            destination.zero_()


def _zero_outside(y: Tensor, rows: Rows) -> None:
    """Zero the rows of ``y`` [rows, width, C] that lie outside the picture."""
    if not rows.inside:
        y[: max(0, rows.low - rows.top)] = 0
        y[max(0, rows.high - rows.top) :] = 0


def _allocate(plan: SegmentPlan, arena: Tensor) -> list[Buffer]:
    offsets = iter(plan.offsets)
    return [
        Buffer(b, torch.empty(b.nbytes, dtype=torch.uint8, device=arena.device) if b.slides else arena[next(offsets) :])
        for b in plan.buffers
    ]


def _view(rows: Tensor, layout: Layout) -> Tensor:
    """Rows [H, W, C] in a layout: [1, C, H, W] or [1, H, W, C]."""
    return rows.permute(2, 0, 1)[None] if layout is Layout.NCHW else rows[None]


class StreamPlan:
    """Bands and memory of a network that streams a picture of a given width. Holds no tensors."""

    def __init__(
        self, graph: RowGraph, band: int, width: int, tail_band: int | None = None, block: int | None = None
    ) -> None:
        """Cut the network into segments and plan their buffers.

        Args:
            graph: the network.
            band: input rows per push, a multiple of the network's ``align``.
            width: input columns.
            tail_band: input rows whose output the tail (from the first enlargement on) computes at a time, since its
                rows are the largest; a divisor of ``band``. None: ``band``.
            block: columns that an operation computes at a time, so that its output fits the processor's cache. None: all.

        Raises:
            ValueError: ``tail_band`` does not divide ``band``.
        """
        if tail_band and band % tail_band:
            raise ValueError(f"tail band: {tail_band} rows do not divide the band of {band}")
        self.band, self.width, self.scale = band, width, int(graph.scale)
        self.segments: list[SegmentPlan] = []
        for part in split(graph):
            segment = SegmentPlan(part, band, width, block)
            self.segments.append(segment)
            width = int(width * part.scale)
            band = int((tail_band or band) * part.scale)

    @property
    def parts(self) -> int:
        """Parts in which the output of a band is complete."""
        head, *tail = self.segments
        return int(self.band * head.graph.scale) // tail[0].band if tail else 1

    @property
    def delay(self) -> int:
        """Input rows below a row that must be pushed before its output is complete, rounded up."""
        rows = 0
        for segment in reversed(self.segments):
            rows = math.ceil((rows + segment.delay) / segment.graph.scale)
        return rows

    @property
    def nbytes(self) -> int:
        """Bytes that a stream takes, without the weights: saved rows, arena, outputs and temporaries."""
        states = sum(s.state_bytes for s in self.segments)
        outputs = sum(s.nbytes(s.graph.output) for s in self.segments)  # held while the next segment runs
        return states + outputs + max(s.arena_bytes for s in self.segments) + self.temporary_bytes

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


class RowStream:
    """A network that processes one picture, or a part of one, band by band."""

    def __init__(self, plan: StreamPlan, device: torch.device | str = "cpu") -> None:
        """Allocate the buffers of ``plan`` on ``device``, where the network's weights are."""
        self.plan = plan
        queue = device_queue(torch.device(device))
        arena = torch.empty(max(s.arena_bytes for s in plan.segments), dtype=torch.uint8, device=device)
        self._segments = [_SegmentStream(s, arena, queue) for s in plan.segments]
        self.start(0, 0)

    def start(self, low: int, high: int) -> None:
        """Start a picture with rows [low, high); the first push brings the rows [low, low + band)."""
        for segment in self._segments:
            segment.clear()
        self._next, self._low, self._high = low, low, high

    @torch.inference_mode()
    def push(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Push the next band and yield the output rows that are now complete, from top to bottom.

        Args:
            x: [1, C, band, width]; zero below the picture.

        Yields:
            (first row, [rows, width * scale, C]): rows of the picture only, overwritten when the next item is requested.
        """
        rows = Rows(self._next, self.plan.band, self._low, self._high)
        self._next += self.plan.band
        yield from self._run(0, x[0].permute(1, 2, 0), rows)

    def _run(self, index: int, x: Tensor | None, rows: Rows) -> Iterator[tuple[int, Tensor]]:
        """Push rows through the segments from ``index`` on."""
        if index == len(self._segments):
            if x is not None:
                first, last = max(rows.top, rows.low), min(rows.top + rows.count, rows.high)
                yield first, x[first - rows.top : last - rows.top]
            return
        segment = self._segments[index]
        band = segment.plan.band
        for offset in range(0, rows.count, band):
            part = Rows(rows.top + offset, band, rows.low, rows.high)
            if part.top + band > rows.low:  # all values are still zero above the picture
                y, output_rows = segment.push(x[offset : offset + band] if x is not None else None, part)
                yield from self._run(index + 1, y, output_rows)

    @property
    def macs(self) -> int:
        """Multiply-adds executed since the stream was created."""
        return sum(s.macs for s in self._segments)
