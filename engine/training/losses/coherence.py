"""Coherence: distance of each patch of an image to the nearest patch of another (Simakov et al. 2008)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Coherence(nn.Module):
    """Mean squared distance of each patch of the fake image to its nearest patch of the real one.

    The nearest patch may lie anywhere, but a difference in height adds to the distance. Real patches that no fake patch
    comes near to are preferred: a distance is divided by the smallest distance of any fake patch to the same real patch
    plus ``ALPHA`` (Granot et al. 2022, "Drop the GAN", equation 1). Without this, all patches would become the few that
    are near to everything.
    """

    HEIGHT = 2.0
    """Height of the image, in units of pixel values."""
    ALPHA = 0.005
    """Smaller values prefer real patches without a near fake patch more strongly."""
    MAX_SIDE = 64
    """Largest number of rows and of columns of patches; larger images are sampled with a stride."""

    def __init__(self, patch: int = 5) -> None:
        super().__init__()
        self.patch = patch

    def forward(self, fake: Tensor, real: Tensor) -> Tensor:
        """Loss of a batch, image by image.

        Args:
            fake: [N, 3, H, W] in [0, 1]; patches are smaller where H or W is below the side of a patch.
            real: [N, 3, h, w] in [0, 1]; it gets no gradient.

        Returns:
            A scalar, fp32.
        """
        patch = min(self.patch, *fake.shape[2:])
        losses = []
        for fake_image, real_image in zip(fake.float(), real.detach().float(), strict=True):
            values, heights = self._patches(fake_image, patch)
            real_values, real_heights = self._patches(real_image, patch)
            with torch.no_grad():
                distances = torch.cdist(values, real_values).square() / values.shape[1]
                distances = distances + (heights[:, None] - real_heights).square()
                nearest = (distances / (distances.amin(0) + self.ALPHA)).argmin(1)
            losses.append(F.mse_loss(values, real_values[nearest]))
        return torch.stack(losses).mean()

    def _patches(self, image: Tensor, patch: int) -> tuple[Tensor, Tensor]:
        """Patches [count, values] and the height of each [count]."""
        stride = -(-max(image.shape[1:]) // self.MAX_SIDE)
        values = F.unfold(image[None], patch, stride=stride)[0].T
        rows, columns = ((side - patch) // stride + 1 for side in image.shape[1:])
        height = self.HEIGHT * torch.arange(rows).to(values) * stride / image.shape[1]
        return values, height.repeat_interleave(columns)
