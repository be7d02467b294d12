"""Runs a network band by band: push the picture's rows from the top, take the output's rows as they become complete.

Every band has one shape, at the borders too: rows outside the picture are zero, which is what a convolution's padding
is, and an operation whose rows all lie outside is skipped.
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

from engine.bands.buffers import Buffer, BufferPlan, Slot, share
from engine.bands.graph import PLANES, Op, RowGraph, Rows, schedule, split
from engine.device.queue import WARM_UPS, DeviceQueue, device_queue

_INPUT = -1
"""The position of a segment's input in the order of its operations."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Columns [first, last) of a value, made from [start, end) of its inputs, both in the value's own columns."""

    first: int
    last: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class _Read:
    """That the operation at ``position`` reads the first ``members`` values of a buffer."""

    position: int
    members: int


class SegmentPlan:
    """The buffers of a part of a network for bands of ``band`` rows and ``width`` columns. Holds no tensors.

    ``block``: an operation makes at most so many columns at a time, where it can; None: all at once.
    """

    def __init__(self, graph: RowGraph, band: int, width: int, block: int | None) -> None:
        self.graph, self.band, self.width, self.block = graph, band, width, block
        self.schedule = schedule(graph)
        self._position = {graph.input: _INPUT, **{op.name: i for i, op in enumerate(graph.ops)}}
        self.groups = self._concatenated()
        self.groups.update({(value,): reads for value, reads in self._alone()})
        self.buffers = [self._buffer(members, reads) for members, reads in self.groups.items()]
        self.offsets, self.arena_bytes = share([b for b in self.buffers if not b.slides])

    @property
    def delay(self) -> int:
        return self.schedule.delay[self.graph.output]

    @property
    def state_bytes(self) -> int:
        """Memory held from band to band."""
        return sum(b.saved_bytes for b in self.buffers)

    def nbytes(self, name: str) -> int:
        """A value's new rows of one band."""
        value = self.graph.values[name]
        return int(self.band * value.rate) * int(self.width * value.rate) * value.channels * value.dtype.itemsize

    def rate(self, position: int) -> Fraction:
        return self.graph.values[self.graph.ops[position].name].rate

    def macs(self, position: int, rows: int) -> int:
        """Multiply-adds of so many rows of an operation's output."""
        return self.graph.ops[position].rule.macs * rows * int(self.width * self.rate(position))

    def members(self, name: str) -> tuple[str, ...]:
        """The values that lie side by side under this name: of a concatenation its parts, else itself."""
        parts = self.graph.concatenations.get(name)
        return (name,) if parts is None else tuple(v for part in parts for v in self.members(part))

    @cached_property
    def _direct(self) -> dict[str, list[int]]:
        """The positions of the operations that read a name."""
        found: dict[str, list[int]] = {}
        for position, op in enumerate(self.graph.ops):
            for name in dict.fromkeys(op.inputs):
                found.setdefault(name, []).append(position)
        return found

    def _concatenated(self) -> dict[tuple[str, ...], list[_Read]]:
        """The longest concatenations with their readers; every other one must be the beginning of one of them."""
        groups: dict[tuple[str, ...], list[_Read]] = {}
        names = [n for n in self.graph.concatenations if n in self._direct]
        for name in sorted(names, key=lambda n: -len(self.members(n))):
            members = self.members(name)
            group = next((g for g in groups if g[: len(members)] == members), members)
            groups.setdefault(group, []).extend(_Read(p, len(members)) for p in self._direct[name])
        return groups

    def _alone(self) -> Iterator[tuple[str, list[_Read]]]:
        """Values that an operation reads by themselves."""
        for name, positions in self._direct.items():
            if name not in self.graph.concatenations:
                yield name, [_Read(p, 1) for p in positions]

    def _reach_back(self, read: _Read) -> int:
        op = self.graph.ops[read.position]
        return self.schedule.read[op.name] + op.rule.reach

    def _buffer(self, members: Sequence[str], reads: Sequence[_Read]) -> BufferPlan:
        values, delays = [self.graph.values[m] for m in members], [self.schedule.delay[m] for m in members]
        oldest = max(map(self._reach_back, reads))
        slots, channel = [], 0
        for index, (member, value, delay) in enumerate(zip(members, values, delays, strict=True)):
            need = max(self._reach_back(r) for r in reads if r.members > index)
            slots.append(Slot(member, channel, value.channels, oldest - delay, need - delay))
            channel += value.channels
        advance = int(self.band * values[0].rate)
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
        )

    def columns(self, op: Op) -> list[Columns]:
        """What the operation makes at a time: equal parts that read equally much, so that a library which prepares itself
        for a shape does it once.

        A part that touches the picture's side reads further inwards instead: the side stays the operation's own border.
        """
        value, across = self.graph.values[op.name], op.rule.across
        width, step = int(self.width * value.rate), max(1, int(op.rule.factor))
        if across is None or self.block is None or width <= self.block:
            return [Columns(0, width, 0, width)]
        part = -(-width // -(-width // self.block) // step) * step
        read = min(width, part + 2 * across)
        found = []
        for first in range(0, width, part):
            last = min(first + part, width)
            start = max(0, min(first - across, width - read)) if across else first
            found.append(Columns(first, last, start, start + read if across else last))
        return found

    @property
    def temporary_bytes(self) -> int:
        """The most that an operation takes while it runs: what it makes before that goes to its place, and the dense
        copy of its input that a convolution makes.
        """
        return max(self._temporary(op) for op in self.graph.ops)

    def _temporary(self, op: Op) -> int:
        value, columns = self.graph.values[op.name], max(c.end - c.start for c in self.columns(op))
        rows = int(self.band * value.rate)
        made = value.channels * value.dtype.itemsize if op.rule.run is not None else 0
        total = rows * columns * (made + op.rule.workspace)
        if op.rule.across is not None and op.rule.macs:
            for name in op.inputs:
                read = self.graph.values[name]
                total += (rows + 2 * op.rule.reach) * columns * read.channels * read.dtype.itemsize
        return total


@dataclass(frozen=True, slots=True)
class _Part:
    """Some columns of an operation: its inputs there, and which columns of what it makes are wanted."""

    columns: Columns
    views: list[Tensor]


class _Segment:
    """A part of a network at work. All of its views and its output are made once; nothing is allocated in a band but what
    operations make on the way.

    Away from the picture's ends every band is the same work, so after a few of them the queue records it.
    """

    def __init__(self, plan: SegmentPlan, arena: Tensor, queue: DeviceQueue) -> None:
        self.plan = plan
        self._graph = plan.graph
        self._queue = queue
        self._alike = 0
        self._replay: Callable[[], None] | None = None
        last = plan.graph.values[plan.graph.output]
        shape = (int(plan.band * last.rate), int(plan.width * last.rate), last.channels)
        self._output = torch.empty(shape, dtype=last.dtype, device=arena.device)
        self._buffers = _make(plan, arena)
        self._targets: dict[str, list[Tensor]] = {}
        self._lasting: dict[str, list[Tensor]] = {}  # those that are read in a later band, too
        self._begins: dict[int, list[Buffer]] = {}
        self._ends: dict[int, list[Buffer]] = {}
        for buffer in self._buffers:
            self._begins.setdefault(buffer.plan.first, []).append(buffer)
            self._ends.setdefault(buffer.plan.last, []).append(buffer)
            for slot in buffer.plan.slots:
                self._targets.setdefault(slot.value, []).append(buffer.new_rows(slot))
                if buffer.plan.rows > buffer.plan.advance:
                    self._lasting.setdefault(slot.value, []).append(buffer.new_rows(slot))
        self._targets.setdefault(plan.graph.output, []).insert(0, self._output)
        self._parts = [self._cut(op) for op in plan.graph.ops]
        self._executed = [0] * len(plan.graph.ops)  # rows that each operation has made at the picture's ends
        self._inner_bands = 0

    def _cut(self, op: Op) -> list[_Part]:
        """The operation's work of a band, some columns at a time."""
        sources = [_view(self._source(op, name), axis) for name, axis in zip(op.inputs, op.axes, strict=True)]
        parts = []
        for columns in self.plan.columns(op):
            start, end = (int(n / op.rule.factor) for n in (columns.start, columns.end))
            views = [s.narrow(axis + 1, start, end - start) for s, axis in zip(sources, op.axes, strict=True)]
            parts.append(_Part(columns, views))
        return parts

    def _source(self, op: Op, name: str) -> Tensor:
        """The window of a buffer that the operation reads."""
        members = self.plan.members(name)
        alone = name not in self._graph.concatenations
        buffer = next(b for b in self._buffers if b.plan.starts_with(members) and (not alone or len(b.plan.slots) == 1))
        channels = sum(self._graph.values[m].channels for m in members)
        return buffer.window(self.plan.schedule.read[op.name], op.rule.reach, channels)

    def clear(self) -> None:
        for buffer in self._buffers:
            buffer.clear()

    def push(self, x: Tensor | None, rows: Rows) -> tuple[Tensor | None, Rows]:
        """``x``: [band, width, C] for these rows of the input -> the output's new rows, which are the next push's to
        overwrite; None where all lie outside.
        """
        self._begin(_INPUT, rows)
        if x is None:
            self._give_nothing(self._graph.input)
        else:
            for target in self._targets[self._graph.input]:
                target.copy_(x)
        if self._is_inner(rows):
            self._repeat(rows)
            self._inner_bands += 1
        else:
            self._make(rows)
            for position, op in enumerate(self._graph.ops):
                made = self._rows(op.name, rows)
                self._executed[position] += 0 if made.outside else made.count
        made = self._rows(self._graph.output, rows)
        return None if made.outside else self._output, made

    @property
    def macs(self) -> int:
        """Multiply-adds executed so far."""
        inner = self._inner_bands * self.plan.band
        return sum(self.plan.macs(i, rows + int(inner * self.plan.rate(i))) for i, rows in enumerate(self._executed))

    @cached_property
    def _margins(self) -> tuple[Fraction, Fraction]:
        """How many rows of the input above and below its new ones an operation's new rows, and what they are made of, lie."""
        above, below = Fraction(0), Fraction(0)
        for op in self._graph.ops:
            rate, delay = self._graph.values[op.name].rate, self.plan.schedule.delay[op.name]
            reach = op.rule.reach * op.rule.factor
            above, below = max(above, (delay + reach) / rate), max(below, (reach - delay) / rate)
        return above, below

    def _is_inner(self, rows: Rows) -> bool:
        """Whether nothing is made, or made of, rows outside the picture: all such bands are the same work."""
        above, below = self._margins
        return rows.top - above >= rows.low and rows.top + rows.count + below <= rows.high

    def _repeat(self, rows: Rows) -> None:
        if self._replay is None and self._alike == WARM_UPS:
            # A record that held the segment would keep its buffers until the next collection of garbage.
            segment = weakref.proxy(self)
            self._replay = self._queue.capture(lambda: segment._make(rows))
        if self._replay is None:
            self._alike += 1
            self._make(rows)
        else:
            self._replay()

    def _make(self, rows: Rows) -> None:
        """Every operation's new rows, in order."""
        for position, op in enumerate(self._graph.ops):
            self._begin(position, rows)
            made = self._rows(op.name, rows)
            if made.outside:
                self._give_nothing(op.name)
            else:
                self._run(position, op, made)
            self._end(position, rows)

    def _rows(self, name: str, rows: Rows) -> Rows:
        """The rows of a value that are new when these rows of the input are."""
        scaled = rows.scale(self._graph.values[name].rate)
        return Rows(scaled.top - self.plan.schedule.delay[name], scaled.count, scaled.low, scaled.high)

    def _begin(self, position: int, rows: Rows) -> None:
        for buffer in self._begins.get(position, ()):
            if buffer.plan.meets(rows):
                buffer.begin()

    def _end(self, position: int, rows: Rows) -> None:
        for buffer in self._ends.get(position, ()):
            if buffer.plan.meets(rows):
                buffer.finish()

    def _run(self, position: int, op: Op, made: Rows) -> None:
        """Make the new rows of a value, [rows, width, C], where they belong."""
        value, targets = self._graph.values[op.name], self._targets[op.name]
        out = _view(targets[0], value.axis)
        for part in self._parts[position]:
            at = part.columns
            place = out.narrow(value.axis + 1, at.first, at.last - at.first)
            views = part.views
            if op.rule.run is not None:
                y = op.rule.run(views, made)
                views = [y.narrow(value.axis + 1, at.first - at.start, at.last - at.first)]
            op.rule.into(views, place)
        _blank(targets[0], made)
        for target in targets[1:]:
            target.copy_(targets[0])

    def _give_nothing(self, name: str) -> None:
        """Rows outside the picture: zeros, unless whoever reads them reads none inside."""
        for target in self._lasting.get(name, ()):
            target.zero_()


def _blank(y: Tensor, made: Rows) -> None:
    """Zeros in the rows of ``y`` [rows, width, C] that lie outside the picture."""
    if not made.inside:
        y[: max(0, made.low - made.top)] = 0
        y[max(0, made.high - made.top) :] = 0


def _make(plan: SegmentPlan, arena: Tensor) -> list[Buffer]:
    offsets = iter(plan.offsets)
    return [
        Buffer(b, torch.empty(b.nbytes, dtype=torch.uint8, device=arena.device) if b.slides else arena[next(offsets) :])
        for b in plan.buffers
    ]


def _view(rows: Tensor, axis: int) -> Tensor:
    """[rows, width, C] as [1, C, H, W] or [1, H, W, C]."""
    return rows.permute(2, 0, 1)[None] if axis == PLANES else rows[None]


class StreamPlan:
    """How a network streams a picture ``width`` columns wide. Holds no tensors.

    ``band``: input rows at a time, a multiple of ``align``; after the first enlargement ``tail_band`` of them at a time,
    since those rows are the largest. ``block``: columns that an operation makes at a time, so that what it makes stays
    small and in the processor's cache; None: all.
    """

    def __init__(
        self, graph: RowGraph, band: int, width: int, tail_band: int | None = None, block: int | None = None
    ) -> None:
        if tail_band and band % tail_band:
            raise ValueError(f"bands of {band} rows cannot be cut into tail bands of {tail_band}")
        self.band, self.width, self.scale = band, width, int(graph.scale)
        self.segments: list[SegmentPlan] = []
        for part in split(graph):
            segment = SegmentPlan(part, band, width, block)
            self.segments.append(segment)
            width = int(width * part.scale)
            band = int((tail_band or band) * part.scale)

    @property
    def delay(self) -> int:
        """Input rows, rounded up, that must have been pushed below a row before its output is complete."""
        rows = 0
        for segment in reversed(self.segments):
            rows = math.ceil((rows + segment.delay) / segment.graph.scale)
        return rows

    @property
    def nbytes(self) -> int:
        """What streaming takes above the weights: rows kept, rows at work, and what operations make on the way."""
        states = sum(s.state_bytes for s in self.segments)
        passing = sum(s.nbytes(s.graph.output) for s in self.segments)  # held while the next rows are made
        largest = max(s.arena_bytes for s in self.segments) + max(s.temporary_bytes for s in self.segments)
        return states + passing + largest

    def macs(self, rows: int) -> int:
        """Multiply-adds of ``rows`` input rows, each computed once."""
        total = 0
        for segment in self.segments:
            total += sum(segment.macs(i, int(rows * segment.rate(i))) for i in range(len(segment.graph.ops)))
            rows = int(rows * segment.graph.scale)
        return total


class RowStream:
    """A network at work on the rows of one picture, or of a part of it."""

    def __init__(self, plan: StreamPlan, device: torch.device | str = "cpu") -> None:
        self.plan = plan
        queue = device_queue(torch.device(device))
        arena = torch.empty(max(s.arena_bytes for s in plan.segments), dtype=torch.uint8, device=device)
        self._segments = [_Segment(s, arena, queue) for s in plan.segments]
        self.start(0, 0)

    def start(self, low: int, high: int) -> None:
        """Begin anew: the next rows pushed are [low, low + band) of a picture whose rows are [low, high)."""
        for segment in self._segments:
            segment.clear()
        self._next, self._low, self._high = low, low, high

    @torch.inference_mode()
    def push(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The next band, [1, C, band, width], zero below the picture -> the output's rows that are now complete.

        Yields (first row, [rows, width * scale, C]), from top to bottom; only rows of the picture. Each is to be used before
        the next is asked for, which overwrites it.
        """
        rows = Rows(self._next, self.plan.band, self._low, self._high)
        self._next += self.plan.band
        yield from self._run(0, x[0].permute(1, 2, 0), rows)

    def _run(self, index: int, x: Tensor | None, rows: Rows) -> Iterator[tuple[int, Tensor]]:
        if index == len(self._segments):
            if x is not None:
                first, last = max(rows.top, rows.low), min(rows.top + rows.count, rows.high)
                yield first, x[first - rows.top : last - rows.top]
            return
        segment = self._segments[index]
        band = segment.plan.band
        for at in range(0, rows.count, band):
            part = Rows(rows.top + at, band, rows.low, rows.high)
            if part.top + band > rows.low:  # before the picture begins nothing has happened yet
                y, made = segment.push(x[at : at + band] if x is not None else None, part)
                yield from self._run(index + 1, y, made)

    @property
    def macs(self) -> int:
        """Multiply-adds executed since the stream was made."""
        return sum(s.macs for s in self._segments)
