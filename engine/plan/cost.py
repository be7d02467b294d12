"""Projection of a plan's cost, and its comparison with the budget. Knows nothing of tensors.

A projection is a sum of named parts, each measured (networks) or counted (buffers), so that a refusal can name the
largest part, its excess and the remedy. ``engine.plan.tiles`` and ``engine.plan.strips`` make projections.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from engine.errors import BudgetError, counted, option
from engine.pixels import PLAIN, PixelFormat
from engine.plan.measured import Budget, Measured
from engine.plan.plan import Plan
from engine.plan.reduction import ROWS
from engine.plan.sides import Sides

GIB = 1 << 30

CHANNELS = 3
"""Channels of an image while networks run."""

FLOAT = 4
"""Bytes of a float32 value."""

_SHARDS_IN_HAND = 4
"""A shard and its encoded form; its parent in the pyramid and one decoded child."""

_WEIGHTS = 5 * 12
"""Bytes of a column's taps of alpha's filter, and of their positions."""

_DECODER = 8 << 20
"""Threads and caches of libvips while a picture is read: 6 MiB beside one of 640 columns."""

FILL_BYTES = 48 << 20
"""Upper bound of the buffers that fill the colours of transparent pixels, block by block (``engine.io.transparency``)."""


_UNITS = ((GIB, "GiB", 2, GIB // 10), (1 << 20, "MiB", 1, (1 << 20) // 10), (1 << 10, "KiB", 1, 1 << 10))
"""Bytes, name and decimals of each unit, and the least size that it is used for."""


def readable(size: float) -> str:
    """Bytes for people: "1.25 GiB", "12.0 MiB" below a tenth of a GiB, "3.5 KiB" below a tenth of a MiB, "10 bytes"."""
    for unit, name, digits, least in _UNITS:
        if size >= least:
            return f"{size / unit:.{digits}f} {name}"
    return counted(int(size), "byte")


def budget_error(name: str, part: str, *, need: int, limit: int, idle: int, remedy: str) -> BudgetError:
    """Refusal that names the smallest limit that suffices, and a remedy where one can help.

    Args:
        name: option of the limit, memory or vram.
        part: the part of the plan that is refused.
        need: bytes of the smallest plan.
        limit: bytes that it may take.
        idle: bytes that the process takes without a plan.
        remedy: other options that make the plan smaller; they cannot help below ``idle``.
    """
    kind = "VRAM" if name == "vram" else name
    problem = f"{part} needs {readable(need)} of {kind}, more than {readable(limit)}"
    larger = f"give at least {option(name, _round_up(need))}"
    advice = f"{larger}, or use {remedy}" if limit > idle else f"{larger}, as the idle process takes {readable(idle)}"
    return BudgetError(f"{option(name)}: {problem}; {advice}")


def _round_up(size: int) -> str:
    """A round amount, as an option takes it, in which ``size`` bytes fit although idle processes differ by some MiB."""
    mib = (size >> 20) + 16
    return f"{-(-mib // 1024)}GiB" if mib > 8 * 1024 else f"{-(-mib // 64) * 64}MiB"


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """Expected cost of a plan, in bytes and seconds. Tuples have one entry for each stage, first stage first."""

    baseline: int
    """Resident bytes of the idle process with the model loaded."""
    host_parts: dict[str, int]
    """Named parts of the host memory above the baseline."""
    device: int
    """Memory of the accelerator."""
    device_in_fp32: int = 0
    """The same while float32 computes again what half precision cannot represent; at most the budget, within which batches
    become smaller, or strips narrower, if it takes more."""
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
    measuring: int = 0
    """Peak of the process's resident bytes while the plan was measured, which may exceed that of small tiles."""

    @property
    def working(self) -> int:
        """Host memory above the idle process with the model loaded."""
        return sum(self.host_parts.values())

    @property
    def host(self) -> int:
        """Host memory of the process, from its first measurement to the end of the render."""
        return max(self.baseline + self.working, self.measuring)

    @property
    def disk_needed(self) -> int:
        """Upper bound of the disk, for the store and the scratch arrays."""
        return self.disk + self.scratch

    def to_json(self) -> dict[str, Any]:
        """The projection for reports."""
        return {**asdict(self), "working": self.working, "host": self.host}


