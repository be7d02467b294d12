"""gather: from a block of the source level to a network's input tile.

Adds the noise, applies the border rule and casts, giving [1, C, h, w] channels-last in the stage's dtype.

Border rule (no synthetic halo outside the true border): a tile reaches past the image only at the right and
the bottom, by less than one window, where the frame was padded to a multiple of the window. There the image is
reflected without repeating its edge; noise is reflected with it, because the reference pads after adding noise.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reflect(start: int, stop: int, size: int) -> list[int]:
    """Positions [start, stop) folded into [0, size) by reflection about the first and last position."""
    period = max(1, 2 * (size - 1))
    return [min(p % period, period - p % period) if size > 1 else 0 for p in range(start, stop)]


def gather_torch(
    block: Tensor, rows: list[int], columns: list[int], noise: Tensor | None, sigma: float, device: torch.device | str
) -> Tensor:
    """``block`` [C, h, w] float in [0, 1]; ``rows``, ``columns``: positions in the block, one per output line.

    ``noise`` [C, h, w] standard normal, scaled by ``sigma``; nothing is clipped before the network. Returns float32
    [1, C, len(rows), len(columns)], channels-last, on ``device``.
    """
    tile = block.to(device)
    if noise is not None and sigma:
        tile = tile + sigma * noise
    # Indexing copies; a tile that does not touch the padding is a plain view.
    if rows != list(range(block.shape[1])):
        tile = tile[:, rows]
    if columns != list(range(block.shape[2])):
        tile = tile[:, :, columns]
    return tile[None].contiguous(memory_format=torch.channels_last)
