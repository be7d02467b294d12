"""Progress on stderr: a bar with an ETA on a terminal, a plain line every few seconds otherwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_LINE_SECONDS = 10.0

console = Console(stderr=True, highlight=False, soft_wrap=True)


class Meter(Protocol):
    """``advance`` takes units of work and a note to show beside them."""

    def advance(self, amount: float, note: str = "") -> None: ...


@dataclass
class _Lines:
    """For logs: one line every ten seconds."""

    title: str
    total: float
    start: float = field(default_factory=time.monotonic)
    done: float = 0.0
    spoken: float = field(default_factory=time.monotonic)

    def advance(self, amount: float, note: str = "") -> None:
        was_done = self.done >= self.total
        self.done += amount
        now = time.monotonic()
        if now - self.spoken < _LINE_SECONDS and (was_done or self.done < self.total):
            return
        self.spoken = now
        spent = now - self.start
        left = spent * max(0.0, self.total - self.done) / self.done if self.done else 0.0
        share = min(1.0, self.done / self.total) if self.total else 1.0
        sys.stderr.write(
            f"{self.title}: {share:4.0%}, {clock(spent)} gone, {clock(left)} left{', ' + note if note else ''}\n"
        )
        sys.stderr.flush()


class _Bar:
    def __init__(self, bar: Progress, task: object) -> None:
        self._bar = bar
        self._task = task

    def advance(self, amount: float, note: str = "") -> None:
        self._bar.update(self._task, advance=amount, note=note)  # type: ignore[arg-type]


@contextmanager
def meter(title: str, total: float) -> Iterator[Meter]:
    """Progress over ``total`` units of work."""
    if not console.is_terminal:
        yield _Lines(title, total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console) as bar:
        yield _Bar(bar, bar.add_task(title, total=total, note=""))


def clock(seconds: float) -> str:
    """ "1:02:03", or "2:03" below an hour."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def log(line: str) -> None:
    """One line for a person, on stderr."""
    console.print(line, markup=False)
