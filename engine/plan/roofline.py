"""Time of a network on a GPU that nobody measured: a roofline of counted operations. Knows nothing of tensors.

Operations run one after another, so each is held to the ceiling that binds it, and their times are added: products to the
arithmetic, passes over maps to the memory, small ones to the launch. Caches are ignored, and so is everything but the network:
copies to the host, compression, the disk. A measured time below the forecast, or far above it, refutes it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from engine.plan.gpus import Gpu

LAUNCH_SECONDS = 1.5e-6
"""Least time of a kernel in a recorded graph: an assumption."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One kernel that was counted."""

    flops: int
    """Floating-point operations of a matrix product or a convolution; 0 for passes over maps."""
    bytes: int
    """Bytes of the operands and the result, each once."""
    is_half: bool
    """Whether its products are of half precision."""


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds by the ceiling that binds."""

    arithmetic: float = 0.0
    traffic: float = 0.0
    launches: float = 0.0

    @property
    def total(self) -> float:
        """Seconds in all."""
        return self.arithmetic + self.traffic + self.launches

    @property
    def shares(self) -> dict[str, float]:
        """Share of each ceiling, the largest first."""
        shares = {name: seconds / (self.total or 1.0) for name, seconds in asdict(self).items()}
        return dict(sorted(shares.items(), key=lambda item: -item[1]))

    def scaled(self, factor: float) -> Times:
        """The same work ``factor`` times."""
        return Times(self.arithmetic * factor, self.traffic * factor, self.launches * factor)

    @classmethod
    def sum(cls, parts: Iterable[Times]) -> Times:
        """All parts, one after another."""
        columns = zip(*((t.arithmetic, t.traffic, t.launches) for t in parts), strict=True)
        return cls(*map(sum, columns))


@dataclass(frozen=True, slots=True)
class Counts:
    """Operations of a network, counted on an input of ``pixels`` LR pixels."""

    pixels: int
    operations: tuple[Operation, ...]

    @property
    def launches(self) -> int:
        """Kernels of a batch, whatever its size."""
        return len(self.operations)

    @property
    def flops_per_pixel(self) -> float:
        """Floating-point operations for each LR pixel."""
        return sum(op.flops for op in self.operations) / self.pixels

    @property
    def bytes_per_pixel(self) -> float:
        """Bytes that operations read and write for each LR pixel."""
        return sum(op.bytes for op in self.operations) / self.pixels

    def times(self, gpu: Gpu, pixels: int) -> Times:
        """Times of a batch of ``pixels`` LR pixels."""
        ratio, arithmetic, traffic, launches = pixels / self.pixels, 0.0, 0.0, 0.0
        for op in self.operations:
            flops = op.flops * ratio / ((gpu.half if op.is_half else gpu.single) * 1e12)
            moved = op.bytes * ratio / (gpu.bandwidth * 1e9)
            longest = max(flops, moved, LAUNCH_SECONDS)
            if longest == LAUNCH_SECONDS:
                launches += longest
            elif longest == flops:
                arithmetic += longest
            else:
                traffic += longest
        return Times(arithmetic, traffic, launches)

    def to_json(self) -> dict[str, Any]:
        """The counts for reports."""
        return {
            "flops_per_pixel": self.flops_per_pixel,
            "bytes_per_pixel": self.bytes_per_pixel,
            "launches": self.launches,
        }
