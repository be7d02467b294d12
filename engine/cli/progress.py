"""Progress on stderr: a bar with the remaining time on a terminal, otherwise a line every ten seconds; nothing if quiet."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TaskProgressColumn, TextColumn
from rich.text import Text

_SECONDS_PER_LINE = 10.0

_FORECAST_WEIGHT = 0.02
"""Share of the work after which the measured speed counts as much as the forecast.

At a tenth of the work, a forecast that is wrong by a factor of 2 leaves an error of 17 % or less.
"""

console = Console(stderr=True, highlight=False, soft_wrap=True)
"""Terminal of progress and notes; ``console.quiet`` silences it."""

_warnings = Console(stderr=True, highlight=False, soft_wrap=True)


class Meter(Protocol):
    """Receiver of progress."""

    def advance(self, amount: float, note: str = "", left: float | None = None) -> None:
        """Add ``amount`` units of work and show ``note`` beside them; ``left``: seconds left, if the work knows them."""


@dataclass
class Estimate:
    """Time left of work that may have begun in an earlier run.

    Until enough is measured, the forecast counts. The time before the first progress is not measured where that progress
    is small: it was loading, which is not repeated.
    """

    total: float
    """Units of work."""

    done: float = 0.0
    """Units of work that are finished, at first by earlier runs."""

    forecast: float | None = None
    """Expected seconds of this run; None if nothing is known."""

    now: Callable[[], float] = time.monotonic
    """Clock, in seconds."""

    begun: float = field(init=False)
    """Time of the start."""

    _before: float = field(init=False)
    """Units that earlier runs finished."""

    _first: tuple[float, float] | None = field(default=None, init=False)
    """Time and finished units at the start of what is measured."""

    _last: float = field(init=False)
    """Time of the last progress."""

    _told: float | None = field(default=None, init=False)
    """Seconds that were left at that time, if the work knew them."""

    def __post_init__(self) -> None:
        self.begun = self._last = self.now()
        self._before = self.done

    def advance(self, amount: float, left: float | None = None) -> None:
        """Add finished units; ``left``: seconds to the end, if the work knows them."""
        self.done, self._last, self._told = min(self.total, self.done + amount), self.now(), left
        if self._first is None:
            is_small = self.done - self._before < _FORECAST_WEIGHT * (self.total - self._before)
            self._first = (self._last, self.done) if is_small else (self.begun, self._before)

    @property
    def share(self) -> float:
        """Share of the work that is finished, 0 to 1."""
        return self.done / self.total if self.total else 1.0

    @property
    def elapsed(self) -> float:
        """Seconds since the start of this run."""
        return self.now() - self.begun

    @property
    def left(self) -> float | None:
        """Seconds to the end; None while nothing is known."""
        if self._told is not None:
            return max(0.0, self._told - (self.now() - self._last))
        started, first = self._first or (self._last, self.done)
        measured, seconds = self.done - first, self._last - started
        if self.forecast is None:
            expected, weight = (self.total - self._before), 0.0
        else:
            expected, weight = self.forecast, _FORECAST_WEIGHT * self.forecast
        per_unit = expected / max(self.total - self._before, 1e-9)  # seconds, as forecast
        known = weight + per_unit * measured
        if known <= 0:
            return self.forecast
        at_last = per_unit * (self.total - self.done) * (weight + seconds) / known
        return max(0.0, at_last - (self.now() - self._last))


@dataclass
class _Silence:
    """No progress."""

    def advance(self, amount: float, note: str = "", left: float | None = None) -> None:
        pass


@dataclass
class _Lines:
    """Progress for logs: one line every ten seconds, and one at the end."""

    title: str
    """Name of the work, at the start of every line."""

    estimate: Estimate

    last_line: float = field(default_factory=time.monotonic)
    """Time of the last line, in seconds."""

    note: str = ""

    def advance(self, amount: float, note: str = "", left: float | None = None) -> None:
        was_done = self.estimate.share >= 1
        self.estimate.advance(amount, left)
        self.note = note or self.note
        now = time.monotonic()
        if now - self.last_line < _SECONDS_PER_LINE and (was_done or self.estimate.share < 1):
            return
        self.last_line = now
        parts = [
            f"{self.estimate.share:4.0%}",
            f"{clock(self.estimate.elapsed)} elapsed",
            _left(self.estimate),
            self.note,
        ]
        log(f"{self.title}: {', '.join(part for part in parts if part)}")


@dataclass
class _Bar:
    """Progress for a terminal: one bar."""

    progress: Progress
    task: TaskID
    estimate: Estimate
    note: str = ""

    def advance(self, amount: float, note: str = "", left: float | None = None) -> None:
        self.estimate.advance(amount, left)
        self.note = note or self.note
        self.progress.update(self.task, completed=self.estimate.done, note=self.note)


class _Times(ProgressColumn):
    """Elapsed and remaining time, also between two reports of progress."""

    def __init__(self, estimate: Estimate) -> None:
        super().__init__()
        self._estimate = estimate

    def render(self, task: Task) -> Text:
        left = _left(self._estimate)
        return Text(f"{clock(self._estimate.elapsed)} elapsed" + (f", {left}" if left else ""))


@contextmanager
def meter(title: str, total: float, *, done: float = 0.0, forecast: float | None = None) -> Iterator[Meter]:
    """Show progress while the context lasts; it ends with 100 % unless an exception leaves the context.

    Args:
        title: name of the work.
        total: units of work.
        done: units that an earlier run finished.
        forecast: expected seconds of this run.
    """
    estimate = Estimate(total, done, forecast)
    if console.quiet:
        yield _Silence()
    elif console.is_terminal:
        columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), _Times(estimate)
        with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress:
            bar = _Bar(progress, progress.add_task(title, total=total, visible=False, note=""), estimate)
            progress.update(bar.task, completed=done, visible=True)
            yield bar
            bar.advance(total - estimate.done)
    else:
        lines = _Lines(title, estimate)
        yield lines
        if estimate.share < 1:
            lines.advance(total - estimate.done)


def part_of_meter(bar: Meter, units: float) -> Callable[[float, str], None]:
    """Function (share, note) that moves a meter to a share of ``units`` units of work; it does not move backwards."""
    before = 0.0

    def move(share: float, note: str = "") -> None:
        nonlocal before
        bar.advance(max(0.0, share - before) * units, note)
        before = max(before, share)

    return move


def by_count(bar: Meter) -> Callable[[int, int], None]:
    """Callback of (done, total) that moves a meter of one unit of work."""
    move = part_of_meter(bar, 1.0)
    return lambda done, total: move(done / total, "")


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


def _left(estimate: Estimate) -> str:
    left = estimate.left
    return "" if left is None else f"{clock(left)} left"


def log(line: str) -> None:
    """Print a note on stderr, unless quiet."""
    console.print(line, markup=False)


def warn(line: str) -> None:
    """Print a warning on stderr, also if quiet."""
    _warnings.print(f"warning: {line}", markup=False)
