"""Report of a render: its progress, its measured cost, and its result."""

from __future__ import annotations

from dataclasses import dataclass

from engine.io.objects import Place
from engine.plan.cost import Projection
from engine.plan.plan import Plan


@dataclass(frozen=True, slots=True)
class Progress:
    """State of a render after a network has run."""

    done: int
    """LR pixels that the networks have computed."""
    total: int
    """LR pixels of this run; a resumed run computes the missing ones."""
    step: int
    """Super-resolution step that has just run: 2 to 4."""
    share: float
    """Share of the expected time of this run, 0 to 1: steps differ in cost per pixel, and step 1 comes before them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """Measured cost of a render."""

    seconds: float
    """Time from the first box to the last."""
    compute_seconds: float
    """Part of it in networks."""
    write_seconds: float
    """Time to compress and write, part of it while networks ran."""
    writes: int
    """Boxes that were written."""
    host_peak: int
    """Peak of the process's resident bytes since its start."""
    working_peak: int
    """Peak of the render above the idle process with the model loaded."""
    device_peak: int
    """Peak of the accelerator's memory in bytes; 0 without one."""
    tiles_redone_in_fp32: int
    """Tiles, or rows of shards of a strip, that half precision could not represent."""
    cores: tuple[int | list[int], ...]
    """Tile of every stage as it really ran, in LR pixels: a side, or [rows, columns]."""
    seam_error_levels: float | None
    """Largest seam error in levels of 255; 0.0 if exact, None if not measured."""


@dataclass(frozen=True, slots=True)
class RenderResult:
    """A finished render."""

    path: Place
    """Folder or URL of the store."""
    plan: Plan
    """Fields that decided its pixels."""
    projection: Projection
    """Expected cost."""
    measurements: Measurements
    """Measured cost."""
