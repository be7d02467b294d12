"""Tables on stdout."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from engine.errors import printable

MAX_TEXT = 4000
"""Characters of a line or a cell; names and licences come from files."""

_MAX_WIDTH = 1 << 16
"""Columns of the console: wider than any table, so that no line is broken and other programs can read the output."""

_console = Console(width=_MAX_WIDTH, highlight=False, markup=False, emoji=False)


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows of text under a heading, one line per row, in columns as wide as their longest cell.

    Args:
        head: name of each column.
        rows: cells of each row, as many as there are columns.
    """
    table = Table(*head, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(printable(cell, MAX_TEXT) for cell in row))
    _console.print(table)
