"""Destinations of finished pixels: what an executor writes to, and a small image in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np

from engine.geometry import Box
from engine.plan.plan import Plan

Array = np.ndarray[Any, np.dtype[Any]]


class Sink(Protocol):
    """A destination of finished pixels."""

    def missing(self, writes: Iterable[Box] | None = None) -> Iterator[Box]:
        """Boxes that are not written yet, in the plan's order; ``writes``: boxes to look at in place of the plan's."""
        ...

    def write(self, box: Box, pixels: Array, half: Array | None = None) -> None:
        """Write [C, h, w] of ``box``, in the format of the plan; ``half``: the same halved, if it is known."""
        ...

    def finish(self) -> None:
        """Complete the output. Raises ResumeError while a box is missing."""
        ...


class ArraySink:
    """A small image in memory."""

    def __init__(self, plan: Plan) -> None:
        self.pixels: Array = np.zeros((plan.pixels.channels, *plan.size), plan.pixels.dtype)
        self._boxes = plan.writes()

    def missing(self, writes: Iterable[Box] | None = None) -> Iterator[Box]:
        """Every box of the plan, or of ``writes``."""
        return iter(self._boxes if writes is None else writes)

    def write(self, box: Box, pixels: Array, half: Array | None = None) -> None:
        """Write [C, h, w] of ``box``."""
        self.pixels[(slice(None), *box.slices)] = pixels

    def finish(self) -> None:
        """Nothing is left to do."""
