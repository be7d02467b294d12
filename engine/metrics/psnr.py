"""Peak signal-to-noise ratio: the one definition that scores, training and validation share."""

from __future__ import annotations

from torch import Tensor


def psnr(mse: Tensor, *, peak: float = 1.0, floor: float = 0.0) -> Tensor:
    """PSNR in dB, element by element.

    Args:
        mse: mean squared errors, any shape and floating dtype.
        peak: largest value of a sample: 1 for images in [0, 1], 255 for grey levels.
        floor: smallest error that counts, which bounds the result for equal images. With 0 that result is infinite.
    """
    return -10 * (mse.clamp_min(floor) / peak**2).log10()
