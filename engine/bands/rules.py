"""Row rules: which rows each operation of a network reads, and how it computes new rows from them.

``RULES`` maps a module class, a function or the name of a tensor method to a function that turns a ``Call`` of the trace
into a ``Rule``, or raises ``Call.refusal``. Adding an operation takes one entry there. Knows nothing of whole networks.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from fractions import Fraction
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from engine.archs.last_conv import PackedLastConv
from engine.archs.layers import PixelRows, WindowRows, check_whole_windows
from engine.bands.cpu import THIN, PackedConvolution, PackedUpConvolution, ThinConvolution, is_supported
from engine.errors import UsageError, option
from engine.kernels.dense import conv3x3
from engine.kernels.launch import use_kernel


class Layout(Enum):
    """Axis order of a view of rows. Memory holds rows as [H, W, C] in both cases."""

    NCHW = (1, 2, 3)
    NHWC = (3, 1, 2)

    def __init__(self, channels: int, rows: int, columns: int) -> None:
        self.channels = channels
        self.rows = rows
        self.columns = columns


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a value: [top, top + count), in a picture whose rows are [low, high)."""

    top: int
    """First row; outside the picture if less than ``low``."""
    count: int
    """Number of rows."""
    low: int
    """First row of the picture."""
    high: int
    """End of the picture: its last row + 1."""

    @property
    def outside(self) -> bool:
        """Whether no row lies in the picture."""
        return self.top + self.count <= self.low or self.top >= self.high

    @property
    def inside(self) -> bool:
        """Whether every row lies in the picture."""
        return self.top >= self.low and self.top + self.count <= self.high

    def grow(self, reach: int) -> Rows:
        """These rows and ``reach`` more above and below."""
        return replace(self, top=self.top - reach, count=self.count + 2 * reach)

    def scale(self, factor: Fraction) -> Rows:
        """The same rows at ``factor`` times the resolution, rounded towards zero."""
        return Rows(*(int(n * factor) for n in (self.top, self.count, self.low, self.high)))


AXES = 4
"""Axes of a view of rows, unless its channels lie in several planes."""

Compute = Callable[[Sequence[Tensor], Rows], Tensor]
"""(views of the inputs' rows, the output's rows) -> the output; every tensor in its own layout."""

Store = Callable[[Sequence[Tensor], Tensor], object]
"""(views, destination): writes to the destination; independent of the rows' position."""


def copy_rows(views: Sequence[Tensor], destination: Tensor) -> None:
    """Default ``Store``: a copy, cast to the destination's dtype."""
    destination.copy_(_with_axes_of(destination, views[0]))


def _with_axes_of(reference: Tensor, x: Tensor) -> Tensor:
    """``x`` [1, C, H, W] or [1, planes, unit, H, W] with the axes of ``reference``; a copy only between different units."""
    split = reference.shape[1:-2]
    if x.shape[1:-2] == split:
        return x
    dense = x if x.ndim == AXES else x.flatten(1, 2)
    return dense if len(split) == 1 else dense.view(dense.shape[0], *split, *dense.shape[2:])


