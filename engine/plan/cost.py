"""What a plan costs and what it may cost. Knows nothing of tensors.

A projection is a sum of named parts, each measured (the networks) or counted (buffers), so that a refusal can say what
is too large, by how much, and what to do. ``tiles`` and ``bands`` choose what fits and project it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from engine.errors import BudgetError
from engine.plan.measured import Footprint
from engine.plan.plan import Plan

GIB = 1 << 30

CHANNELS = 3
FLOAT = 4

SHARDS_IN_HAND = 4
"""A shard and its encoded form; its parent in the pyramid and one decoded child."""


def readable(size: float) -> str:
    """Bytes for people: "1.25 GiB", or "12.0 MiB" below a tenth of that."""
    return f"{size / GIB:.2f} GiB" if size >= GIB // 10 else f"{size / (1 << 20):.1f} MiB"


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits in bytes. ``host``: resident memory of the process; ``device``: memory of the accelerator, if any."""

    host: int
    device: int | None
    disk: int


@dataclass(frozen=True, slots=True)
class BandCost:
    """What streaming a network in bands of ``band`` rows costs: bytes for each LR column, seconds for each LR pixel.

    What operations make on the way is bounded (``fixed``) where the strip is wide, and grows with it where it is narrow.
    """

    band: int
    bytes_per_column: float
    seconds_per_pixel: float
    fixed: int = 0
    narrow_bytes_per_column: float = math.inf

    def bytes_at(self, columns: int) -> int:
        """Of a strip of so many LR columns."""
        return int(min(self.narrow_bytes_per_column * columns, self.fixed + self.bytes_per_column * columns))


@dataclass(frozen=True, slots=True)
class StageCost:
    """What is known about running a stage's network, and whether it runs on an accelerator. ``bands``: None when it
    cannot be streamed. ``inputs``: channels that it takes.
    """

    footprint: Footprint
    on_device: bool
    bands: BandCost | None = None
    inputs: int = CHANNELS


@dataclass(frozen=True, slots=True)
class Projection:
    """What a plan is expected to cost. Bytes and seconds; ``pieces``: tiles or strips to run, ``pixels``: LR pixels that
    the networks then take in, ``batches``: tiles at a time (of the executor stream), all per stage.
    """

    baseline: int
    host_parts: dict[str, int]
    device: int
    disk: int
    scratch: int
    pieces: tuple[int, ...]
    pixels: tuple[int, ...]
    seconds: float
    batches: tuple[int, ...] = ()

    @property
    def working(self) -> int:
        """Host memory above the idle process with the model loaded."""
        return sum(self.host_parts.values())

    @property
    def host(self) -> int:
        return self.baseline + self.working

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "working": self.working, "host": self.host}


def with_allocator(parts: dict[str, int], fixed: int, share: float) -> dict[str, int]:
    """The parts of the host's memory and, last, what they do not see: a fixed amount and a share of the rest for tables of
    the libraries and holes in the heap, upper bounds of what benchmarks/bench_memory.py measures.
    """
    return {**parts, "allocator": fixed + int(share * sum(parts.values()))}


def store_bytes(plan: Plan) -> int:
    """Upper bound: noise does not compress."""
    return sum(h * w * CHANNELS for h, w in plan.levels)


def check(plan: Plan, projection: Projection, budget: Budget) -> None:
    """Raise BudgetError when the projection exceeds the budget."""
    if projection.host > budget.host:
        largest = max(projection.host_parts, key=lambda k: projection.host_parts[k])
        raise BudgetError(
            f"the plan needs {readable(projection.host)} of memory (largest part: {largest}, "
            f"{readable(projection.host_parts[largest])}), --memory allows {readable(budget.host)}; "
            f"raise it or use a --tile below {plan.stages[-1].core}"
        )
    if budget.device is not None and projection.device > budget.device:
        raise BudgetError(
            f"the plan needs {readable(projection.device)} of VRAM, --vram allows {readable(budget.device)}; "
            f"raise it or use a --tile below {plan.stages[-1].core}"
        )
    if projection.disk + projection.scratch > budget.disk:
        raise BudgetError(
            f"the output may take {readable(projection.disk)} and the scratch array {readable(projection.scratch)}, "
            f"the disk has {readable(budget.disk)} free; make room, write elsewhere or use a smaller --size"
        )
