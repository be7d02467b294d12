"""Progress on stderr: a bar with the remaining time on a terminal, otherwise a line every ten seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

_SECONDS_PER_LINE = 10.0

console = Console(stderr=True, highlight=False, soft_wrap=True)


class Meter(Protocol):
    """Receiver of progress."""

    def advance(self, amount: float, note: str = "", left: float | None = None) -> None:
        """Add ``amount`` units of work and show ``note`` beside them; ``left``: seconds to the end, if they are known."""


@dataclass
class _Lines:
    """Progress for logs: one line every ten seconds, and one at the end."""

    title: str
    """Name of the work, at the start of every line."""

    total: float
    """Units of work."""

    done: float = 0.0
    """Units of work that are finished."""

    start: float = field(default_factory=time.monotonic)
    """Time of the start, in seconds."""

    last_line: float = field(default_factory=time.monotonic)
    """Time of the last line, in seconds."""

    def advance(self, amount: float, note: str = "", left: float | None = None) -> None:
        was_done = self.done >= self.total
        self.done += amount
        now = time.monotonic()
        is_last = self.done >= self.total and not was_done
        if now - self.last_line < _SECONDS_PER_LINE and not is_last:
            return
        self.last_line = now
        elapsed = now - self.start
        if left is None:
            left = elapsed * max(0.0, self.total - self.done) / self.done if self.done else 0.0
        share = min(1.0, self.done / self.total) if self.total else 1.0
        times = f"{clock(elapsed)} elapsed, {clock(left)} left"
        sys.stderr.write(f"{self.title}: {share:4.0%}, {times}{', ' + note if note else ''}\n")
        sys.stderr.flush()


@dataclass
class _Bar:
    """Progress for a terminal: one bar."""

    progress: Progress
    task: TaskID

    def advance(self, amount: float, note: str = "", left: float | None = None) -> None:
        self.progress.update(self.task, advance=amount, note=note, left=left)


class _TimeLeft(TimeRemainingColumn):
    """The remaining time that the work itself knows, or that of rich."""

    def render(self, task: Task) -> Text:
        left = task.fields["left"]
        return super().render(task) if left is None else Text(clock(left), style="progress.remaining")


@contextmanager
def meter(title: str, total: float) -> Iterator[Meter]:
    """Show progress over ``total`` units of work while the context lasts."""
    if not console.is_terminal:
        yield _Lines(title, total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        _TimeLeft(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        yield _Bar(progress, progress.add_task(title, total=total, note="", left=None))


def clock(seconds: float) -> str:
    """Format seconds as ``1:02:03``, or ``2:03`` below an hour."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def duration(seconds: float) -> str:
    """Format a forecast: ``40 s``, ``12 min``, or ``1:20:00`` from an hour on, rounded to minutes."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else clock(60 * minutes)


def log(line: str) -> None:
    """Print one line on stderr."""
    console.print(line, markup=False)
