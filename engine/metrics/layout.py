"""Measures of layout and diversity, taken on images reduced to the size of step 1's image.

Images are [3, H, W] in [0, 1], levels are of 255, and no trained network is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

_RING = 2  # width of a border ring in pixels
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def colour_profile_distance(a: Tensor, b: Tensor) -> float:
    """RMS difference of the rows' mean colours, in levels.

    In a landscape the height determines the content, so this tells whether the sky is where it was. Heights must be equal,
    widths may differ.
    """
    return float((a.mean(2) - b.mean(2)).square().mean().sqrt()) * 255


@dataclass(frozen=True, slots=True)
class Border:
    """Brightness of the outermost two pixels of each side minus that of the next two, in levels.

    A frame shows as one sign on all sides that the photograph does not have.
    """

    top: float
    right: float
    bottom: float
    left: float

    @classmethod
    def of(cls, picture: Tensor) -> Border:
        """Measure an image [3, H, W] in [0, 1]."""
        ring, turned = _RING, picture.transpose(1, 2)
        sides = (picture, turned.flip(1), picture.flip(1), turned)  # each turned so that its side is at the top
        return cls(*(float(s[:, :ring].mean() - s[:, ring : 2 * ring].mean()) * 255 for s in sides))

    @classmethod
    def mean(cls, borders: Sequence[Border]) -> Border:
        """Average side by side."""
        return cls(*(sum(getattr(b, side) for b in borders) / len(borders) for side in cls.__slots__))


def diversity(samples: Sequence[Tensor], photograph: Tensor) -> float:
    """SinGAN's diversity (Shaham et al., ICCV 2019, sec. 3); 0 for equal samples.

    The standard deviation of each pixel's intensity over the samples, averaged over pixels and divided by the standard
    deviation of the photograph's intensity.
    """
    spread = torch.stack([_intensity(s) for s in samples]).std(0, correction=0).mean()
    return float(spread / _intensity(photograph).std(correction=0))


def pairwise_rms(samples: Sequence[Tensor]) -> float:
    """RMS difference of two samples in levels, averaged over all pairs."""
    pairs = [float((a - b).square().mean().sqrt()) for a, b in combinations(samples, 2)]
    return sum(pairs) / len(pairs) * 255


def _intensity(picture: Tensor) -> Tensor:
    return (picture * torch.tensor(_LUMA, dtype=picture.dtype).view(3, 1, 1)).sum(0)
