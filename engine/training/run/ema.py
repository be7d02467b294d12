"""Exponential moving average (EMA) of a network's weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Ema:
    """EMA of weights that training moves. ``values`` starts as a copy of the weights and keeps their order."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self._weights = list(weights)
        self.values = [weight.detach().clone() for weight in self._weights]

    @torch.no_grad()
    def update(self, share: float) -> None:
        """Move the average towards the weights by ``share`` of the difference: 1 - decay."""
        for value, weight in zip(self.values, self._weights, strict=True):
            value.lerp_(weight, share)

    @torch.no_grad()
    def copy_to_weights(self) -> None:
        """Replace the weights by their average."""
        for value, weight in zip(self.values, self._weights, strict=True):
            weight.copy_(value)

    def load(self, values: Iterable[Tensor]) -> None:
        """Continue from the ``values`` of a checkpoint."""
        for value, saved in zip(self.values, values, strict=True):
            value.copy_(saved)
