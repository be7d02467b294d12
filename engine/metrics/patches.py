"""Sliced Wasserstein distance between the patches of two images, at several scales.

Rabin et al. 2012; as a measure at every scale of a generator, Karras et al., "Progressive Growing of GANs", ICLR 2018. Patches
of 7 x 7 pixels, colours unchanged, are taken from the image and from its reductions by 4, 16, ... (one super-resolution step
each). They are projected onto random directions. The distance is the mean difference of the sorted projections, averaged over
directions, in levels of 255.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.metrics.area import AreaMean, Size

PATCH = 7
"""Side of a patch in pixels."""

COUNT = 16384
"""Patches per scale. Two draws from one photograph then differ by about half a level, which is reported as the floor."""

DIRECTIONS = 128
"""Random projections."""

STEP = 4
"""Reduction from scale to scale."""

MIN_SIDE = 32
"""Shorter side of the smallest scale, in pixels."""

Projections = NDArray[np.float32]
"""[directions, patches], every row sorted."""


def scale_sizes(size: Size) -> list[Size]:
    """Size of the image at every scale, largest first."""
    sizes = [size]
    while min(sizes[-1]) >= MIN_SIDE * STEP:
        sizes.append((round(sizes[-1][0] / STEP), round(sizes[-1][1] / STEP)))
    return sizes


class PatchScales:
    """Consumes the rows of an image and samples patches at every scale."""

    def __init__(self, size: Size, draw: int = 0) -> None:
        """Draw the positions of the patches.

        Args:
            size: (height, width) of the image.
            draw: seed of the positions. Images of one size and one draw are sampled at the same positions, so that equal
                images have distance 0.
        """
        sizes = scale_sizes(size)
        self._samplers = [_Sampler(s, torch.Generator().manual_seed(draw)) for s in sizes]
        self._reductions = [AreaMean(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]

    def add(self, rows: Tensor) -> None:
        """Add the next rows [3, r, W] in [0, 1]."""
        self._samplers[0].add(rows)
        for reduction, sampler in zip(self._reductions, self._samplers[1:], strict=True):
            rows = reduction.add(rows)
            sampler.add(rows)

    def projections(self) -> tuple[Projections, ...]:
        """Sorted projections of every scale, largest first."""
        directions = _directions()
        # NumPy sorts values without their indices, many times faster than torch.
        return tuple(np.sort((directions @ s.patches.T).numpy(), 1) for s in self._samplers)


def distances(a: Sequence[Projections], b: Sequence[Projections]) -> tuple[float, ...]:
    """Distances in levels of every scale that both images have, largest first."""
    return tuple(float(np.abs(x - y).mean(dtype=np.float64)) * 255 for x, y in zip(a, b, strict=False))


def _directions() -> Tensor:
    """Unit vectors [directions, 3 * 7 * 7], the same for all images."""
    vectors = torch.randn(DIRECTIONS, 3 * PATCH**2, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(vectors, dim=1)


class _Sampler:
    """Collects patches at random positions, drawn in advance, while the rows pass. Keeps six rows."""

    def __init__(self, size: Size, generator: torch.Generator) -> None:
        height, width = size
        self._y = torch.randint(height - PATCH + 1, (COUNT,), generator=generator).sort().values
        self._x = torch.randint(width - PATCH + 1, (COUNT,), generator=generator)
        self.patches = torch.empty(COUNT, 3 * PATCH**2)
        self._taken = self._seen = 0
        self._tail = torch.empty(3, 0, width)

    def add(self, rows: Tensor) -> None:
        window = torch.cat([self._tail, rows.float()], 1)
        top = self._seen - self._tail.shape[1]
        self._seen += rows.shape[1]
        last = int(torch.searchsorted(self._y, self._seen - PATCH, right=True))
        y, x = self._y[self._taken : last] - top, self._x[self._taken : last]
        offsets = torch.arange(PATCH)
        patches = window[:, (y[:, None] + offsets)[:, :, None], (x[:, None] + offsets)[:, None, :]]  # [3, n, 7, 7]
        self.patches[self._taken : last] = patches.transpose(0, 1).flatten(1)
        self._taken = last
        self._tail = window[:, max(0, window.shape[1] - PATCH + 1) :].clone()
