"""Frechet distance of two Gaussians, and streaming moments of feature vectors, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Matrix = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Gaussian:
    """Gaussian fitted to feature vectors of C channels."""

    mean: Matrix
    """[C]."""

    covariance: Matrix
    """[C, C]."""

    count: int
    """Number of vectors."""


class Moments:
    """Streaming mean and covariance, merged as in Chan, Golub and LeVeque (1983), without cancellation."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self._mean = np.zeros(channels)
        self._scatter = np.zeros((channels, channels))

    def add(self, features: Tensor) -> None:
        """Add a feature map [1, C, h, w]; every position is one vector."""
        vectors = features[0].flatten(1).cpu().double().numpy()  # [C, n]
        count = vectors.shape[1]
        mean = vectors.mean(1)
        centred = vectors - mean[:, None]
        total = self.count + count
        step = mean - self._mean
        self._scatter += centred @ centred.T + np.outer(step, step) * (self.count * count / total)
        self._mean += step * (count / total)
        self.count = total

    def gaussian(self) -> Gaussian:
        """The Gaussian with the unbiased covariance, as in the reference code; the covariance of one vector is zero."""
        return Gaussian(self._mean.copy(), self._scatter / max(1, self.count - 1), self.count)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2)   (Dowson and Landau, 1982).

    With S = A A^T the trace of the root is the sum of the singular values of A^T B. This form stays exact for singular
    covariances (fewer vectors than channels), where the square root of S_a S_b loses half of the digits.
    """
    shift = a.mean - b.mean
    singular = np.linalg.svd(_root(a.covariance).T @ _root(b.covariance), compute_uv=False)
    spread = np.trace(a.covariance) + np.trace(b.covariance) - 2 * singular.sum()
    return float(shift @ shift + max(0.0, spread))


def _root(covariance: Matrix) -> Matrix:
    """A with A A^T = S; eigenvalues below zero, which are rounding errors, become zero."""
    values, vectors = np.linalg.eigh(covariance)
    root: Matrix = vectors * np.sqrt(values.clip(0))
    return root
