"""Trial of a training before it starts: duration of its iterations, size of its checkpoint, and room on the disk.

A trial runs a few iterations of a trainer that is thrown away afterwards, and writes nothing.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from engine.errors import BudgetError, option
from engine.training.run.events import Forecast, Forecasted
from engine.training.run.loop import Trainer
from engine.training.run.runtime import Runtime

MEASURED_SECONDS = 1.0
"""Iterations of a phase are measured until they take this long together."""
MEASURED_ITERATIONS = 3
"""Iterations of a phase that are measured at most; the first one only if it is the only one."""
DISK_RESERVE = 32 << 20
"""Bytes on the disk for logs and sample images."""


def measure(trainer: Trainer) -> tuple[tuple[float, ...], int]:
    """Measure a trainer that is thrown away afterwards.

    Returns:
        Seconds of an iteration of each phase, and the bytes of the largest checkpoint.
    """
    seconds, size = [], 0
    for _ in trainer.totals:
        trainer.begin()
        seconds.append(_seconds_of_iteration(trainer))
        size = max(size, sum(tensor.nbytes for tensor in _tensors(trainer.state())))
        trainer.end()
    return tuple(seconds), size


def announce(forecasts: Sequence[Forecast], folder: Path, runtime: Runtime) -> None:
    """Check the free disk space, and emit the forecasts.

    Args:
        forecasts: parts of a training in their order.
        folder: work folder, or the folder in which it will be made.
        runtime: receives the event.

    Raises:
        BudgetError: the results of all parts and the work files of one do not fit the disk.
    """
    needed = sum(forecast.result_bytes for forecast in forecasts) + DISK_RESERVE
    needed += max((forecast.work_bytes for forecast in forecasts), default=0)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise BudgetError(
            f"{folder}: a training takes about {needed / 2**30:.2f} GiB of disk ({free / 2**30:.2f} GiB are free); "
            f"make room or choose another {option('out')}"
        )
    runtime.on_event(Forecasted(tuple(forecasts)))


def _seconds_of_iteration(trainer: Trainer) -> float:
    seconds: list[float] = []
    while len(seconds) < MEASURED_ITERATIONS and sum(seconds) < MEASURED_SECONDS:
        started = time.perf_counter()
        trainer.iterate()
        seconds.append(time.perf_counter() - started)
    measured = seconds[1:] or seconds
    return sum(measured) / len(measured)


def _tensors(state: object) -> Iterable[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _tensors(value)
