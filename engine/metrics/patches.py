"""Sliced Wasserstein distance between the patches of two pictures, at several scales.

Rabin et al. 2012; as a measure of every scale of a generator, Karras et al., "Progressive Growing of GANs", ICLR 2018. The
patches are 7 x 7 pixels with their colours as they are, of the picture and of the picture reduced 4, 16, ... times (a
super-resolution step each). Their projections onto a direction are a set of numbers; the distance is the mean difference of
two such sets, both sorted, averaged over random directions, in levels of 255.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.metrics.area import AreaMean

PATCH = 7
COUNT = 16384
"""Patches a scale. Two draws of one photograph then differ by about half a level, which is reported as the floor."""

DIRECTIONS = 128
STEP = 4
LEAST = 32
"""A scale needs this many pixels on the shorter side."""

Size = tuple[int, int]
Projections = NDArray[np.float32]
"""[directions, patches], every row sorted."""


def scale_sizes(size: Size) -> list[Size]:
    """(height, width) of the picture at every scale, largest first."""
    sizes = [size]
    while min(sizes[-1]) >= LEAST * STEP:
        sizes.append((round(sizes[-1][0] / STEP), round(sizes[-1][1] / STEP)))
    return sizes


class PatchScales:
    """Takes a picture's rows; ``projections`` are the sorted projections [directions, patches] of every scale.

    Pictures of one size and one ``draw`` are looked at in the same places, so that equal ones are at distance 0.
    """

    def __init__(self, size: Size, draw: int = 0) -> None:
        sizes = scale_sizes(size)
        self._samplers = [_Sampler(s, torch.Generator().manual_seed(draw)) for s in sizes]
        self._reductions = [AreaMean(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]

    def add(self, rows: Tensor) -> None:
        """``rows`` [3, r, W] in [0, 1]."""
        self._samplers[0].add(rows)
        for reduction, sampler in zip(self._reductions, self._samplers[1:], strict=True):
            rows = reduction.add(rows)
            sampler.add(rows)

    def projections(self) -> tuple[Projections, ...]:
        directions = _directions()
        # NumPy sorts numbers without their places, many times faster.
        return tuple(np.sort((directions @ s.patches.T).numpy(), 1) for s in self._samplers)


def distances(a: Sequence[Projections], b: Sequence[Projections]) -> tuple[float, ...]:
    """In levels of 255, of every scale that both have, the full size first."""
    return tuple(float(np.abs(x - y).mean(dtype=np.float64)) * 255 for x, y in zip(a, b, strict=False))


def _directions() -> Tensor:
    """Unit vectors, the same for all pictures: [directions, 3 * 7 * 7]."""
    vectors = torch.randn(DIRECTIONS, 3 * PATCH**2, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(vectors, dim=1)


class _Sampler:
    """Collects patches at random places, which are drawn beforehand, while the rows pass. Holds six rows."""

    def __init__(self, size: Size, generator: torch.Generator) -> None:
        height, width = size
        self._y = torch.randint(height - PATCH + 1, (COUNT,), generator=generator).sort().values
        self._x = torch.randint(width - PATCH + 1, (COUNT,), generator=generator)
        self.patches = torch.empty(COUNT, 3 * PATCH**2)
        self._taken = self._seen = 0
        self._tail = torch.empty(3, 0, width)

    def add(self, rows: Tensor) -> None:
        held = torch.cat([self._tail, rows.float()], 1)
        top = self._seen - self._tail.shape[1]
        self._seen += rows.shape[1]
        last = int(torch.searchsorted(self._y, self._seen - PATCH, right=True))
        y, x = self._y[self._taken : last] - top, self._x[self._taken : last]
        inside = torch.arange(PATCH)
        found = held[:, (y[:, None] + inside)[:, :, None], (x[:, None] + inside)[:, None, :]]  # [3, n, 7, 7]
        self.patches[self._taken : last] = found.transpose(0, 1).flatten(1)
        self._taken = last
        self._tail = held[:, max(0, held.shape[1] - PATCH + 1) :].clone()
