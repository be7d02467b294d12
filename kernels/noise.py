"""noise: standard normal numbers addressed by position.

The value at (seed, stream, y, x, c) is a pure function of these five numbers, so tiles that overlap see the same noise,
and neither the tile size, nor their order, nor the canvas changes it. Philox4x32-10 (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011) with key = seed and counter = (x, y, c // 4, stream); its four words make four
normals by the Box-Muller transform, of which channel c takes number c % 4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.geometry import Box

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_MASK = 0xFFFFFFFF


def philox_torch(seed: int, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10. ``counter``: four int64 tensors of one shape holding uint32 values; ``seed``: 64 bits."""
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    c0, c1, c2, c3 = counter
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2**64, which keeps all 64 bits; the mask undoes the sign of the shift.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _uniform(word: Tensor) -> Tensor:
    """uint32 -> the open interval (0, 1), exactly representable in float32."""
    return ((word >> 9).to(torch.float32) + 0.5) * 2.0**-23


def noise_torch(seed: int, stream: int, box: Box, channels: int, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal numbers for the pixels of ``box``.

    ``stream`` separates the uses of one seed (scales of step 1, super-resolution steps). Returns float32 [C, h, w].
    """
    groups = -(-channels // 4)
    shape = (groups, box.height, box.width)
    x = torch.arange(box.x0, box.x1, device=device).expand(shape)
    y = torch.arange(box.y0, box.y1, device=device)[:, None].expand(shape)
    group = torch.arange(groups, device=device)[:, None, None].expand(shape)
    words = philox_torch(seed, (x, y, group, torch.full_like(x, stream)))
    normals = []
    for first, second in (words[:2], words[2:]):
        radius = torch.sqrt(-2.0 * torch.log(_uniform(first)))
        angle = 2.0 * math.pi * _uniform(second)
        normals += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(normals, 1).reshape(groups * 4, box.height, box.width)[:channels]
