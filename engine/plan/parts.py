"""Parts of a render: shares of a plan's writes, which workers compute apart. Knows nothing of tensors.

The shares follow from the plan and the networks' receptive fields, not from measured times, so they are the same on all machines.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engine.errors import UsageError, option
from engine.plan.layouts import EXECUTORS
from engine.plan.make import project
from engine.plan.measured import Measured
from engine.plan.plan import Plan
from engine.plan.writes import Writes

MAX_PARTS = 10_000
"""Largest number of parts."""


@dataclass(frozen=True, slots=True)
class Part:
    """One of several parts of a render."""

    number: int
    """From 1 to ``count``."""
    count: int
    """Number of parts."""

    def __str__(self) -> str:
        """``NUMBER/COUNT``, as the command line takes it."""
        return f"{self.number}/{self.count}"


def parse_part(value: object, name: str = "part") -> Part:
    """Part from a text such as ``2/4``, or a part. Raises UsageError for another form or numbers out of range."""
    if isinstance(value, Part):
        return value
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", value) if isinstance(value, str) else None
    if match is None:
        raise UsageError(f"{option(name, value)}: not a part; write NUMBER/COUNT, such as 2/4")
    part = Part(int(match[1]), int(match[2]))
    if not 1 <= part.count <= MAX_PARTS:
        raise UsageError(f"{option(name, part)}: the number of parts must be from 1 to {MAX_PARTS}")
    if not 1 <= part.number <= part.count:
        raise UsageError(f"{option(name, part)}: parts are counted from 1 to {part.count}; give one of these")
    return part


@dataclass(frozen=True, slots=True)
class Shares:
    """Division of a plan's writes: part k has those from ``bounds[k - 1]`` to ``bounds[k]``, in the plan's order."""

    bounds: tuple[int, ...]
    """Half-open ranges; a range is empty where there are more parts than writes."""

    @classmethod
    def of(cls, plan: Plan, measured: Measured, count: int) -> Shares:
        """The division into ``count`` parts whose largest takes the least work."""
        return cls(EXECUTORS[plan.executor].layout.shares(plan, measured, count))

    @property
    def count(self) -> int:
        """Number of parts."""
        return len(self.bounds) - 1

    @property
    def parts(self) -> Iterator[Part]:
        """All parts."""
        return (Part(number, self.count) for number in range(1, self.count + 1))

    def writes(self, plan: Plan, part: Part) -> Writes:
        """Boxes that a part writes, in the plan's order."""
        return plan.writes()[self.bounds[part.number - 1] : self.bounds[part.number]]

    def overhead(self, plan: Plan, measured: Measured) -> float:
        """Time of the networks in all parts beyond that of one run, as a share of it.

        Each part makes the base image. Bands repeat the rows beyond a cut that are read, in all stages. Tiles of inner stages
        are shared, as far as one part does not need them while another computes them.
        """
        one = project(plan, measured)
        parts = [project(plan, measured, w.rectangles) for part in self.parts if (w := self.writes(plan, part))]
        pixels = [sum(counts) for counts in zip(*(part.lr_pixels for part in parts), strict=True)]
        if not plan.is_banded:
            pixels[:-1] = one.lr_pixels[:-1]
        costs = [stage.bands if plan.is_banded else stage.footprint for stage in measured.stages]
        more = (len(parts) - 1) * (math.prod(plan.base) * measured.base.seconds_per_pixel if measured.base else 0.0)
        for cost, after, before in zip(costs, pixels, one.lr_pixels, strict=True):
            assert cost is not None
            more += (after - before) * cost.seconds_per_pixel
        return more / one.seconds

    def to_json(self) -> list[int]:
        """The stored form."""
        return list(self.bounds)

    @classmethod
    def from_json(cls, stored: object, plan: Plan) -> Shares:
        """The division of its stored form. Raises ValueError when it is none of ``plan``."""
        total = len(plan.writes())
        if not (isinstance(stored, Sequence) and len(stored) > 1 and all(type(bound) is int for bound in stored)):
            raise ValueError(f"{stored!r} divides no plan")
        bounds = tuple(stored)
        if (bounds[0], bounds[-1]) != (0, total) or list(bounds) != sorted(bounds):
            raise ValueError(f"{stored!r} does not divide {total} writes")
        return cls(bounds)