def within_budget(device: int, in_fp32: int, budget: Budget) -> int:
    """``Projection.device_in_fp32``, from the memory of the plan and from that which float32 would take."""
    return max(device, min(in_fp32, budget.device or 0))


def with_allocator(parts: dict[str, int], fixed: int, share: float) -> dict[str, int]:
    """Add memory that no part counts: tables of the libraries and holes in the heap.

    ``fixed`` bytes and a ``share`` of the parts are upper bounds of the difference that benchmarks/bench_memory.py measures.
    """
    return {**parts, "allocator": fixed + int(share * sum(parts.values()))}


def finishing_parts(measured: Measured, columns: int) -> dict[str, int]:
    """Upper bound of the buffers that reduce and round ``ROWS`` rows of ``columns`` columns, and add their alpha.

    Empty where the last stage's output is the image.
    """
    if measured.is_direct:
        return {}
    reduction = measured.canvas.reduction
    rows, wide = reduction.rows, reduction.columns
    source_rows = math.ceil(ROWS * rows.width) + rows.taps
    source_columns = math.ceil(columns * wide.width) + wide.taps
    # The source rows; the same, reduced in width, before and after the next ones are added, and one tap of them.
    parts = {"reduction": source_rows * (source_columns + 4 * columns) * CHANNELS * FLOAT}
    if measured.pixels.has_alpha:
        # The picture's rows; the same, enlarged in width and in height, and one tap of them; weights of all columns.
        parts["alpha"] = columns * (source_rows * (measured.picture_bytes + 4 * FLOAT) + _WEIGHTS)
    return parts


def source_parts(measured: Measured, base: int, rows: int, columns: int) -> dict[str, int]:
    """Memory of the base image.

    Args:
        measured: measurements; a picture is read from the disk, what step 1 makes is in memory.
        base: pixels of the base image.
        rows, columns: of a picture, that are read at once.
    """
    if measured.picture_digest is None:
        return {"base image": base * CHANNELS * FLOAT}
    fill = FILL_BYTES if measured.pixels.has_alpha else 0
    copies = 2 if any(measured.canvas.wraps) else 1  # parts of a picture that repeats are joined
    tiles = measured.picture_tiles.bytes_of(rows, columns) if measured.picture_tiles is not None else 0
    return {"picture": _DECODER + rows * columns * measured.picture_bytes * copies + tiles + fill}


def writer_bytes(shard: Sides, pixels: PixelFormat = PLAIN) -> int:
    """Memory of a thread that writes shards of these (height, width) in pixels."""
    return _SHARDS_IN_HAND * math.prod(shard) * pixels.bytes


def store_bytes(plan: Plan) -> int:
    """Upper bound of the store's size, with its pyramid."""
    return sum(h * w * plan.pixels.bytes for h, w in plan.pyramid)


def check(plan: Plan, projection: Projection, budget: Budget) -> None:
    """Raise BudgetError when the projection exceeds the budget."""
    smaller = f"{option('tile')} below {min(plan.stages[-1].core)}"
    idle = projection.baseline
    if (need := idle + projection.working) > budget.host:  # what measuring took is over
        largest = max(projection.host_parts, key=lambda k: projection.host_parts[k])
        part = f"the plan (largest part: {largest}, {readable(projection.host_parts[largest])})"
        raise budget_error("memory", part, need=need, limit=budget.host, idle=idle, remedy=smaller)
    if budget.device is not None and projection.device > budget.device:
        need = projection.device
        raise budget_error("vram", "the plan", need=need, limit=budget.device, idle=0, remedy=smaller)
    stored = projection.disk if budget.holds_store else 0
    if stored + projection.scratch > budget.disk:
        raise BudgetError(
            f"disk: the output may take {readable(stored)} and the scratch array "
            f"{readable(projection.scratch)}, more than {readable(budget.disk)} free; make room, write elsewhere, "
            f"or use a smaller {option('size')}"
        )
