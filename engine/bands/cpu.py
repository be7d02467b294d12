"""Convolutions of bands on a CPU.

Most run by oneDNN, with weights that are reordered once and the leaky ReLU that follows inside. PyTorch's compiler uses the
same operators. They are private, so their use is guarded, and a build without them takes ``torch.nn.functional.conv2d``.
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
        return self.is_3x3 and self.conv.in_channels % plane_channels(self.conv.weight.dtype) == 0

    @property
    def is_3x3(self) -> bool:
        """Whether it reads the pixels around its own."""
        return self.conv.kernel_size == (3, 3) and self.conv.dilation == (1, 1)

    @property
    def nbytes(self) -> int:
        """Bytes of the reordered weights."""
        return self.conv.weight.nbytes

    def __call__(self, views: Sequence[Tensor], rows: Rows) -> Tensor:
        x = views[0]
        padding = self.conv.dilation[1] * (self.conv.kernel_size[1] // 2)
        geometry = _geometry(x.ndim, padding, self.conv.dilation)
        weight = self._packed.get(x.ndim)
        if weight is None:
            weight = self._packed[x.ndim] = _reordered(self.conv.weight, x, geometry)
        y = _convolution(x, weight, self.conv.bias, geometry, self.slope)
        return y[:, :, 0] if y.ndim == 5 else y


@dataclass(slots=True)
class PackedUpConvolution:
    """``Store`` of a 3x3 convolution of a map enlarged twice by repeating pixels, and of the leaky ReLU that follows.

    Each output pixel reads 2 x 2 pixels of the small map, by one of four sums of the weights. So 4/9 of the products remain,
    and the large map is never made.
    """

    conv: nn.Conv2d
    """Layer with the weights."""
    slope: float | None = None
    """Negative slope of the leaky ReLU; None without one."""
    _packed: list[Tensor] = field(default_factory=list, init=False, compare=False)
    """Reordered weights of the even output rows and of the odd ones: those of even columns, then those of odd ones."""

    @property
    def nbytes(self) -> int:
        """Bytes of the reordered weights."""
        return self.conv.weight.nbytes * 16 // 9

    def __call__(self, views: Sequence[Tensor], destination: Tensor) -> None:
        x = views[0]  # with one row above and one below
        channels, height, width = self.conv.out_channels, x.shape[2] - 1, x.shape[3]
        geometry = _geometry(x.ndim, 1, (1, 1))
        if not self._packed:
            self._packed = [_reordered(phases, x[:, :, :height], geometry) for phases in self._phases()]
        bias = None if self.conv.bias is None else self.conv.bias.repeat(2)
        for row, weight in enumerate(self._packed):
            y = _convolution(x[:, :, row : row + height], weight, bias, geometry, self.slope)
            for column in range(2):
                pixels = y[:, column * channels : (column + 1) * channels, :, column : column + width]
                destination[:, :, row::2, column::2].copy_(pixels)

    def _phases(self) -> list[Tensor]:
        """Weights [2 C_out, C_in, 2, 2] for each parity of the rows: taps that read the same pixel are added."""
        weight = self.conv.weight.float()
        rows = [torch.stack(parts, 2) for parts in _halves(*weight.unbind(2))]
        return [
            torch.cat([torch.stack(parts, 3) for parts in _halves(*row.unbind(3))]).to(self.conv.weight.dtype)
            for row in rows
        ]


THIN = 4
"""Output channels up to which a 3x3 convolution is a product of matrices and a sum: oneDNN computes 16 at least."""


@dataclass(slots=True)
class ThinConvolution:
    """``Compute`` of a 3x3 convolution in float32 with few output channels, the last one of a network.

    A product of matrices gives the nine taps of every pixel, and their sum the output.
    """

    conv: nn.Conv2d
    """Layer with the weights."""

    @property
    def workspace(self) -> int:
        """Bytes for each output pixel: the taps, in some more rows than a band has."""
        return 14 * self.conv.out_channels * self.conv.weight.itemsize

    def __call__(self, views: Sequence[Tensor], rows: Rows) -> Tensor:
        x = views[0]  # with one row above and one below
        channels, height, width = self.conv.out_channels, x.shape[2] - 2, x.shape[3]
        weight = self.conv.weight.permute(2, 3, 0, 1).reshape(-1, x.shape[1])
        taps = (weight @ x[0].flatten(1)).view(3, 3, channels, height + 2, width)
        left, middle, right = ([taps[row, column, :, row : row + height] for row in range(3)] for column in range(3))
        y = middle[0] + middle[1]
        y += middle[2]
        for before, after in zip(left, right, strict=True):
            y[:, :, 1:] += before[:, :, :-1]
            y[:, :, :-1] += after[:, :, 1:]
        if self.conv.bias is not None:
            y += self.conv.bias[:, None, None]
        return y[None]


def _halves(before: Tensor, here: Tensor, after: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Taps of two pixels, for even and for odd positions in the enlarged map."""
    return (before, here + after), (before + here, after)


_Geometry = tuple[list[int], list[int], list[int]]
"""Padding, stride and dilation."""


def _geometry(axes: int, columns: int, dilation: Sequence[int]) -> _Geometry:
    """Geometry of a convolution: ``columns`` of padding left and right, none above or below.

    Args:
        axes: number of axes of the input, 4 or 5.
        columns: columns of padding on each side.
        dilation: dilation of rows and columns.
    """
    depth = [1] * (axes - 4)
    return [0] * (axes - 3) + [columns], [*depth, 1, 1], [*depth, *dilation]


def _reordered(weight: Tensor, x: Tensor, geometry: _Geometry) -> Tensor:
    """Weights in oneDNN's order for inputs of the shape of ``x``, in planes or not."""
    ops: Any = torch.ops
    result: Tensor
    if x.ndim == 4:
        dense = weight.contiguous(memory_format=torch.channels_last)
        result = ops.mkldnn._reorder_convolution_weight(dense, *geometry, 1, list(x.shape))
    else:
        unit, planes = x.shape[1:3]
        deep = weight.reshape(-1, planes, unit, 3, 3).transpose(1, 2).contiguous().to_mkldnn()
        result = ops.aten.mkldnn_reorder_conv3d_weight(deep, *geometry, 1, list(x.shape))
    return result


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: _Geometry, slope: float | None) -> Tensor:
    after: tuple[str, list[float]] = ("none", []) if slope is None else ("leaky_relu", [slope])
    y: Tensor = torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *geometry, 1, *after, "")
    return y


def plane_channels(dtype: torch.dtype) -> int:
    """Channels of a plane."""
    return PLANE_BYTES // dtype.itemsize
