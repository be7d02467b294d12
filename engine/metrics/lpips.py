"""LPIPS between all pairs of images, in one pass over all of them.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018; version 0.1 on AlexNet. At
every layer features are normalised over channels; squared differences are weighted by the heads and averaged over positions.

With u = sqrt(w / positions) * features / |features|, the distance of two images is |u_a - u_b|^2 = u_a.u_a + u_b.u_b - 2 u_a.u_b.
All pairs follow from one matrix of scalar products, to which every strip of rows adds its part. Features are neither kept nor
computed twice. Memory grows with the number of images and their width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from engine.errors import InputError
from engine.geometry import Box
from engine.io.photo import Source
from engine.metrics.frechet import Matrix
from engine.metrics.rows import StridedNetwork, StridedRowStream

Range = Literal["-1..1", "0..1"]
RANGES: tuple[Range, ...] = ("-1..1", "0..1")
"""Range of the network's input: as LPIPS is defined, and as in some published numbers that skipped the rescaling."""

STRIP_BYTES = 64 << 20
"""Memory for first-layer features of all images at a time."""

_STRIDE, _CHANNELS = 4, 64  # AlexNet's first layer
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet's mean and deviation, for [-1, 1]
_EPS = 1e-10
_PRODUCT_COLUMNS = 1 << 16


class AlexFeatures(nn.Module):
    """AlexNet's convolutions (Krizhevsky, 2014) with torchvision's tensor names.

    Maps [1, 3, H, W] to the outputs of the five ReLUs, from [1, 64, about H / 4, W / 4] on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, stride=2),
            nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, stride=2),
            nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        features = []
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                features.append(x)
        return tuple(features)


class Lpips:
    """LPIPS on a device."""

    def __init__(self, network: AlexFeatures, heads: Sequence[Tensor], device: torch.device | None = None) -> None:
        """Move the networks to the device.

        Args:
            network: AlexNet, whose dtype is used.
            heads: weights [C] of every layer, none negative.
            device: by default the CPU.
        """
        self._device = device or torch.device("cpu")
        self._network = network.eval().requires_grad_(False).to(self._device)
        self._dtype = next(network.parameters()).dtype
        self._roots = [head.to(self._device, self._dtype).sqrt().view(1, -1, 1, 1) for head in heads]
        self._rows = StridedNetwork(self._network)

    def pairwise(
        self,
        pictures: Sequence[Source],
        input_range: Range = "-1..1",
        on_rows: Callable[[int], None] = lambda rows: None,
    ) -> Matrix:
        """Compute the distance of every pair.

        Args:
            pictures: N images of one size.
            input_range: range of the network's input.
            on_rows: called with the number of rows that all images have advanced.

        Returns:
            [N, N], symmetric, zero on the diagonal.

        Raises:
            InputError: the sizes differ or are too small.
        """
        sizes = {picture.size for picture in pictures}
        if len(sizes) != 1:
            names = ", ".join(sorted(f"{width}x{height}" for height, width in sizes))
            raise InputError(f"LPIPS needs images of one size; found {names or 'no pictures'}")
        (size,) = sizes
        streams = [StridedRowStream(self._rows, size) for _ in pictures]
        positions = [self._rows.sizes(*size)[name] for name in self._rows.outputs]
        product = np.zeros((len(pictures), len(pictures)))
        step = self._strip_rows(size[1], len(pictures))
        for y in range(0, size[0], step):
            rows = min(step, size[0] - y)
            strips = [s.push(self._read_input(p, y, rows, input_range)) for s, p in zip(streams, pictures, strict=True)]
            for layer, (height, width) in enumerate(positions):
                features = [f for strip in strips if (f := strip[layer]) is not None]
                if features:
                    product += self._products(features, self._roots[layer] / (height * width) ** 0.5)
            on_rows(rows)
        product = (product + product.T) / 2  # symmetric except for rounding
        lengths = np.diag(product)
        distances: Matrix = (lengths[:, None] + lengths[None, :] - 2 * product).clip(0)
        return distances

    def _strip_rows(self, width: int, pictures: int) -> int:
        """Input rows at a time: a multiple of the stride, at least two strides."""
        row = pictures * _CHANNELS * width / _STRIDE * 4  # bytes of one row of features of all images
        return _STRIDE * min(64, max(2, int(STRIP_BYTES / row)))

    def _read_input(self, picture: Source, top: int, rows: int, input_range: Range) -> Tensor:
        """Normalised network input [1, 3, rows, W]."""
        x = picture.read(Box(top, 0, top + rows, picture.size[1]))[None].to(self._device, self._dtype)
        if input_range == "-1..1":
            x = 2 * x - 1
        shift, scale = (torch.tensor(v, device=x.device, dtype=x.dtype).view(1, 3, 1, 1) for v in (_SHIFT, _SCALE))
        return (x - shift) / scale

    def _products(self, features: Sequence[Tensor], weight: Tensor) -> Matrix:
        """Scalar products [N, N] of the weighted unit features, summed in float64."""
        units = torch.stack(
            [(f / (f.square().sum(1, keepdim=True).sqrt() + _EPS) * weight).flatten() for f in features]
        )
        parts = (part.double() for part in torch.split(units, _PRODUCT_COLUMNS, 1))
        total: Matrix = sum((part @ part.T for part in parts), torch.zeros((), dtype=torch.float64)).cpu().numpy()
        return total
