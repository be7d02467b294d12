"""Where rows are kept while a network streams: planned as numbers, then made.

A buffer holds, side by side in channels, the values that are read together, so that a concatenation is never copied. It
lives within one band: the rows that the next band needs again are saved when its last reader is done and put back
when its first writer begins, so that all buffers share one arena. A value that waits for longer than a band keeps a
buffer of its own, whose rows slide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from engine.bands.graph import Rows

_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Slot:
    """A value's place in a buffer: its channels, the row where its new rows begin, and how many before them the next
    band reads again.
    """

    value: str
    channel: int
    channels: int
    row: int
    keep: int


@dataclass(frozen=True, slots=True)
class BufferPlan:
    """[rows, width, channels], of which ``advance`` rows are new in every band and ``oldest`` lie before the band's own.

    ``first``, ``last``: the positions of the operations between which it is in use.
    """

    slots: tuple[Slot, ...]
    rows: int
    width: int
    channels: int
    dtype: torch.dtype
    advance: int
    oldest: int
    first: int
    last: int

    @property
    def nbytes(self) -> int:
        return -(-self.rows * self.width * self.channels * self.dtype.itemsize // _ALIGNMENT) * _ALIGNMENT

    def meets(self, rows: Rows) -> bool:
        """Whether any of its rows lies inside the picture when these rows of the segment's input are new."""
        rate = Fraction(self.advance, rows.count)
        top = rows.top * rate - self.oldest
        return top < rows.high * rate and top + self.rows > rows.low * rate

    def starts_with(self, members: Sequence[str]) -> bool:
        return tuple(s.value for s in self.slots[: len(members)]) == tuple(members)

    @property
    def slides(self) -> bool:
        """Whether it keeps at least as much as is new: saving that would take more memory than keeping it all."""
        return max(s.keep for s in self.slots) >= self.advance

    @property
    def saved_bytes(self) -> int:
        """Memory held from band to band."""
        if self.slides:
            return self.nbytes
        return sum(s.keep * s.channels for s in self.slots) * self.width * self.dtype.itemsize


def share(plans: Sequence[BufferPlan]) -> tuple[list[int], int]:
    """Places in one arena such that buffers which are in use together do not overlap: (offsets, total), in bytes.

    Greedy by size, the largest first, each at the lowest place that is free over its life.
    """
    order = sorted(range(len(plans)), key=lambda i: -plans[i].nbytes)
    offsets = [0] * len(plans)
    placed: list[int] = []
    for i in order:
        plan, at = plans[i], 0
        for j in sorted(placed, key=lambda k: offsets[k]):
            apart = plans[j].last < plan.first or plan.last < plans[j].first
            if not apart and offsets[j] < at + plan.nbytes:
                at = max(at, offsets[j] + plans[j].nbytes)
        offsets[i] = at
        placed.append(i)
    return offsets, max((offsets[i] + plans[i].nbytes for i in placed), default=0)


class Buffer:
    """A buffer at work. ``memory``: bytes of the arena, or of its own."""

    def __init__(self, plan: BufferPlan, memory: Tensor) -> None:
        shape = (plan.rows, plan.width, plan.channels)
        self.plan = plan
        self._rows = memory[: math.prod(shape) * plan.dtype.itemsize].view(plan.dtype).view(shape)
        self._saved: list[tuple[Tensor, Tensor, Tensor]] = []  # (kept rows, where they end up, where they come from)
        if not plan.slides:
            self._saved = [self._keep(slot) for slot in plan.slots if slot.keep]

    def _keep(self, slot: Slot) -> tuple[Tensor, Tensor, Tensor]:
        part = self._rows[:, :, slot.channel : slot.channel + slot.channels]
        old = part[slot.row - slot.keep : slot.row]
        new = part[slot.row - slot.keep + self.plan.advance : slot.row + self.plan.advance]
        return torch.zeros(old.shape, dtype=old.dtype, device=old.device), old, new

    def clear(self) -> None:
        """Forget every row: the picture's border."""
        if self.plan.slides:
            self._rows.zero_()
        for kept, _, _ in self._saved:
            kept.zero_()

    def begin(self) -> None:
        """Before the band's first writer."""
        for kept, old, _ in self._saved:
            old.copy_(kept)
        if self.plan.slides:
            step, end = self.plan.advance, self.plan.rows
            for row in range(0, end - step, step):  # a step at a time: source and target do not overlap
                stop = min(row + 2 * step, end)
                self._rows[row : stop - step].copy_(self._rows[row + step : stop])

    def finish(self) -> None:
        """After the band's last reader."""
        for kept, _, new in self._saved:
            kept.copy_(new)

    def new_rows(self, slot: Slot) -> Tensor:
        """Where a value's new rows belong: [advance, width, its channels]."""
        return self._rows[slot.row : slot.row + self.plan.advance, :, slot.channel : slot.channel + slot.channels]

    def window(self, read: int, reach: int, channels: int) -> Tensor:
        """The rows that an operation reads at delay ``read``: [advance + 2 reach, width, the first channels]."""
        first = self.plan.oldest - read - reach
        return self._rows[first : first + self.plan.advance + 2 * reach, :, :channels]
