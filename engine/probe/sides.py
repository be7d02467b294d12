"""Sides of the tiles and crops that are measured, as a memory limit permits."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from engine.device.memory import device_bytes, resident

BYTES_PER_PIXEL = 24 << 10
"""Bytes for each LR pixel that a network takes at most; RRDBNet with 64 channels takes 12 KiB."""

BYTES_IN_CHUNKS = 6 << 10
"""The same with the tail in chunks."""

BYTES_OF_GRADIENT = 40 << 10
"""The same for the gradient with respect to the input, with activation checkpointing."""

BYTES_OF_STEP_1 = 2 << 10
"""Bytes for each pixel that step 1 takes at most."""


def side_within(
    limit: int | None, largest: int, smallest: int, bytes_per_pixel: int, device: torch.device | None = None
) -> int:
    """``largest``, three quarters of it, a half and so on: the first whose square stays within the limit, or ``smallest``.

    The larger the tile, the less its memory varies with the layout of the heap. Few sides keep the cache small.

    Args:
        limit: bytes of memory that the process may take where it computes; None for any.
        largest: side in pixels that is measured if memory permits.
        smallest: side in pixels below which a measurement says nothing.
        bytes_per_pixel: upper bound of the cost.
        device: device that computes; by default the CPU.
    """
    if limit is None:
        return largest
    held = (device_bytes(device) if device is not None else 0) or resident()
    sides = (part for whole in _halves(largest) for part in (whole, whole * 3 // 4))
    fitting = (side for side in sides if side <= smallest or held + side**2 * bytes_per_pixel <= limit)
    return max(smallest, next(fitting))


def _halves(side: int) -> Iterator[int]:
    """A side, its half, and so on down to 1."""
    while side:
        yield side
        side //= 2
