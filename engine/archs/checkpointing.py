"""Activation checkpointing of a network's trunk, for training and for gradients with respect to the input."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from engine.archs import Trainable


def checkpoint_blocks(network: Trainable) -> None:
    """Apply activation checkpointing to every block of the trunk, in place."""
    for block in network.blocks:
        block.forward = _CheckpointedForward(block.forward)


class _CheckpointedForward:
    """A block's ``forward`` that keeps its input alone and computes again in the backward pass."""

    def __init__(self, forward: Callable[[Tensor], Tensor]) -> None:
        self._forward = forward

    def __call__(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(self._forward, x, use_reentrant=False, preserve_rng_state=False)
        return result
