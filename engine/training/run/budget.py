"""Refusal of a training whose smallest iteration does not fit the memory that it may take."""

from __future__ import annotations

import torch

from engine.errors import BudgetError, option


def check_budget(name: str, needed: int, budget: int, advice: str, device: torch.device) -> None:
    """Raise BudgetError if the smallest iteration takes more than the budget.

    Args:
        name: the part of the training.
        needed: bytes of its smallest iteration.
        budget: bytes that an iteration may take.
        advice: change that makes an iteration smaller.
        device: device of the networks, which decides the option of the budget.
    """
    if needed > budget:
        limit = option("memory" if device.type == "cpu" else "vram")
        raise BudgetError(
            f"{name}: an iteration takes about {_size(needed)}, {_size(budget)} are allowed; {advice}, or allow more by {limit}"
        )


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 1 << 30 else f"{count / 2**20:.0f} MiB"
