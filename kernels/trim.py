"""trim: from a network's output tile to the pixels that are kept.

Cuts the core out of the halo, refuses NaN and infinity, clamps to [0, 1] and, for the last level, quantises to uint8
with round-half-even. Inner levels stay float32: rounding between the steps would be amplified by the next one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.geometry import Box


def trim_torch(output: Tensor, core: Box, quantise: bool) -> tuple[Tensor, int]:
    """``output`` [1, C, H, W]; ``core``: the kept rectangle in its coordinates.

    Returns the core as uint8 (``quantise``) or float32 [C, h, w], and the number of values that were not finite.
    """
    kept = output[0][:, core.y0 : core.y1, core.x0 : core.x1].float()
    bad = kept.numel() - int(torch.isfinite(kept).sum())
    kept = kept.clamp(0.0, 1.0)
    if quantise:
        return (kept * 255.0).round().to(torch.uint8).contiguous(), bad
    return kept.contiguous(), bad
