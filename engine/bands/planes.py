"""Row buffers of a dense block on a CPU: one plane for every few channels, so that convolutions read values without a copy.

The k-th reader of a dense block reads the first k values, each in a window one row above that of the reader before. oneDNN
reads dense memory only. So the values lie in planes [rows, width, unit] of exactly one window's rows each, one behind another,
and any first few of them are a dense input of a convolution in three dimensions, whose depth counts planes.

From one reader to the next all windows move up by one row: the oldest row of a plane then lies where the newest row of the plane
before it was, which no further reader needs. That newest row is saved for the next band first, so each reader restores one row
of every plane, and saves one.

A value of several planes is written in them, as [rows, width, planes, unit]. The residual of the block is the first value: its
rows lie in the middle of the last reader's window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.bands.buffers import Slot, aligned, overlaps_picture
from engine.bands.rules import Rows


@dataclass(frozen=True, slots=True)
class PlanePlan:
    """Size and use of planes: the k-th reader reads the first k values, k rows after the first of them is complete."""

    slots: tuple[Slot, ...]
    """Values in it, in the order of their channels."""
    unit: int
    """Channels of a plane."""
    width: int
    """Number of columns."""
    dtype: torch.dtype
    """Type of its numbers."""
    advance: int
    """Rows that a band adds."""
    oldest: int
    """Delay of the oldest row that is read."""
    first: int
    """Position of the first operation that writes to it."""
    readers: tuple[int, ...]
    """Positions of the operations that read it, one for each value."""

    @property
    def last(self) -> int:
        """Position of the last operation that reads it."""
        return self.readers[-1]

    @property
    def window(self) -> int:
        """Rows of a plane: those of a band, and one above and below."""
        return self.advance + 2

    @property
    def planes(self) -> tuple[int, ...]:
        """Planes that each reader reads."""
        return tuple((slot.channel + slot.channels) // self.unit for slot in self.slots)

    @property
    def saved_planes(self) -> tuple[int, ...]:
        """Planes of each row that is saved from band to band: a row above the window of every reader, and one more."""
        return (*self.planes, self.planes[-1])

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of a plane."""
        return self.width * self.unit * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes, rounded up so that a buffer of any dtype can follow."""
        return aligned(self.planes[-1] * self.window * self.row_bytes)

    @property
    def uses(self) -> tuple[int, ...]:
        """Positions of the operations before or after which rows are copied."""
        return self.readers

    @property
    def keeps_rows(self) -> bool:
        """Whether a later band reads rows of this one."""
        return True

    @property
    def saved_bytes(self) -> int:
        """Bytes held from band to band."""
        return sum(self.saved_planes) * self.row_bytes

    @property
    def slides(self) -> bool:
        """Whether it needs no memory of an arena."""
        return False

    def new_state(self, device: torch.device) -> list[Tensor]:
        """Memory of the rows held from band to band; zero, as above a picture's first row."""
        shapes = [(planes, self.width, self.unit) for planes in self.saved_planes]
        return [torch.zeros(shape, dtype=self.dtype, device=device) for shape in shapes]

    def starts_with(self, values: Sequence[str]) -> bool:
        """Whether these values are its first, in this order."""
        return tuple(s.value for s in self.slots[: len(values)]) == tuple(values)

    def overlaps_picture(self, rows: Rows) -> bool:
        """Whether any of its rows lies in the picture in the band that adds ``rows`` to the segment's input."""
        return overlaps_picture(rows, self.advance, self.oldest, self.advance + len(self.slots) + 1)


class Planes:
    """Planes in memory."""

    def __init__(self, plan: PlanePlan, state: Sequence[Tensor], arena: Tensor) -> None:
        """
        Args:
            plan: their plan.
            state: what ``plan.new_state`` returned.
            arena: uint8 [>= plan.nbytes], which holds the planes within a band.
        """
        self.plan, self._saved = plan, state
        self._row_size = plan.width * plan.unit
        self._memory = arena[: plan.nbytes].view(plan.dtype)
        self._top = len(plan.slots) + 1  # row of a plane where the first value's new rows begin
        last = len(plan.slots)
        self._before = [[self._old_rows(k + 1)] for k in range(last)]
        self._before[0].append(self._old_rows(0))
        self._after = [[self._new_rows(k)] for k in range(last)]
        self._after[-1].append(self._new_rows(last))

    def _old_rows(self, index: int) -> tuple[Tensor, Tensor]:
        """(target, source) of the saved row ``index + 1`` above the first value's new rows."""
        saved = self._saved[index]
        return self._row(-1 - index, saved.shape[0]), saved

    def _new_rows(self, index: int) -> tuple[Tensor, Tensor]:
        """(target, source) of the row that the next band reads as that old row."""
        saved = self._saved[index]
        return saved, self._row(self.plan.advance - 1 - index, saved.shape[0])

    def _row(self, row: int, planes: int) -> Tensor:
        """One row of the first planes, counted from the first value's new rows on: [planes, width, unit]."""
        return self._view((planes,), self._top + row, (self.plan.window,))

    def _view(self, shape: tuple[int, ...], first: int, steps: tuple[int, ...]) -> Tensor:
        """Rows [*shape, width, unit], from row ``first`` of the planes on, ``steps`` rows apart along each axis."""
        strides = [step * self._row_size for step in steps]
        return self._memory.as_strided(
            (*shape, self.plan.width, self.plan.unit),
            (*strides, self.plan.unit, 1),
            self._memory.storage_offset() + first * self._row_size,
        )

    def before(self, position: int) -> list[tuple[Tensor, Tensor]]:
        """(target, source) of rows, most of the last band, to copy before the operation at ``position``."""
        return self._before[self.plan.readers.index(position)]

    def after(self, position: int) -> list[tuple[Tensor, Tensor]]:
        """(target, source) of rows that the next band reads again, to copy after the operation at ``position``."""
        return self._after[self.plan.readers.index(position)]

    def new_rows(self, slot: Slot) -> Tensor:
        """View of the rows that a band adds to a value: [advance, width, unit], or [advance, width, planes, unit]."""
        return self._rows(slot, self._top - self.plan.slots.index(slot))

    def residual_of(self, position: int) -> Tensor:
        """View of the first value's rows in the middle of a reader's window, in the form of ``new_rows``."""
        return self._rows(self.plan.slots[0], self._top - self.plan.readers.index(position) - 1)

    def _rows(self, slot: Slot, first: int) -> Tensor:
        """A value's rows from row ``first`` of its planes on."""
        plan = self.plan
        first += slot.channel // plan.unit * plan.window
        if slot.channels == plan.unit:
            return self._view((plan.advance,), first, (1,))
        planes = self._view((slot.channels // plan.unit, plan.advance), first, (plan.window, 1))
        return planes.permute(1, 2, 0, 3)

    def input_of(self, position: int) -> Tensor:
        """View that a reader reads: [1, unit, planes, advance + 2, width], dense and channels-last."""
        index, plan = self.plan.readers.index(position), self.plan
        first = self._top - index - 2
        view = self._view((plan.planes[index], plan.window), first, (plan.window, 1))
        return view.permute(3, 0, 1, 2)[None]
