"""Measures of small pictures, [3, H, W] in [0, 1]: what a photograph's samples look like as a whole. No trained network.

They are taken at the size of step 1's image. Levels are of 255.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

_RING = 2
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def colour_profile_distance(a: Tensor, b: Tensor) -> float:
    """RMS difference in levels of the mean colour of every row; widths may differ, heights may not.

    In a landscape the height tells what is there, so this asks whether sky is where sky was.
    """
    return float((a.mean(2) - b.mean(2)).square().mean().sqrt()) * 255


@dataclass(frozen=True, slots=True)
class Border:
    """How much brighter, in levels, the outermost two pixels of a side are than the next two: a frame shows as one sign
    on all sides that the photograph does not have."""

    top: float
    right: float
    bottom: float
    left: float

    @classmethod
    def of(cls, picture: Tensor) -> Border:
        ring, turned = _RING, picture.transpose(1, 2)
        sides = (picture, turned.flip(1), picture.flip(1), turned)  # each with its side at the top
        return cls(*(float(s[:, :ring].mean() - s[:, ring : 2 * ring].mean()) * 255 for s in sides))

    @classmethod
    def mean(cls, borders: Sequence[Border]) -> Border:
        return cls(*(sum(getattr(b, side) for b in borders) / len(borders) for side in cls.__slots__))


def diversity(samples: Sequence[Tensor], photograph: Tensor) -> float:
    """SinGAN's diversity (Shaham et al. 2019, sec. 3): the standard deviation over the samples of each pixel's intensity,
    averaged over pixels, divided by the standard deviation of the photograph's intensity. 0: all samples are equal.
    """
    spread = torch.stack([_intensity(s) for s in samples]).std(0, correction=0).mean()
    return float(spread / _intensity(photograph).std(correction=0))


def pairwise_rms(samples: Sequence[Tensor]) -> float:
    """RMS difference in levels of two samples, averaged over all pairs."""
    pairs = [float((a - b).square().mean().sqrt()) for a, b in combinations(samples, 2)]
    return sum(pairs) / len(pairs) * 255


def _intensity(picture: Tensor) -> Tensor:
    return (picture * torch.tensor(_LUMA, dtype=picture.dtype).view(3, 1, 1)).sum(0)
