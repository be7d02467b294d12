"""Rows of a segment's values behind some rows of its output: the others need not be computed.

A stream that begins inside a picture computes a triangle above its first row: few rows of an operation near the output, and a
receptive field of rows of the first one. It ends with the same triangle below its last row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

from engine.bands.graph import RowGraph, Schedule
from engine.bands.rules import Rows, Rule

Range = tuple[int, int]
"""Half-open range of rows."""


@dataclass(frozen=True, slots=True)
class Needs:
    """Rows of each value of a segment that are needed, all in the picture."""

    ranges: Mapping[str, Range]
    """Name of a value -> its rows, in its own resolution."""
    inner: Range
    """Rows of the input within which a band adds only rows that are needed, to all values."""

    def of(self, name: str, rows: Rows) -> Rows:
        """Rows of a value with those that are needed in place of those in the picture."""
        low, high = self.ranges[name]
        return replace(rows, low=low, high=high)


def needs_of(graph: RowGraph, schedule: Schedule, output: Range, picture: Range) -> Needs:
    """Needs of a segment.

    Args:
        graph: operations of the segment.
        schedule: their delays.
        output: rows of its output that are needed.
        picture: rows of its input in the picture.
    """
    ranges = {graph.output: output}
    for op in reversed(graph.ops):
        for index, name in enumerate(op.inputs):
            read = _read(op.rule, index, schedule.read[op.name], ranges[op.name])
            for member in graph.members(name):
                low, high = (int(y * graph.values[member].rate) for y in picture)
                ranges[member] = union(ranges.get(member), (max(low, read[0]), min(high, read[1])))
    tops, bottoms = zip(*(_band(graph, schedule, op.name, ranges[op.name]) for op in graph.ops), strict=True)
    return Needs(ranges, (math.ceil(max(tops)), math.floor(min(bottoms))))


def union(one: Range | None, other: Range) -> Range:
    """The smallest range that holds both."""
    return other if one is None else (min(one[0], other[0]), max(one[1], other[1]))


def _read(rule: Rule, index: int, delay: int, rows: Range) -> Range:
    """Rows of an input, in whole cells of the rule's grid, behind rows of the output."""
    reach, (period, _) = rule.reach_of(index), rule.grid
    first, last = math.floor(rows[0] / rule.factor) - reach, math.ceil(rows[1] / rule.factor) + reach
    return first - (first + delay) % period, last + -(last + delay) % period


def _band(graph: RowGraph, schedule: Schedule, name: str, rows: Range) -> tuple[Fraction, Fraction]:
    """Input rows that are new in the bands that add these rows of a value."""
    delay, rate = schedule.delay[name], graph.values[name].rate
    return (rows[0] + delay) / rate, (rows[1] + delay) / rate