@dataclass(frozen=True, slots=True)
class Rule:
    """Rows that an operation reads for its new rows, its computation and its cost."""

    compute: Compute | None
    """Computes new rows in memory of its own; None if ``store`` computes them at their destination."""
    store: Store = copy_rows
    """Writes the output of ``compute`` to its destination, or computes it there (like PyTorch's ``out=``)."""
    factor: Fraction = Fraction(1)
    """Output rows per input row."""
    reach: int = 0
    """Input rows read above and below the output's own."""
    column_reach: int | None = None
    """Input columns read left and right of the output's own; None if columns cannot be computed in blocks."""
    grid: tuple[int, int] = (1, 0)
    """(period, residue): the delay at which the operation reads must be ``residue`` modulo ``period``."""
    macs: int = 0
    """Multiply-adds per output pixel."""
    workspace: int = 0
    """Bytes per output pixel that the operation allocates while it runs, other than its output."""

    @property
    def by_kernel(self) -> bool:
        """Whether the operation is a convolution by its kernel."""
        return isinstance(self.store, Convolution3x3)

    def reach_of(self, index: int) -> int:
        """Input rows read above and below the output's own, of one of the inputs."""
        return self.reach if index == 0 or not self.adds_residual else 0

    def reads_views(self, index: int) -> bool:
        """Whether an input may be some of a buffer's channels, as fast as a buffer of their own."""
        return self.by_kernel or self.reads_planes(index)

    def reads_planes(self, index: int) -> bool:
        """Whether an input may be the planes of a dense block."""
        return index == 0 and isinstance(self.compute, PackedConvolution) and self.compute.reads_planes

    @property
    def is_packed(self) -> bool:
        """Whether the operation is a convolution by oneDNN, which computes any number of rows."""
        return isinstance(self.compute, PackedConvolution)

    @property
    def adds_residual(self) -> bool:
        """Whether the second input is added to a convolution of the first one."""
        return isinstance(self.store, Residual)

    @property
    def writes_planes(self) -> bool:
        """Whether the destination may lie in several planes."""
        return self.adds_residual or (self.is_packed and self.store is copy_rows)

    @property
    def packed_bytes(self) -> int:
        """Bytes of weights that the operation holds in an order of its own."""
        packed = self.store if self.compute is None else self.compute
        return packed.nbytes if isinstance(packed, PackedConvolution | PackedUpConvolution) else 0


@dataclass(frozen=True, slots=True)
class LeakyReLU:
    """``Store`` of a leaky ReLU."""

    slope: float
    """Negative slope."""

    def __call__(self, views: Sequence[Tensor], destination: Tensor) -> None:
        torch.ops.aten.leaky_relu.out(views[0], self.slope, out=destination)


@dataclass(frozen=True, slots=True)
class Add:
    """``Store`` of a sum of two values."""

    alpha: float
    """Factor of the second value."""

    def __call__(self, views: Sequence[Tensor], destination: Tensor) -> None:
        torch.add(views[0], views[1], alpha=self.alpha, out=destination)


