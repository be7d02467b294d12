"""Convolutions by oneDNN on a CPU: weights reordered once, and the leaky ReLU that follows computed inside.

PyTorch's compiler uses the same operators. They are private, so every use is guarded, and a build without them takes
``torch.nn.functional.conv2d``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from engine.bands.rules import Rows

PLANE_BYTES = 64
"""Bytes of a pixel in a plane of a dense block: a cache line, the channels that oneDNN multiplies at a time."""


def is_supported(conv: nn.Conv2d) -> bool:
    """Whether oneDNN's operators run a convolution at full speed: on a CPU, ungrouped, in a precision of its own."""
    weight, ops = conv.weight, torch.ops.mkldnn
    if weight.device.type != "cpu" or conv.groups != 1 or not hasattr(ops, "_convolution_pointwise"):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(ops._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


@dataclass(slots=True)
class PackedConvolution:
    """``Compute`` of a convolution without padding of rows, and of the leaky ReLU that follows.

    Reads rows [1, C, H, W], or planes [1, C / planes, planes, H, W] of the same channels, channels-last.
    """

    conv: nn.Conv2d
    """Layer with the weights."""
    slope: float | None = None
    """Negative slope of the leaky ReLU; None without one."""
    _packed: dict[int, Tensor] = field(default_factory=dict, init=False, compare=False)
    """Number of the input's axes -> reordered weights."""

    @property
    def reads_planes(self) -> bool:
        """Whether it reads planes as fast as rows."""
        conv = self.conv
        return conv.kernel_size == (3, 3) and conv.dilation == (1, 1) and conv.in_channels % plane_channels(conv.weight.dtype) == 0

    @property
    def nbytes(self) -> int:
        """Bytes of the reordered weights."""
        return self.conv.weight.nbytes

    def __call__(self, views: Sequence[Tensor], rows: Rows) -> Tensor:
        x = views[0]
        geometry = self._geometry(x.ndim)
        weight = self._packed.get(x.ndim)
        if weight is None:
            weight = self._packed[x.ndim] = self._reordered(x, geometry)
        after: tuple[str, list[float]] = ("none", []) if self.slope is None else ("leaky_relu", [self.slope])
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(x, weight, self.conv.bias, *geometry, 1, *after, "")
        return y[:, :, 0] if y.ndim == 5 else y

    def _geometry(self, axes: int) -> tuple[list[int], list[int], list[int]]:
        """Padding, stride and dilation for an input of so many axes."""
        columns = self.conv.dilation[1] * (self.conv.kernel_size[1] // 2)
        depth = [1] * (axes - 4)
        return [0] * (axes - 3) + [columns], [*depth, 1, 1], [*depth, *self.conv.dilation]

    def _reordered(self, x: Tensor, geometry: tuple[list[int], list[int], list[int]]) -> Tensor:
        ops: Any = torch.ops
        weight = self.conv.weight
        if x.ndim == 4:
            return ops.mkldnn._reorder_convolution_weight(  # type: ignore[no-any-return]
                weight.contiguous(memory_format=torch.channels_last), *geometry, 1, list(x.shape)
            )
        unit, planes = x.shape[1:3]
        deep = weight.unflatten(1, (planes, unit)).transpose(1, 2).contiguous()
        return ops.aten.mkldnn_reorder_conv3d_weight(deep.to_mkldnn(), *geometry, 1, list(x.shape))  # type: ignore[no-any-return]


def plane_channels(dtype: torch.dtype) -> int:
    """Channels of a plane."""
    return PLANE_BYTES // dtype.itemsize
