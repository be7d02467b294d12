"""The last convolution of an upscaler as a GPU's kernel reads it; for inference in half precision."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.kernels.last_conv import PackedWeights, last_conv, pack_last


class PackedLastConv(nn.Module):
    """3x3 convolution from features in half precision to RGB in float32, with float32's accuracy."""

    scales: Tensor
    full: Tensor
    bias: Tensor

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype) -> None:
        """
        Args:
            conv: 3x3 convolution in float32, with bias.
            dtype: half precision of the features.
        """
        super().__init__()
        packed = pack_last(conv.weight, dtype)
        assert conv.bias is not None
        # The module's only parameter is in half precision, so that ``cast_to_weights`` leaves the features as they are.
        self.weight = nn.Parameter(packed.factors, requires_grad=False)
        for name, tensor in {"scales": packed.scales, "full": conv.weight, "bias": conv.bias}.items():
            self.register_buffer(name, tensor.detach())

    @property
    def macs(self) -> int:
        """Multiply-adds of a pixel."""
        return self.full.numel()

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, 3, H, W]."""
        return self.rows(x, 0, None)

    def rows(self, x: Tensor, top: int, count: int | None) -> Tensor:
        """``count`` rows of the result, from row ``top`` on."""
        return last_conv(x, self.full, self.bias, PackedWeights(self.weight, self.scales), top, count)
