"""Row buffers of a streamed network: their plan, in numbers, and their tensors.

A buffer holds the values that are read together side by side in channels, so concatenating them copies nothing. It is in
use within one band only, so all buffers share one arena: the rows that the next band needs are saved after the last
reader and restored before the first writer. A buffer that must keep more rows than a band adds has memory of its own,
in which rows slide up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import torch
from torch import Tensor

from engine.bands.rules import Rows

_ALIGNMENT = 64

EXACT, ROOMY = 1.0, 1.15
"""Values in a common block, relative to the kept ones: none in vain, or up to 15 % for fewer launches on a device.

With 15 % the five maps of a dense block are saved in three copies.
"""


@dataclass(frozen=True, slots=True)
class Slot:
    """A value's place in a buffer."""

    value: str
    """Name of the value."""
    channel: int
    """Its first channel."""
    channels: int
    """Number of its channels."""
    row: int
    """First of the rows that a band adds."""
    keep: int
    """Rows above ``row`` that the next band reads again."""


@dataclass(frozen=True, slots=True)
class SavedBlock:
    """Rows and channels of a buffer that are saved from band to band in one copy."""

    channel: int
    """First channel."""
    channels: int
    """Number of channels."""
    row: int
    """First row, where the next band reads them."""
    rows: int
    """Number of rows."""

    @property
    def size(self) -> int:
        """Values of one column."""
        return self.channels * self.rows

    def joined(self, other: SavedBlock) -> SavedBlock:
        """The smallest block that holds this one and another one beside it."""
        row = min(self.row, other.row)
        rows = max(self.row + self.rows, other.row + other.rows) - row
        return SavedBlock(self.channel, other.channel + other.channels - self.channel, row, rows)


def saved_blocks(slots: Sequence[Slot], slack: float) -> tuple[SavedBlock, ...]:
    """Blocks that hold the kept rows of all slots.

    Neighbours are saved in one copy where their common block holds at most ``slack`` times as many values. Rows in it that
    no later band reads are overwritten before they are read.
    """
    blocks: list[SavedBlock] = []
    needed = 0
    for slot in slots:
        if not slot.keep:
            continue
        block = SavedBlock(slot.channel, slot.channels, slot.row - slot.keep, slot.keep)
        if blocks and (joined := blocks[-1].joined(block)).size <= slack * (needed + block.size):
            blocks[-1], needed = joined, needed + block.size
        else:
            blocks.append(block)
            needed = block.size
    return tuple(blocks)


@dataclass(frozen=True, slots=True)
class BufferPlan:
    """Size and use of a buffer [rows, width, channels]."""

    slots: tuple[Slot, ...]
    """Values in it, in the order of their channels."""
    rows: int
    """Number of rows."""
    width: int
    """Number of columns."""
    channels: int
    """Sum of the slots' channels."""
    dtype: torch.dtype
    """Type of its numbers."""
    advance: int
    """Rows that a band adds."""
    oldest: int
    """Delay of its first row."""
    first: int
    """Position of the first operation that writes to it."""
    last: int
    """Position of the last operation that reads it."""
    slack: float = EXACT
    """Values that are saved from band to band, relative to the kept ones, at most: ``EXACT`` or ``ROOMY``."""

    @property
    def uses(self) -> tuple[int, ...]:
        """Positions of the operations before or after which rows are copied."""
        return tuple({self.first: None, self.last: None})

    @property
    def keeps_rows(self) -> bool:
        """Whether a later band reads rows of this one."""
        return self.rows > self.advance

    @property
    def saved(self) -> tuple[SavedBlock, ...]:
        """Rows that the next band reads again, in the blocks in which they are saved."""
        return saved_blocks(self.slots, self.slack)

    @property
    def nbytes(self) -> int:
        """Bytes, rounded up so that a buffer of any dtype can follow."""
        return aligned(self.rows * self.width * self.channels * self.dtype.itemsize)

    def overlaps_picture(self, rows: Rows) -> bool:
        """Whether any of its rows lies in the picture in the band that adds ``rows`` to the segment's input."""
        return overlaps_picture(rows, self.advance, self.oldest, self.rows)

    def starts_with(self, values: Sequence[str]) -> bool:
        """Whether these values are its first, in this order."""
        return tuple(s.value for s in self.slots[: len(values)]) == tuple(values)

    @property
    def slides(self) -> bool:
        """Whether its rows slide in memory of their own: a band adds no more rows than it keeps, so saving costs more."""
        return max(s.keep for s in self.slots) >= self.advance

    @property
    def saved_bytes(self) -> int:
        """Bytes held from band to band."""
        if self.slides:
            return self.nbytes
        return sum(block.size for block in self.saved) * self.width * self.dtype.itemsize

    def new_state(self, device: torch.device) -> list[Tensor]:
        """Memory of the rows held from band to band; zero, as above a picture's first row."""
        if self.slides:
            shapes = [(self.rows, self.width, self.channels)]
        else:
            shapes = [(block.rows, self.width, block.channels) for block in self.saved]
        return [torch.zeros(shape, dtype=self.dtype, device=device) for shape in shapes]


