"""Projection of a plan's cost, and its comparison with the budget. Knows nothing of tensors.

A projection is a sum of named parts, each measured (networks) or counted (buffers), so that a refusal can name the
largest part, its excess and the remedy. ``engine.plan.tiles`` and ``engine.plan.strips`` make projections.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from engine.errors import BudgetError, counted, option
from engine.plan.measured import Budget
from engine.plan.plan import Plan

GIB = 1 << 30

CHANNELS = 3
"""Channels of an image."""

FLOAT = 4
"""Bytes of a float32 value."""

SHARDS_IN_HAND = 4
"""A shard and its encoded form; its parent in the pyramid and one decoded child."""


_UNITS = ((GIB, "GiB", 2, GIB // 10), (1 << 20, "MiB", 1, (1 << 20) // 10), (1 << 10, "KiB", 1, 1 << 10))
"""Bytes, name and decimals of each unit, and the least size that it is used for."""


def readable(size: float) -> str:
    """Bytes for people: "1.25 GiB", "12.0 MiB" below a tenth of a GiB, "3.5 KiB" below a tenth of a MiB, "10 bytes"."""
    for unit, name, digits, least in _UNITS:
        if size >= least:
            return f"{size / unit:.{digits}f} {name}"
    return counted(int(size), "byte")


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """Expected cost of a plan, in bytes and seconds. Tuples have one entry for each stage, first stage first."""

    baseline: int
    """Resident bytes of the idle process with the model loaded."""
    host_parts: dict[str, int]
    """Named parts of the host memory above the baseline."""
    device: int
    """Memory of the accelerator."""
    disk: int
    """Upper bound of the store's size: noise does not compress."""
    scratch: int
    """Upper bound of the scratch arrays' size."""
    tasks: tuple[int, ...]
    """Tiles or strips to run."""
    lr_pixels: tuple[int, ...]
    """Low-resolution pixels that the networks compute, with halos and partial bands."""
    seconds: float
    """Time of the networks."""
    batches: tuple[int, ...] = ()
    """Tiles that run at once; empty where tiles run one by one."""

    @property
    def working(self) -> int:
        """Host memory above the idle process with the model loaded."""
        return sum(self.host_parts.values())

    @property
    def host(self) -> int:
        """Host memory of the process."""
        return self.baseline + self.working

    def to_json(self) -> dict[str, Any]:
        """The projection for reports."""
        return {**asdict(self), "working": self.working, "host": self.host}


def with_allocator(parts: dict[str, int], fixed: int, share: float) -> dict[str, int]:
    """Add memory that no part counts: tables of the libraries and holes in the heap.

    ``fixed`` bytes and a ``share`` of the parts are upper bounds of the difference that benchmarks/bench_memory.py measures.
    """
    return {**parts, "allocator": fixed + int(share * sum(parts.values()))}


def store_bytes(plan: Plan) -> int:
    """Upper bound of the store's size, with its pyramid."""
    return sum(h * w * CHANNELS for h, w in plan.pyramid)


def check(plan: Plan, projection: Projection, budget: Budget) -> None:
    """Raise BudgetError when the projection exceeds the budget."""
    smaller = f"{option('tile')} below {plan.stages[-1].tile}"
    if projection.host > budget.host:
        largest = max(projection.host_parts, key=lambda k: projection.host_parts[k])
        raise BudgetError(
            f"{option('memory')}: the plan needs {readable(projection.host)} of memory, more than "
            f"{readable(budget.host)} (largest part: {largest}, {readable(projection.host_parts[largest])}); "
            f"raise it, or use {smaller}"
        )
    if budget.device is not None and projection.device > budget.device:
        raise BudgetError(
            f"{option('vram')}: the plan needs {readable(projection.device)} of VRAM, more than "
            f"{readable(budget.device)}; raise it, or use {smaller}"
        )
    if projection.disk + projection.scratch > budget.disk:
        raise BudgetError(
            f"disk: the output may take {readable(projection.disk)} and the scratch array "
            f"{readable(projection.scratch)}, more than {readable(budget.disk)} free; make room, write elsewhere, "
            f"or use a smaller {option('size')}"
        )