@dataclass(frozen=True, slots=True)
class Nearest:
    """``Store`` of an enlargement that repeats every pixel of [1, C, H, W]."""

    scale: int
    """Rows and columns of a pixel."""

    def __call__(self, views: Sequence[Tensor], destination: Tensor) -> None:
        channels, height, width = destination.shape[1:]
        cells = destination[0].view(channels, height // self.scale, self.scale, width // self.scale, self.scale)
        cells.copy_(views[0][0, :, :, None, :, None].expand(cells.shape))


@dataclass(frozen=True, slots=True)
class Residual:
    """``Store`` of the sum of a residual, the second view, and the result of a convolution."""

    scale: float
    """Factor of the convolution's result."""

    def __call__(self, views: Sequence[Tensor], destination: Tensor) -> None:
        y, residual = views
        reference = residual if destination.ndim == AXES else destination
        residual, y, destination = (_with_axes_of(reference, x) for x in (residual, y, destination))
        torch.add(residual, y, alpha=self.scale, out=destination)


@dataclass(frozen=True, slots=True)
class Rectify:
    """``Store`` of PReLU or ReLU of the result of a convolution."""

    function: Rectifier

    def __call__(self, views: Sequence[Tensor], destination: Tensor) -> None:
        destination.copy_(self.function([views[0].to(self.function.dtype)]))

    def workspace(self, conv: nn.Conv2d) -> int:
        """Bytes per output pixel that it allocates for the result of a convolution."""
        dtype = self.function.dtype
        return conv.out_channels * dtype.itemsize * (1 if conv.weight.dtype == dtype else 2)


@dataclass(frozen=True, slots=True)
class Convolution3x3:
    """``Store`` of a 3x3 convolution by its kernel, with the leaky ReLU, the sum and the cast that follow it.

    The kernel reads a window of a buffer's rows and some of its channels, and writes to others of them: nothing is copied.
    Sums are float32 until they are stored, so what follows is not rounded in between.
    """

    conv: nn.Conv2d
    """Layer with the weights, channels-last."""
    use_triton: bool | None
    """As for ``conv3x3``."""
    slope: float = 1.0
    """Negative slope of the leaky ReLU."""
    scale: float = 1.0
    """Factor of the result beside a residual, which is the second view if there is one."""
    has_residual: bool = False
    """Whether a residual is added."""

    def __call__(self, views: Sequence[Tensor], destination: Tensor) -> None:
        x, *residual = (view.permute(0, 2, 3, 1) for view in views)
        conv3x3(
            x,
            self.conv.weight,
            cast(Tensor, self.conv.bias),
            destination.permute(0, 2, 3, 1),
            top=1,  # the window has one row above the output's own, and one below
            slope=self.slope,
            residual=residual[0][:, 1:-1] if residual else None,
            scale=self.scale,
            use_triton=self.use_triton,
        )


def fused(first: Rule, following: Rule, position: int) -> Rule | None:
    """The rule of two operations in one; None if there is none.

    Args:
        first: an operation whose result has no reader but the following one.
        following: that operation.
        position: position of the result among the inputs of ``following``.

    Returns:
        A rule that reads the inputs of ``first``, then the other inputs of ``following``.
    """
    if first.store == Nearest(2) and isinstance(following.compute, PackedConvolution) and following.compute.is_3x3:
        up = PackedUpConvolution(following.compute.conv, following.compute.slope)
        macs, workspace = following.macs * 4 // 9, up.conv.out_channels * up.conv.weight.itemsize // 2
        return replace(first, store=up, reach=1, column_reach=1, macs=macs, workspace=workspace)
    if isinstance(following.compute, Rectifier):
        if not isinstance(first.compute, PackedConvolution) or first.store is not copy_rows:
            return None
        rectify = Rectify(following.compute)
        return replace(first, store=rectify, workspace=rectify.workspace(first.compute.conv))
    if following.compute is not None or following.factor != 1 or following.reach:
        return None
    store, after = first.store, following.store
    if isinstance(store, Convolution3x3):
        fresh = replace(store)
        if after is copy_rows:
            return first
        if isinstance(after, LeakyReLU) and store.slope == 1 and not store.has_residual:
            return replace(first, store=replace(fresh, slope=after.slope))
        if isinstance(after, Add) and not store.has_residual and (position == 1 or after.alpha == 1):
            return replace(first, store=replace(fresh, scale=after.alpha, has_residual=True))
        return None
    if isinstance(store, PackedUpConvolution) and isinstance(after, LeakyReLU) and store.slope is None:
        return replace(first, store=replace(store, slope=after.slope))
    if isinstance(first.compute, PackedConvolution) and first.compute.slope is None and store is copy_rows:
        if isinstance(after, LeakyReLU):
            return replace(first, compute=replace(first.compute, slope=after.slope))
        if isinstance(after, Add) and (position == 1 or after.alpha == 1):
            return replace(first, store=Residual(after.alpha))
    return replace(first, store=after) if store is copy_rows and not isinstance(after, Add | Convolution3x3) else None


@dataclass(frozen=True, slots=True)
class Call:
    """One call in the trace of a network."""

    node: fx.Node
    """The traced call."""
    module: nn.Module | None
    """Module that is called; None for a function or a method."""
    inputs: tuple[fx.Node, ...]
    """Arguments that have rows, each once."""
    operands: tuple[Tensor, ...]
    """Results of ``inputs`` for a small picture."""
    layout: Layout
    """Layout of the first input."""
    constants: Mapping[fx.Node, Tensor]
    """Arguments that have no rows: parameters and buffers of the network."""
    result: Tensor
    """Output for the same picture."""
    is_shared: bool = False
    """Whether the first input has other readers."""
    use_triton: bool | None = None
    """Whether operations take their kernels; None: where the device has them."""
    packs: bool = False
    """Whether convolutions run on a CPU as ``engine.bands.cpu`` does it."""

    def argument(self, position: int, name: str, default: Any = None) -> Any:  # noqa: ANN401
        """Argument of a function or method, given by position or by name."""
        if position < len(self.node.args):
            return self.node.args[position]
        return self.node.kwargs.get(name, default)

    @property
    def is_identity(self) -> bool:
        """Whether the result has its input's numbers, in its memory."""
        if self.module is not None:
            return isinstance(self.module, nn.Identity | nn.Dropout | nn.Dropout2d) and not self.module.training
        if self.node.target in ("to", "type_as"):
            return self.result.dtype == self.operands[0].dtype
        return self.node.target is F.pad and not any(self.argument(1, "pad"))

    @property
    def factor(self) -> Fraction | None:
        """Rows of the result per row of the first input, and columns per column; None if they differ."""
        sides = [
            (self.result.shape[axis], self.operands[0].shape[axis]) for axis in (self.layout.rows, self.layout.columns)
        ]
        factors = {Fraction(*side) for side in sides}
        return factors.pop() if len(factors) == 1 else None

    @property
    def in_place(self) -> bool:
        """Whether the call overwrites its input."""
        return bool(getattr(self.module, "inplace", False) or self.node.kwargs.get("inplace"))

    def refusal(self, reason: str) -> UsageError:
        """Error that names the call and the reason why it cannot be streamed."""
        called: Any = self.node.target if self.module is None else type(self.module)
        name = getattr(called, "__name__", str(called))
        return UsageError(
            f"{name} ({self.node.name}): cannot be streamed in bands ({reason}); use {option('executor', 'tiles')}"
        )


def rule_of(call: Call) -> Rule:
    """The rule of a call.

    Raises:
        UsageError: the operation has no rule, or these arguments of it have none.
    """
    keys = (call.node.target,) if call.module is None else type(call.module).__mro__
    make = next((RULES[key] for key in keys if key in RULES), None)
    if make is None:
        raise call.refusal(_UNBOUNDED)
    if call.in_place and call.is_shared:
        raise call.refusal("it overwrites an input that other operations read")
    return make(call)


_UNBOUNDED = "it may read any number of rows"


def _element_wise(call: Call) -> Rule:
    """The call itself, on views in place of whole pictures."""
    return Rule(CallOnViews(call), column_reach=0)


def constant_rule(call: Call, node: fx.Node) -> Rule:
    """The rule of a constant beside the first input of a call, which has as many rows and columns."""
    constant = _pixel_of(call, node)
    if constant.ndim != 4 or call.layout is not Layout.NCHW:
        raise call.refusal("a constant has other axes than rows, columns and channels")
    return Rule(lambda views, rows: constant.expand(-1, -1, *views[0].shape[2:]), column_reach=0)


def _pixel_of(call: Call, node: fx.Node) -> Tensor:
    """A constant, without the rows and columns of a map that is the same everywhere."""
    constant = call.constants[node]
    if call.layout is not Layout.NCHW or constant.shape[-2:] != call.operands[0].shape[-2:]:
        return constant
    pixel = constant[..., :1, :1]
    if not torch.equal(pixel.expand_as(constant), constant):
        raise call.refusal("a constant differs from pixel to pixel")
    return pixel


def _check_windows(call: Call) -> Rule:
    return Rule(CallOnViews(call))  # needs the full width


class CallOnViews:
    """``Compute`` of a call that gives each pixel the same, wherever it lies."""

    def __init__(self, call: Call) -> None:
        self._node, self._inputs = call.node, call.inputs
        self._constants = {constant: _pixel_of(call, constant) for constant in call.constants}
        self._function: Any = call.module or call.node.target
        if call.node.op == "call_method":
            self._function = getattr(Tensor, str(call.node.target))

    def __call__(self, views: Sequence[Tensor], rows: Rows | None = None) -> Tensor:
        tensors = {**self._constants, **dict(zip(self._inputs, views, strict=True))}
        args: Any = fx.node.map_arg(self._node.args, tensors.__getitem__)
        kwargs: Any = fx.node.map_arg(self._node.kwargs, tensors.__getitem__)
        result: Tensor = self._function(*args, **kwargs)
        return result


class Rectifier(CallOnViews):
    """``Compute`` of PReLU or ReLU of one value: its bits do not depend on how many pixels it computes at a time.

    PyTorch computes the last few numbers of a tensor one by one, and rounds GELU and others differently there.
    """

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self.dtype = call.operands[0].dtype


def _rectifier(call: Call) -> Rule:
    return Rule(Rectifier(call), column_reach=0) if len(call.inputs) == 1 else _element_wise(call)


def _cast(call: Call) -> Rule:
    return Rule(None, copy_rows, column_reach=0)


def _leaky_relu(call: Call) -> Rule:
    module = call.module
    slope = module.negative_slope if isinstance(module, nn.LeakyReLU) else call.argument(1, "negative_slope", 0.01)
    return Rule(None, LeakyReLU(slope), column_reach=0)


def _add(call: Call) -> Rule:
    # With a scalar, a constant, x + x, or a map for each channel.
    if call.node.args != call.inputs or len(call.inputs) != 2 or len({x.shape for x in call.operands}) != 1:
        return _element_wise(call)
    alpha: Any = call.node.kwargs.get("alpha", 1)
    return Rule(None, Add(alpha), column_reach=0)


def _narrow(call: Call) -> Rule:
    if call.argument(1, "dim") % 4 != call.layout.channels:
        raise call.refusal(_UNBOUNDED)
    return _element_wise(call)


def _over_channels(call: Call) -> Rule:
    axes = call.argument(1, "dim")
    axes = axes if isinstance(axes, tuple | list) else (axes,)
    if axes[0] is None or [axis % 4 for axis in axes] != [call.layout.channels] or call.result.ndim != 4:
        raise call.refusal(_UNBOUNDED)
    return _element_wise(call)


def _repeat(call: Call) -> Rule:
    if call.argument(2, "dim", -1) % 4 != call.layout.channels:
        raise call.refusal(_UNBOUNDED)
    return _element_wise(call)


def _expand(call: Call) -> Rule:
    if tuple(call.node.args[2:]) != (call.result.shape[1], -1, -1) or call.layout is not Layout.NCHW:
        raise call.refusal("it expands other axes than channels")
    return _element_wise(call)


def _batch_norm(call: Call) -> Rule:
    module = call.module
    assert isinstance(module, nn.BatchNorm2d)
    if module.training or module.running_mean is None:
        raise call.refusal(_UNBOUNDED)
    return _element_wise(call)


def _layer_norm(call: Call) -> Rule:
    module = call.module
    assert isinstance(module, nn.LayerNorm)
    if call.layout is not Layout.NHWC or len(module.normalized_shape) != 1:
        raise call.refusal(_UNBOUNDED)
    return _element_wise(call)


def _linear(call: Call) -> Rule:
    if call.layout is not Layout.NHWC:
        raise call.refusal(_UNBOUNDED)
    return replace(_element_wise(call), macs=_linear_macs(call.module))


def _pixels(call: Call) -> Rule:
    assert isinstance(call.module, PixelRows)
    if call.layout is not Layout.NHWC:
        raise call.refusal(_UNBOUNDED)
    return replace(_element_wise(call), macs=call.module.macs)


def _linear_macs(module: nn.Module | None) -> int:
    return module.in_features * module.out_features if isinstance(module, nn.Linear) else 0


def _convolution(call: Call) -> Rule:
    conv = call.module
    assert isinstance(conv, nn.Conv2d)
    height, width = conv.kernel_size
    same = [d * (k // 2) for d, k in zip(conv.dilation, (height, width), strict=True)]
    padding = same if conv.padding == "same" else list(conv.padding)
    if conv.padding_mode == "zeros" and _is_patch(conv):
        return _of_patches(conv, F.conv2d, Fraction(1, height))
    if conv.stride != (1, 1) or height % 2 == 0 or width % 2 == 0 or padding != same or conv.padding_mode != "zeros":
        raise call.refusal("only stride 1, odd kernels and zero padding that keeps the size have a rule")

    macs = conv.in_channels // conv.groups * conv.out_channels * height * width
    if (height, width, *conv.dilation, conv.groups) == (3, 3, 1, 1, 1) and _takes_kernel(conv, call):
        return Rule(None, Convolution3x3(conv, call.use_triton), reach=1, macs=macs)

    if call.packs and call.layout is Layout.NCHW and is_supported(conv):
        is_3x3 = (height, width, *conv.dilation) == (3, 3, 1, 1)
        if is_3x3 and conv.out_channels <= THIN and conv.weight.dtype == torch.float32:
            thin = ThinConvolution(conv)
            return Rule(thin, reach=1, macs=macs, workspace=thin.workspace)
        return Rule(PackedConvolution(conv), reach=same[0], column_reach=same[1], macs=macs)

    def compute(views: Sequence[Tensor], rows: Rows) -> Tensor:
        return F.conv2d(views[0], conv.weight, conv.bias, 1, (0, same[1]), conv.dilation, conv.groups)

    return Rule(compute, reach=same[0], column_reach=same[1], macs=macs)


def _is_patch(conv: nn.Conv2d | nn.ConvTranspose2d) -> bool:
    """Whether a strided convolution maps squares of pixels that do not overlap to pixels, or pixels to such squares."""
    side = conv.stride[0]
    return side > 1 and (*conv.kernel_size, *conv.stride, *conv.padding, *conv.dilation) == (*[side] * 4, 0, 0, 1, 1)


def _of_patches(conv: nn.Conv2d | nn.ConvTranspose2d, function: Callable[..., Tensor], factor: Fraction) -> Rule:
    def compute(views: Sequence[Tensor], rows: Rows) -> Tensor:
        return function(views[0], conv.weight, conv.bias, conv.stride, groups=conv.groups)

    connections, area = conv.in_channels * conv.out_channels // conv.groups, conv.stride[0] ** 2
    macs = connections * area if factor < 1 else connections  # of a pixel of the output
    return Rule(compute, factor=factor, grid=(max(1, int(1 / factor)), 0), macs=macs)


def _transposed_convolution(call: Call) -> Rule:
    conv = call.module
    assert isinstance(conv, nn.ConvTranspose2d)
    if not _is_patch(conv) or any(conv.output_padding):
        raise call.refusal("only kernels as large as their stride, without padding, have a rule")
    return _of_patches(conv, F.conv_transpose2d, Fraction(conv.stride[0]))


def _largest(call: Call) -> Rule:
    factor = call.factor
    if factor is None or factor.numerator != 1 or call.node.kwargs.get("return_indices"):
        raise call.refusal(_UNBOUNDED)
    side = factor.denominator
    return Rule(lambda views, rows: F.max_pool2d(views[0], side), factor=factor, grid=(side, 0))


def _last_convolution(call: Call) -> Rule:
    conv = call.module
    assert isinstance(conv, PackedLastConv)

    def compute(views: Sequence[Tensor], rows: Rows) -> Tensor:
        return conv.rows(views[0], 1, rows.count)

    return Rule(compute, reach=1, macs=conv.macs)


def _takes_kernel(conv: nn.Conv2d, call: Call) -> bool:
    """Whether a 3x3 convolution runs by ``conv3x3``: in half precision, which has matrix instructions, unless forced."""
    if conv.bias is None or call.layout is not Layout.NCHW:
        return False
    half = conv.weight.dtype in (torch.float16, torch.bfloat16)
    return (half or call.use_triton is not None) and use_kernel(conv.weight.device, call.use_triton)


def _window_attention(call: Call) -> Rule:
    layer = call.module
    assert isinstance(layer, WindowRows)
    window, shift = layer.window, layer.shift

    def compute(views: Sequence[Tensor], rows: Rows) -> Tensor:
        tops = range(rows.top, rows.top + rows.count, window)
        seams = [i for i, y in enumerate(tops) if y < rows.low < y + window or y < rows.high < y + window]
        return layer.attend(views[0], seams)

    return Rule(compute, grid=(window, -shift % window), macs=layer.macs, workspace=layer.workspace)


def _pixel_shuffle(call: Call) -> Rule:
    factor = int(getattr(call.module, "upscale_factor", 0) or call.argument(1, "upscale_factor"))
    return Rule(lambda views, rows: F.pixel_shuffle(views[0], factor), factor=Fraction(factor))


def _pixel_unshuffle(call: Call) -> Rule:
    factor = int(getattr(call.module, "downscale_factor", 0) or call.argument(1, "downscale_factor"))
    return Rule(lambda views, rows: F.pixel_unshuffle(views[0], factor), factor=Fraction(1, factor), grid=(factor, 0))


def _upsampling(call: Call) -> Rule:
    defaults = {"size": None, "scale_factor": None, "mode": "nearest", "align_corners": None}
    if call.module is None:
        values = [call.argument(position, *default) for position, default in enumerate(defaults.items(), start=1)]
    else:
        values = [getattr(call.module, name) for name in defaults]
    size, factor, mode, corners = values
    if isinstance(factor, tuple) and len(set(factor)) == 1:
        factor = factor[0]
    if factor is None and size is not None:
        factor = call.factor
    if not isinstance(factor, int | float | Fraction) or factor != int(factor):
        raise call.refusal("only a whole scale_factor, the same for rows and columns, has a rule")
    scale = int(factor)
    if mode == "nearest":
        return Rule(None, Nearest(scale), Fraction(scale), column_reach=0)
    if mode == "bilinear" and not corners:
        # The input rows with one more above and below, and their output, which is cropped.
        workspace = 2 * call.result.shape[1] * call.result.itemsize
        return Rule(_bilinear(scale), factor=Fraction(scale), reach=1, workspace=workspace)
    raise call.refusal(f"mode {mode} with align_corners={corners} has no rule")


def _bilinear(scale: int) -> Compute:
    def compute(views: Sequence[Tensor], rows: Rows) -> Tensor:
        read = rows.scale(Fraction(1, scale)).grow(1)
        # Beyond the border PyTorch repeats the picture's first and last row.
        index = torch.arange(read.top, read.top + read.count).clamp(read.low, read.high - 1) - read.top
        view = views[0] if read.inside else views[0][:, :, index.clamp(0, read.count - 1).to(views[0].device)]
        return F.interpolate(view, scale_factor=scale, mode="bilinear")[:, :, scale:-scale]

    return compute


RULES: dict[object, Callable[[Call], Rule]] = {
    nn.Conv2d: _convolution,
    PackedLastConv: _last_convolution,
    WindowRows: _window_attention,
    PixelRows: _pixels,
    nn.Linear: _linear,
    nn.LayerNorm: _layer_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.ConvTranspose2d: _transposed_convolution,
    F.adaptive_max_pool2d: _largest,
    nn.PixelShuffle: _pixel_shuffle,
    F.pixel_shuffle: _pixel_shuffle,
    nn.PixelUnshuffle: _pixel_unshuffle,
    F.pixel_unshuffle: _pixel_unshuffle,
    nn.Upsample: _upsampling,
    F.interpolate: _upsampling,
    nn.LeakyReLU: _leaky_relu,
    F.leaky_relu: _leaky_relu,
    operator.add: _add,
    torch.add: _add,
    check_whole_windows: _check_windows,
    "to": _cast,
    "narrow": _narrow,
    "repeat_interleave": _repeat,
    torch.repeat_interleave: _repeat,
    **dict.fromkeys(("mean", torch.mean, "sum", torch.sum, "amax", torch.amax), _over_channels),
    "expand": _expand,
    **dict.fromkeys((nn.ReLU, nn.PReLU, F.relu, F.prelu, torch.relu, "relu"), _rectifier),
    **dict.fromkeys(
        (
            nn.ReLU6, nn.Hardtanh, nn.Threshold, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU,
            nn.Mish, nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.Hardswish,
            F.relu6, F.hardtanh, F.threshold, F.elu, F.celu, F.selu, F.gelu, F.silu,
            F.mish, F.sigmoid, F.hardsigmoid, F.tanh, F.hardswish, F.softplus,
            operator.sub, operator.mul, operator.truediv, operator.neg, operator.pow,
            torch.sub, torch.mul, torch.div, torch.neg, torch.abs, torch.clamp, torch.sigmoid, torch.tanh,
            torch.pow, torch.square, torch.sqrt, torch.rsqrt, torch.exp,
            "float", "half", "bfloat16",
            "add", "sub", "mul", "div", "neg", "abs", "clamp", "sigmoid", "tanh", "pow", "square",
            "sqrt", "rsqrt", "exp",
        ),
        _element_wise,
    ),
}  # fmt: skip
"""Operation -> its rule. Element-wise operations share one; a subclass of a module has its parent's."""