class Interval(Protocol):
    """A buffer's bytes and the operations between which it is in use."""

    @property
    def nbytes(self) -> int: ...
    @property
    def first(self) -> int: ...
    @property
    def last(self) -> int: ...


def aligned(nbytes: int) -> int:
    """Bytes rounded up so that a buffer of any dtype can follow."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def overlaps_picture(rows: Rows, advance: int, oldest: int, count: int) -> bool:
    """Whether any of a buffer's rows lies in the picture.

    Args:
        rows: rows that the band adds to the segment's input.
        advance: rows that it adds to the buffer.
        oldest: delay of the buffer's first row.
        count: number of the buffer's rows.
    """
    rate = Fraction(advance, rows.count)
    top = rows.top * rate - oldest
    return top < rows.high * rate and top + count > rows.low * rate


def pack(plans: Sequence[Interval]) -> tuple[list[int], int]:
    """Offsets of buffers in one arena, and the arena's size, in bytes.

    Buffers that are in use at the same position do not overlap. Greedy by size: the largest first, each at the lowest
    free offset.
    """
    order = sorted(range(len(plans)), key=lambda i: -plans[i].nbytes)
    offsets = [0] * len(plans)
    placed: list[int] = []
    for i in order:
        plan, offset = plans[i], 0
        for j in sorted(placed, key=lambda k: offsets[k]):
            disjoint = plans[j].last < plan.first or plan.last < plans[j].first
            if not disjoint and offsets[j] < offset + plan.nbytes:
                offset = max(offset, offsets[j] + plans[j].nbytes)
        offsets[i] = offset
        placed.append(i)
    return offsets, max((offsets[i] + plans[i].nbytes for i in placed), default=0)


@dataclass(frozen=True, slots=True)
class _SavedRows:
    """A block of rows that the next band reads again."""

    copy: Tensor
    """Memory that holds them between two bands."""
    source: Tensor
    """View of the buffer where a band leaves them."""
    target: Tensor
    """View of the buffer where the next band reads them."""


class Buffer:
    """A buffer in memory."""

    def __init__(self, plan: BufferPlan, state: Sequence[Tensor], arena: Tensor) -> None:
        """
        Args:
            plan: its plan.
            state: what ``plan.new_state`` returned.
            arena: uint8 [>= plan.nbytes], which holds rows within a band, unless they slide.
        """
        self.plan = plan
        shape = (plan.rows, plan.width, plan.channels)
        memory = state[0] if plan.slides else arena[: math.prod(shape) * plan.dtype.itemsize].view(plan.dtype)
        self._rows = memory.view(shape)
        self._saved = [] if plan.slides else list(map(self._saved_rows, plan.saved, state))

    def _saved_rows(self, block: SavedBlock, copy: Tensor) -> _SavedRows:
        view = self._rows[:, :, block.channel : block.channel + block.channels]
        target = view[block.row : block.row + block.rows]
        source = view[block.row + self.plan.advance : block.row + block.rows + self.plan.advance]
        return _SavedRows(copy, source, target)

    def before(self, position: int) -> list[tuple[Tensor, Tensor]]:
        """(target, source) of rows of the last band, to copy before the operation at ``position``."""
        if position != self.plan.first:
            return []
        if not self.plan.slides:
            return [(saved.target, saved.copy) for saved in self._saved]
        step, end = self.plan.advance, self.plan.rows
        pairs = []
        for row in range(0, end - step, step):  # in steps, so that source and target do not overlap
            stop = min(row + 2 * step, end)
            pairs.append((self._rows[row : stop - step], self._rows[row + step : stop]))
        return pairs

    def after(self, position: int) -> list[tuple[Tensor, Tensor]]:
        """(target, source) of rows that the next band reads again, to copy after the operation at ``position``."""
        return [(saved.copy, saved.source) for saved in self._saved] if position == self.plan.last else []

    def new_rows(self, slot: Slot) -> Tensor:
        """View of the rows that a band adds to a value: [advance, width, slot.channels]."""
        return self._rows[slot.row : slot.row + self.plan.advance, :, slot.channel : slot.channel + slot.channels]

    def window(self, read: int, reach: int, channels: int) -> Tensor:
        """View of the rows that an operation reads: [advance + 2 * reach, width, channels].

        Args:
            read: delay at which the operation reads, in rows of this buffer.
            reach: rows that it reads above and below its output's rows.
            channels: number of channels, from the buffer's first on.
        """
        first = self.plan.oldest - read - reach
        return self._rows[first : first + self.plan.advance + 2 * reach, :, :channels]
