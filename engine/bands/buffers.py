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
    def saved(self) -> tuple[SavedBlock, ...]:
        """Rows that the next band reads again, in the blocks in which they are saved."""
        return saved_blocks(self.slots, self.slack)

    @property
    def nbytes(self) -> int:
        """Bytes, rounded up so that a buffer of any dtype can follow."""
        return -(-self.rows * self.width * self.channels * self.dtype.itemsize // _ALIGNMENT) * _ALIGNMENT

    def overlaps_picture(self, rows: Rows) -> bool:
        """Whether any of its rows lies in the picture in the band that adds ``rows`` to the segment's input."""
        rate = Fraction(self.advance, rows.count)
        top = rows.top * rate - self.oldest
        return top < rows.high * rate and top + self.rows > rows.low * rate

    def starts_with(self, values: Sequence[str]) -> bool:
        """Whether these values are its first, in this order."""
        return tuple(s.value for s in self.slots[: len(values)]) == tuple(values)

    @property
    def slides(self) -> bool:
        """Whether its rows slide: a band adds no more rows than it keeps, so saving them would cost more memory."""
        return max(s.keep for s in self.slots) >= self.advance

    @property
    def saved_bytes(self) -> int:
        """Bytes held from band to band."""
        if self.slides:
            return self.nbytes
        return sum(block.size for block in self.saved) * self.width * self.dtype.itemsize


def pack(plans: Sequence[BufferPlan]) -> tuple[list[int], int]:
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

    def __init__(self, plan: BufferPlan, memory: Tensor) -> None:
        """``memory``: uint8 [>= plan.nbytes], a part of the arena or the buffer's own."""
        shape = (plan.rows, plan.width, plan.channels)
        self.plan = plan
        self._rows = memory[: math.prod(shape) * plan.dtype.itemsize].view(plan.dtype).view(shape)
        self._saved = [] if plan.slides else [self._saved_rows(block) for block in plan.saved]

    def _saved_rows(self, block: SavedBlock) -> _SavedRows:
        view = self._rows[:, :, block.channel : block.channel + block.channels]
        target = view[block.row : block.row + block.rows]
        source = view[block.row + self.plan.advance : block.row + block.rows + self.plan.advance]
        return _SavedRows(torch.zeros(target.shape, dtype=target.dtype, device=target.device), source, target)

    def clear(self) -> None:
        """Set all rows held from band to band to zero, as above a picture's first row."""
        if self.plan.slides:
            self._rows.zero_()
        for saved in self._saved:
            saved.copy.zero_()

    def begin_band(self) -> None:
        """Bring the rows of the last band to where this one reads them; call it before the first writer."""
        for saved in self._saved:
            saved.target.copy_(saved.copy)
        if self.plan.slides:
            step, end = self.plan.advance, self.plan.rows
            for row in range(0, end - step, step):  # in steps, so that source and target do not overlap
                stop = min(row + 2 * step, end)
                self._rows[row : stop - step].copy_(self._rows[row + step : stop])

    def end_band(self) -> None:
        """Save the rows that the next band reads again; call it after the last reader."""
        for saved in self._saved:
            saved.copy.copy_(saved.source)

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
