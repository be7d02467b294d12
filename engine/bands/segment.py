"""A segment of a streamed network, a part between two cuts: its plan in numbers, and its tensors at work.

All bands have one shape. At the borders, rows outside the picture are zero, which equals a convolution's zero padding; rows
that no output follows from are zero, too. An operation without any other rows is skipped.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, partial
from math import gcd

import torch
from torch import Tensor

from engine.bands.buffers import EXACT, ROOMY, Buffer, BufferPlan, Slot, pack
from engine.bands.cpu import plane_channels
from engine.bands.graph import Op, RowGraph, schedule
from engine.bands.needs import Needs, Range, needs_of
from engine.bands.planes import PlanePlan, Planes
from engine.bands.rules import AXES, Layout, Rows, Rule, copy_rows
from engine.device.queue import WARM_UPS, DeviceQueue

_RESULT_BYTES = 4 << 20
"""Bytes of a convolution's result up to which it takes as long as the whole band's, or less. Measured: docs/log.md."""

_INPUT = -1
"""Position of a segment's inputs in the order of its operations."""


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
        self._position = dict.fromkeys(graph.inputs, _INPUT) | {op.name: i for i, op in enumerate(graph.ops)}
        groups = self._concatenation_reads()
        self._add_single_value_reads(groups)
        self.buffers = [self._planes(values, reads) or self._buffer(values, reads) for values, reads in groups.items()]
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

    def new_rows(self, name: str, rows: Rows) -> Rows:
        """New rows of a value, given the new rows of the input."""
        scaled = rows.scale(self.graph.values[name].rate)
        return Rows(scaled.top - self.schedule.delay[name], scaled.count, scaled.low, scaled.high)

    def needs(self, output: Range, picture: Range) -> Needs:
        """Rows of all values behind rows of the output; ``picture``: rows of the input in the picture."""
        return needs_of(self.graph, self.schedule, output, picture)

    def macs(self, position: int, rows: int) -> int:
        """Multiply-adds that an operation takes for ``rows`` rows of its output."""
        return self.graph.ops[position].rule.macs * rows * int(self.width * self.rate(position))

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
        for name in sorted(names, key=lambda n: -len(self.graph.members(n))):
            members = self.graph.members(name)
            group = next((g for g in groups if g[: len(members)] == members), members)
            groups.setdefault(group, []).extend(_BufferRead(p, len(members)) for p in self._readers[name])
        return groups

    def _add_single_value_reads(self, groups: dict[tuple[str, ...], list[_BufferRead]]) -> None:
        """Add a buffer for each single value, but for readers that take the value from one that begins with it."""
        for name, positions in self._readers.items():
            if name in self.graph.concatenations:
                continue
            longer = next((group for group in groups if group[0] == name), (name,))
            for position in positions:
                op = self.graph.ops[position]
                for index in (i for i, read in enumerate(op.inputs) if read == name):
                    if self.reads_own_residual(op, index):
                        continue
                    group = longer if op.rule.reads_views(index) else (name,)
                    groups.setdefault(group, []).append(_BufferRead(position, 1))

    def reads_own_residual(self, op: Op, index: int) -> bool:
        """Whether an input is the residual of a dense block, the first value of the convolution's own input."""
        return index == 1 and op.rule.adds_residual and self.graph.members(op.inputs[0])[0] == op.inputs[1]

    def _oldest_row(self, read: _BufferRead) -> int:
        """Delay of the first row that an operation reads."""
        op = self.graph.ops[read.position]
        return self.schedule.read[op.name] + op.rule.reach

    def _planes(self, members: Sequence[str], reads: Sequence[_BufferRead]) -> PlanePlan | None:
        """Planes for the values of a dense block on a CPU; None for other values.

        The k-th convolution reads the first k values, and each value is a row later than the one before.
        """
        reads = sorted(reads, key=lambda read: read.position)
        ops = [self.graph.ops[read.position] for read in reads]
        values = [self.graph.values[m] for m in members]
        delay, unit = self.schedule.delay[members[0]], plane_channels(values[0].dtype)
        steps = range(len(members))
        if not (
            len(members) > 1
            and [read.values for read in reads] == [k + 1 for k in steps]
            and all(op.rule.reads_planes(0) for op in ops)
            and [self.schedule.read[op.name] for op in ops] == [delay + k + 1 for k in steps]
            and [self.schedule.delay[m] for m in members] == [delay + k for k in steps]
            and all(value.channels % unit == 0 for value in values)
        ):
            return None
        unit = gcd(*(value.channels for value in values))
        channels = [0]
        for value in values:
            channels.append(channels[-1] + value.channels)
        return PlanePlan(
            slots=tuple(Slot(m, c, v.channels, 0, 0) for m, c, v in zip(members, channels, values, strict=False)),
            unit=unit,
            width=int(self.width * values[0].rate),
            dtype=values[0].dtype,
            advance=int(self.band * values[0].rate),
            oldest=delay + len(members) + 1,
            first=min(self._position[m] for m in members),
            readers=tuple(read.position for read in reads),
        )

    def _reads_dense_rows(self, op: Op) -> bool:
        """Whether a packed convolution reads all channels of a buffer. Planes are copied at a picture's ends."""
        members = self.graph.members(op.inputs[0])
        if not op.rule.packed_bytes:
            return False
        buffers = [b for b in self.buffers if b.starts_with(members)]
        return any(isinstance(b, BufferPlan) and len(b.slots) == len(members) for b in buffers)

    @property
    def packed_bytes(self) -> int:
        """Bytes of weights in an order of their own."""
        return sum(op.rule.packed_bytes for op in self.graph.ops)

    def new_states(self, device: torch.device) -> list[list[Tensor]]:
        """Memory that the buffers hold from band to band, zero."""
        return [buffer.new_state(device) for buffer in self.buffers]

    def _buffer(self, members: Sequence[str], reads: Sequence[_BufferRead]) -> BufferPlan:
        values, delays = [self.graph.values[m] for m in members], [self.schedule.delay[m] for m in members]
        oldest = max(map(self._oldest_row, reads))
        slots, channel = [], 0
        for index, (member, value, delay) in enumerate(zip(members, values, delays, strict=True)):
            oldest_of_value = max(self._oldest_row(r) for r in reads if r.values > index)
            slots.append(Slot(member, channel, value.channels, oldest - delay, oldest_of_value - delay))
            channel += value.channels
        advance = int(self.band * values[0].rate)
        by_kernel = all(self.graph.ops[read.position].rule.by_kernel for read in reads)
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
        if reach is None or self.block is None or width <= self.block or op.rule.packed_bytes:
            return [ColumnBlock(0, width, 0, width)]
        size = -(-width // -(-width // self.block) // step) * step
        read_size = min(width, size + 2 * reach)
        blocks = []
        for first in range(0, width, size):
            last = min(first + size, width)
            read_first = max(0, min(first - reach, width - read_size)) if reach else first
            blocks.append(ColumnBlock(first, last, read_first, read_first + read_size if reach else last))
        return blocks

    def rows_at_once(self, op: Op) -> int:
        """Rows that an operation computes at a time: few for a packed convolution, whose result then stays in the cache.

        All in planes, which are dense in their whole height alone.
        """
        value = self.graph.values[op.name]
        rows = int(self.band * value.rate)
        if not op.rule.is_packed or not self._reads_dense_rows(op):
            return rows
        row = int(self.width * value.rate) * value.channels * value.dtype.itemsize
        return -(-rows // -(-rows // max(1, _RESULT_BYTES // row)))

    def is_staged(self, op: Op) -> bool:
        """Whether an operation that cannot write to several planes has no other destination."""
        if op.rule.writes_planes or op.name == self.graph.output:
            return False
        slots = [(b, slot) for b in self.buffers for slot in b.slots if slot.value == op.name]
        return all(isinstance(b, PlanePlan) and slot.channels > b.unit for b, slot in slots)

    @property
    def temporary_bytes(self) -> int:
        """Largest number of bytes that one operation allocates while it runs."""
        return max(self._temporary_bytes(op) for op in self.graph.ops)

    def _temporary_bytes(self, op: Op) -> int:
        """Bytes of an operation's output and workspace, and of the dense copy that a convolution makes of its input."""
        value, columns = self.graph.values[op.name], max(c.read_last - c.read_first for c in self.column_blocks(op))
        rows = self.rows_at_once(op)
        outputs = (op.rule.compute is not None) + self.is_staged(op)
        total = rows * columns * (outputs * value.channels * value.dtype.itemsize + op.rule.workspace)
        if op.rule.column_reach is not None and op.rule.macs and not self._reads_dense_rows(op):
            for name in op.inputs:
                source = self.graph.values[name]
                total += (rows + 2 * op.rule.reach) * columns * source.channels * source.dtype.itemsize
        return total


@dataclass(frozen=True, slots=True)
class _BlockViews:
    """A column block with views of the rows and columns that it reads and writes."""

    columns: ColumnBlock
    inputs: list[Tensor]
    """One for each input of the operation."""
    output: Tensor | None
    """Its place in the first destination; None for the segment's output, which has new memory in every band."""


class Spares:
    """Outputs of links that no segment reads any more: the next ones are written over them.

    The heap could not use them again: glibc before 2.38 finds no aligned block in a freed one of the same size.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[tuple[int, ...], torch.dtype], list[Tensor]] = {}

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory of a new output on the CPU. Several threads may call it."""
        try:
            return self._free[shape, dtype].pop()
        except (KeyError, IndexError):
            return torch.empty(shape, dtype=dtype)

    def give(self, output: Tensor) -> None:
        """Let an output be overwritten."""
        self._free.setdefault((tuple(output.shape), output.dtype), []).append(output)


class SegmentStream:
    """A segment of a network at work, with an arena for what it holds within a band.

    Views and buffers are allocated once, so a band allocates only the operations' temporaries. Bands away from the picture's
    borders launch the same work, which the queue captures after a few of them.

    As a link, which threads run for several bands at the same time, a segment has memory of its own for the output of each
    band, and its work is a list of calls that hold Python's lock as briefly as possible.
    """

    def __init__(
        self,
        plan: SegmentPlan,
        states: Sequence[Sequence[Tensor]],
        arena: Tensor,
        queue: DeviceQueue,
        spares: Spares | None = None,
    ) -> None:
        """
        Args:
            plan: its plan.
            states: what ``plan.new_states`` returned. Streams in other arenas may share them, and run one after another.
            arena: uint8 [>= plan.arena_bytes].
            queue: queue of the arena's device.
            spares: outputs of a link that may be overwritten; None: no other band is computed at the same time.
        """
        self.plan = plan
        self._graph = plan.graph
        self._queue = queue
        self._needs = Needs({}, (0, 0))
        self._warm_ups = 0
        self._replay: Callable[[], None] | None = None
        self._device = arena.device
        self._spares = spares
        self._output = self._new_output() if spares is None else torch.empty(0)
        self._buffers = _allocate(plan, states, arena)
        self._destinations: dict[str, list[Tensor]] = {}
        self._lasting_destinations: dict[str, list[Tensor]] = {}  # read in a later band, too
        self._used: dict[int, list[Buffer | Planes]] = {}  # position -> buffers that restore or save rows there
        for buffer in self._buffers:
            for position in buffer.plan.uses:
                self._used.setdefault(position, []).append(buffer)
            for slot in buffer.plan.slots:
                self._destinations.setdefault(slot.value, []).append(buffer.new_rows(slot))
                if buffer.plan.keeps_rows:
                    self._lasting_destinations.setdefault(slot.value, []).append(buffer.new_rows(slot))
        for destinations in self._destinations.values():
            destinations.sort(key=lambda rows: rows.ndim)  # dense ones first
        self._staged = {op.name for op in plan.graph.ops if plan.is_staged(op)}
        self._blocks = [self._block_views(op) for op in plan.graph.ops]
        self._rows_at_once = [plan.rows_at_once(op) for op in plan.graph.ops]
        self._steps: list[Callable[[], object]] = []
        self.macs = 0
        """Multiply-adds executed so far."""
        self._inner_macs = sum(plan.macs(i, int(plan.band * plan.rate(i))) for i in range(len(plan.graph.ops)))

    def _new_output(self) -> Tensor:
        plan = self.plan
        value = plan.graph.values[plan.graph.output]
        shape = (int(plan.band * value.rate), int(plan.width * value.rate), value.channels)
        if self._spares is not None:
            return self._spares.take(shape, value.dtype)
        return torch.empty(shape, dtype=value.dtype, device=self._device)

    def _block_views(self, op: Op) -> list[_BlockViews]:
        sources = [self._source(op, index) for index in range(len(op.inputs))]
        layout, output = self._graph.values[op.name].layout, None
        if op.name != self._graph.output and op.name not in self._staged:
            output = _view(self._destinations[op.name][0], layout)
        blocks = []
        for block in self.plan.column_blocks(op):
            first, last = (int(n / op.rule.factor) for n in (block.read_first, block.read_last))
            pairs = zip(sources, op.layouts, strict=True)
            inputs = [s if s.ndim == _PLANES else s.narrow(own.columns, first, last - first) for s, own in pairs]
            blocks.append(_BlockViews(block, inputs, None if output is None else _narrow(output, layout, block)))
        return blocks

    def _source(self, op: Op, index: int) -> Tensor:
        """Rows of a buffer that an operation reads as an input, in their layout; or planes."""
        name, layout = op.inputs[index], op.layouts[index]
        members = self._graph.members(name)
        single = name not in self._graph.concatenations
        is_residual = self.plan.reads_own_residual(op, index)
        shared = self._graph.members(op.inputs[0]) if is_residual else members
        buffers = [b for b in self._buffers if b.plan.starts_with(shared)]
        planes = [b for b in buffers if isinstance(b, Planes)]
        position = self._graph.ops.index(op)
        if planes and is_residual:
            return _view(planes[0].residual_of(position), layout)
        if planes and op.rule.reads_planes(index):
            return planes[0].input_of(position)
        rows = [b for b in buffers if isinstance(b, Buffer)]
        buffer = next((b for b in rows if single and len(b.plan.slots) == 1), rows[0])
        channels = sum(self._graph.values[m].channels for m in members)
        return _view(buffer.window(self.plan.schedule.read[op.name], op.rule.reach_of(index), channels), layout)

    def start(self, needs: Needs) -> None:
        """Start a picture, of which these rows are needed."""
        self._needs = needs

    def push(self, inputs: Sequence[Tensor] | None, rows: Rows) -> tuple[Tensor | None, Rows]:
        """Add rows to the inputs.

        Args:
            inputs: [band, width, C] for each of the graph's inputs; None if no row is needed.
            rows: position of these rows.

        Returns:
            The output's new rows or None if none is needed; and their position. A link's have memory of their own; others
            are overwritten by the next push.
        """
        if self._spares is not None:
            self._output = self._new_output()
        for buffer in self._used.get(_INPUT, ()):
            if buffer.plan.overlaps_picture(rows):
                _copy(buffer.before(_INPUT))
        for index, name in enumerate(self._graph.inputs):
            if inputs is None:
                self._zero_rows(name)
            else:
                for destination in self._destinations.get(name, ()):
                    _fill(destination, inputs[index])
        if self._is_inner(rows):
            self._run_inner(rows)
            self.macs += self._inner_macs
        else:
            self.macs += self._run(rows)
        output_rows = self.plan.new_rows(self._graph.output, rows)
        output = self._output
        if self._spares is not None:
            self._output = torch.empty(0)  # its reader alone keeps it
        return None if self._needs.of(self._graph.output, output_rows).outside else output, output_rows

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
        """Whether every row that the band reads or computes lies in the picture, and every row that it computes is needed."""
        (above, below), (first, last) = self._margins, self._needs.inner
        top, bottom = rows.top, rows.top + rows.count
        return first <= top and rows.low + above <= top and bottom <= last and bottom <= rows.high - below

    def _run_inner(self, rows: Rows) -> None:
        """Run the operations of an inner band: directly at first, then by replaying the captured launches; or as steps."""
        # A strong reference would keep the segment's buffers alive until the next garbage collection.
        segment = weakref.proxy(self)
        if self._spares is not None:
            self._steps = self._steps or list(self._inner_steps(rows))
            for step in self._steps:
                step()
            return
        if self._replay is None and self._warm_ups == WARM_UPS:
            self._replay = self._queue.capture(lambda: segment._run(rows, is_inner=True))
        if self._replay is None:
            self._warm_ups += 1
            self._run(rows, is_inner=True)
        else:
            self._replay()

    def _inner_steps(self, rows: Rows) -> Iterator[Callable[[], object]]:
        """Calls of an inner band, in order. Other threads wait for Python's lock, so the list holds little Python."""
        segment = weakref.proxy(self)
        for position, op in enumerate(self._graph.ops):
            buffers = self._used.get(position, ())
            yield from (partial(target.copy_, source) for b in buffers for target, source in b.before(position))
            new_rows = self.plan.new_rows(op.name, rows)
            yield partial(SegmentStream._run_op, segment, position, op, new_rows, new_rows)
            yield from (partial(target.copy_, source) for b in buffers for target, source in b.after(position))

    def _run(self, rows: Rows, *, is_inner: bool = False) -> int:
        """Run every operation of a band in order and return the multiply-adds.

        An inner band is the same wherever it lies, so it is repeated with the rows of the first one.
        """
        macs = 0
        for position, op in enumerate(self._graph.ops):
            buffers = [b for b in self._used.get(position, ()) if b.plan.overlaps_picture(rows)]
            for buffer in buffers:
                _copy(buffer.before(position))
            new_rows = self.plan.new_rows(op.name, rows)
            needed = new_rows if is_inner else self._needs.of(op.name, new_rows)
            if needed.outside:
                self._zero_rows(op.name)
            else:
                macs += self._run_op(position, op, new_rows, needed)
            for buffer in buffers:
                _copy(buffer.after(position))
        return macs

    def _run_op(self, position: int, op: Op, new_rows: Rows, needed: Rows) -> int:
        """Compute an operation's new rows at their first destination, copy them to the others, return the multiply-adds.

        ``needed``: the same rows, with those that are needed in place of those in the picture.
        """
        layout, count = self._graph.values[op.name].layout, new_rows.count
        first, *others = self._targets(op)
        for block in self._blocks[position]:
            output = _narrow(_view(first, layout), layout, block.columns) if block.output is None else block.output
            views = block.inputs
            if not needed.inside and op.rule.is_packed:
                views, output = _rows_inside(op.rule, views, output, needed)
                count = output.shape[-2]
            for part, target in _row_parts(op.rule, views, output, self._rows_at_once[position]):
                if op.rule.compute is not None:
                    y = op.rule.compute(part, new_rows)
                    part = [_narrow(y, layout, block.columns, block.columns.read_first), *part[1:]]
                op.rule.store(part, target)
        if not needed.inside:
            first[: max(0, needed.low - needed.top)] = 0
            first[max(0, needed.high - needed.top) :] = 0
        for destination in others:
            _fill(destination, first)
        return self.plan.macs(position, count)

    def _targets(self, op: Op) -> list[Tensor]:
        """Destination of an operation, then the destinations of its copies."""
        destinations = self._destinations.get(op.name, [])
        if op.name == self._graph.output:
            return [self._output, *destinations]
        if op.name not in self._staged:
            return destinations
        height, width = destinations[0].shape[:2]
        dense = destinations[0].new_empty(height, width, self._graph.values[op.name].channels)
        return [dense, *destinations]

    def _zero_rows(self, name: str) -> None:
        """Zero a value's new rows, none of which is needed.

        Only where a later band reads them: this band's readers are not needed either.
        """
        for destination in self._lasting_destinations.get(name, ()):
            destination.zero_()


STEPS = 16
"""Sizes in which a convolution computes part of a band's rows: oneDNN prepares for each size that it meets."""


def _rows_inside(rule: Rule, views: list[Tensor], output: Tensor, rows: Rows) -> tuple[list[Tensor], Tensor]:
    """A convolution's views and output, in the rows that are needed and a few more."""
    step = max(1, rows.count // STEPS)
    first = max(0, rows.low - rows.top) // step * step
    count = min(rows.count, -(-min(rows.count, rows.high - rows.top) // step) * step) - first
    return _cut(rule, views, output, first, count)


def _row_parts(rule: Rule, views: list[Tensor], output: Tensor, rows: int) -> Iterator[tuple[list[Tensor], Tensor]]:
    """An operation's views and output, ``rows`` rows at a time if it is a packed convolution."""
    if not rule.is_packed or output.shape[-2] <= rows:
        yield views, output
        return
    for first in range(0, output.shape[-2], rows):
        yield _cut(rule, views, output, first, min(rows, output.shape[-2] - first))


def _cut(rule: Rule, views: list[Tensor], output: Tensor, first: int, count: int) -> tuple[list[Tensor], Tensor]:
    """A convolution's views and output, in ``count`` rows of the output from ``first`` on."""
    inputs = [v.narrow(v.ndim - 2, first, count + 2 * rule.reach_of(index)) for index, v in enumerate(views)]
    return inputs, output.narrow(output.ndim - 2, first, count)


def _narrow(y: Tensor, layout: Layout, block: ColumnBlock, first: int = 0) -> Tensor:
    """The columns that a block computes, of rows whose first column is ``first``."""
    count, axis = block.last - block.first, layout.columns - AXES  # from the end: channels may take two axes
    return y if y.shape[axis] == count else y.narrow(y.ndim + axis, block.first - first, count)


def _allocate(plan: SegmentPlan, states: Sequence[Sequence[Tensor]], arena: Tensor) -> list[Buffer | Planes]:
    offsets = iter(plan.offsets)
    result: list[Buffer | Planes] = []
    for buffer, state in zip(plan.buffers, states, strict=True):
        memory = arena if buffer.slides else arena[next(offsets) :]
        result.append(Planes(buffer, state, memory) if isinstance(buffer, PlanePlan) else Buffer(buffer, state, memory))
    return result


def _view(rows: Tensor, layout: Layout) -> Tensor:
    """Rows [H, W, C] in a layout: [1, C, H, W] or [1, H, W, C]; rows [H, W, planes, unit] as [1, planes, unit, H, W]."""
    return rows.movedim((0, 1), (-2, -1))[None] if layout is Layout.NCHW else rows[None]


def _fill(destination: Tensor, rows: Tensor) -> None:
    """Copy rows [H, W, C] or [H, W, planes, unit] to some of either form."""
    copy_rows([_view(rows, Layout.NCHW)], _view(destination, Layout.NCHW))


_PLANES = 5
"""Axes of an input in planes: a whole band in all its columns."""


def _copy(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy each (target, source)."""
    for target, source in pairs:
        target.copy_(source)
