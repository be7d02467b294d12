"""A table on stdout."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from engine.cli import report


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns as wide as their texts; lines are never broken, so that other programs can read them."""
    lines = [tuple(head), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        report.line("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
