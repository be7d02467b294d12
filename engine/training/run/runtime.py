"""Runtime of a training: choices that change its result by rounding at most."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from engine.device.memory import free_device, free_host
from engine.training.run.events import Event

SHARE_OF_FREE = 0.8
"""Share of the free memory that an iteration may take by default; single operations need the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """Where a training runs and who hears of it."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Device, as ``engine.device.choose.choose_device`` returns it."""
    resume: bool = False
    """Continue from the checkpoint, if there is one."""
    overwrite: bool = False
    """Replace an existing output file."""
    budget: int | None = None
    """Memory that an iteration may take, bytes; None: most of the free memory."""
    wraps: tuple[bool, bool] = (False, False)
    """Whether sample images of step 1 repeat along (rows, columns); the networks are the same."""
    on_event: Callable[[Event], None] = lambda event: None
    """Called with every event."""
    log: Callable[[str], None] = lambda line: None
    """Called with lines for a person."""

    def budget_bytes(self) -> int:
        """Memory that an iteration may take."""
        if self.budget is not None:
            return self.budget
        free = free_device(self.device)
        return int(SHARE_OF_FREE * (free if free is not None else free_host()))
