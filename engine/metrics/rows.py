"""Streaming of strided networks over the rows of an image, from top to bottom, without recomputation.

For its output row o an operation reads the input rows [o * stride - padding, o * stride - padding + kernel). It runs as soon as
these have arrived, and a row is dropped after its last reader. Padding is added at the borders of the image only, so the
result equals that of the whole image, without overlap or trimming.

``engine.bands`` streams networks that enlarge, in bands of one shape, and refuses strides and poolings: all of its values share
one rate and delay. Here every value has its own size, which border rows depend on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from engine.errors import InputError

Pads = tuple[int, int]
"""Rows of padding above and below."""

Run = Callable[[Sequence[Tensor], Pads], Tensor]
"""Views of the inputs' rows, and their padding -> output rows."""


@dataclass(frozen=True, slots=True)
class Window:
    """Input window of one output position along one axis."""

    kernel: int = 1
    stride: int = 1
    padding: int = 0

    def outputs(self, length: int) -> int:
        """Number of output positions of an input of this length."""
        return (length + 2 * self.padding - self.kernel) // self.stride + 1

    def complete(self, seen: int, length: int) -> int:
        """Number of output positions that the first ``seen`` of ``length`` inputs complete."""
        if seen >= length:
            return self.outputs(length)
        return max(0, (seen + self.padding - self.kernel) // self.stride + 1)

    def reads(self, first: int, last: int) -> tuple[int, int]:
        """Input interval [from, to) of the positions [first, last); it may reach into the padding."""
        return first * self.stride - self.padding, (last - 1) * self.stride - self.padding + self.kernel


@dataclass(frozen=True, slots=True)
class _Op:
    name: str
    inputs: tuple[str, ...]
    rows: Window
    columns: Window
    run: Run


class StridedNetwork:
    """A network as a list of operations on rows."""

    def __init__(self, network: nn.Module) -> None:
        """Trace the network.

        Args:
            network: its ``forward`` maps [1, C, H, W] to a tuple of tensors. It consists of convolutions, max pooling
                without padding, average pooling that counts its padding, BatchNorm in evaluation mode, ReLU and
                concatenations of channels.

        Raises:
            TypeError: the network has another operation.
        """
        self.name = type(network).__name__
        graph = fx.symbolic_trace(network).graph
        nodes = list(graph.nodes)
        modules = dict(network.named_modules())
        self.input = nodes[0].name
        self.ops = tuple(_op(node, modules) for node in nodes[1:-1])
        self.outputs: tuple[str, ...] = tuple(node.name for node in nodes[-1].args[0])
        self.readers: dict[str, list[_Op]] = {name: [] for name in (self.input, *(op.name for op in self.ops))}
        for op in self.ops:
            for name in op.inputs:
                self.readers[name].append(op)

    def sizes(self, height: int, width: int) -> dict[str, tuple[int, int]]:
        """(height, width) of every value for an image of this size.

        Raises:
            InputError: a value would be empty.
        """
        sizes = {self.input: (height, width)}
        for op in self.ops:
            rows, columns = sizes[op.inputs[0]]
            sizes[op.name] = op.rows.outputs(rows), op.columns.outputs(columns)
            if min(sizes[op.name]) < 1:
                raise InputError(f"a picture of {width}x{height} is too small for {self.name}; score larger pictures")
        return sizes


class StridedRowStream:
    """One pass of a network over an image of (height, width)."""

    def __init__(self, network: StridedNetwork, size: tuple[int, int]) -> None:
        self._network = network
        self._heights = {name: height for name, (height, _) in network.sizes(*size).items()}
        self._buffers: dict[str, Tensor] = {}
        self._done = dict.fromkeys(network.readers, 0)  # rows of each value so far, dropped ones included

    @torch.inference_mode()
    def push(self, rows: Tensor) -> tuple[Tensor | None, ...]:
        """Process the next rows [1, C, r, W]; returns the rows of every output that they complete, or None."""
        network = self._network
        outputs: dict[str, Tensor | None] = {}
        self._append(network.input, rows)
        for op in network.ops:
            output = self._compute(op)
            if output is not None:
                self._append(op.name, output)
            if op.name in network.outputs:
                outputs[op.name] = output
            for name in op.inputs:
                if op is network.readers[name][-1]:
                    self._drop(name)  # at once, so that the next operations reuse the memory
            if not network.readers[op.name]:
                self._drop(op.name)
        return tuple(outputs[name] for name in network.outputs)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows that are kept between pushes."""
        return sum(rows.nbytes for rows in self._buffers.values())

    def _compute(self, op: _Op) -> Tensor | None:
        first = self._done[op.name]
        last = min(op.rows.complete(self._done[name], self._heights[name]) for name in op.inputs)
        if last == first:
            return None
        top, bottom = op.rows.reads(first, last)
        height = self._heights[op.inputs[0]]
        views = [self._view(name, max(0, top), min(bottom, height)) for name in op.inputs]
        return op.run(views, (max(0, -top), max(0, bottom - height)))

    def _append(self, name: str, rows: Tensor) -> None:
        self._buffers[name] = torch.cat([self._buffers[name], rows], 2) if name in self._buffers else rows
        self._done[name] += rows.shape[2]

    def _view(self, name: str, top: int, bottom: int) -> Tensor:
        buffer = self._buffers[name]
        origin = self._done[name] - buffer.shape[2]
        return buffer[:, :, top - origin : bottom - origin]

    def _drop(self, name: str) -> None:
        """Drop the rows that no operation will read again."""
        readers = self._network.readers[name]
        needed = min((max(0, op.rows.reads(self._done[op.name], 0)[0]) for op in readers), default=self._done[name])
        buffer = self._buffers.get(name)
        if buffer is None:
            return
        unread = self._done[name] - needed
        if unread <= 0:
            del self._buffers[name]
        elif unread < buffer.shape[2]:
            self._buffers[name] = buffer[:, :, -unread:].clone()  # a view would keep the whole buffer alive


def _op(node: fx.Node, modules: dict[str, nn.Module]) -> _Op:
    inputs = tuple(n.name for n in node.all_input_nodes)
    module = modules[str(node.target)] if node.op == "call_module" else None
    if node.target is torch.cat:
        return _Op(node.name, inputs, Window(), Window(), lambda views, pads: torch.cat(list(views), 1))
    if isinstance(module, nn.Conv2d):
        _require(node, module.padding_mode == "zeros" and module.dilation == (1, 1))
        return _Op(node.name, inputs, *_windows(module), _convolution(module))
    if isinstance(module, nn.MaxPool2d):
        _require(node, module.padding == 0 and module.dilation == 1 and not module.ceil_mode)
        return _Op(node.name, inputs, *_windows(module), _apply(module))
    if isinstance(module, nn.AvgPool2d):
        _require(node, module.count_include_pad and module.divisor_override is None and not module.ceil_mode)
        return _Op(node.name, inputs, *_windows(module), _average(module))
    _require(node, isinstance(module, nn.BatchNorm2d | nn.ReLU) and not module.training)
    assert module is not None
    return _Op(node.name, inputs, Window(), Window(), _apply(module))


def _require(node: fx.Node, condition: bool) -> None:
    if not condition:
        raise TypeError(f"{node.name} ({node.target}): StridedNetwork cannot run this operation row by row")


def _windows(module: Any) -> tuple[Window, Window]:  # noqa: ANN401
    """Windows of a convolution or pooling along the rows and along the columns."""
    kernel, stride, padding = (_pair(n) for n in (module.kernel_size, module.stride, module.padding))
    return Window(kernel[0], stride[0], padding[0]), Window(kernel[1], stride[1], padding[1])


def _pair(n: int | tuple[int, int]) -> tuple[int, int]:
    return (n, n) if isinstance(n, int) else n


def _apply(module: nn.Module) -> Run:
    def run(views: Sequence[Tensor], pads: Pads) -> Tensor:
        result: Tensor = module(views[0])
        return result

    return run


def _padded(x: Tensor, pads: Pads) -> Tensor:
    return F.pad(x, (0, 0, *pads)) if any(pads) else x


def _convolution(conv: nn.Conv2d) -> Run:
    columns = _windows(conv)[1]

    def run(views: Sequence[Tensor], pads: Pads) -> Tensor:
        padding = (0, columns.padding)
        return F.conv2d(_padded(views[0], pads), conv.weight, conv.bias, conv.stride, padding, 1, conv.groups)

    return run


def _average(pool: nn.AvgPool2d) -> Run:
    columns = _windows(pool)[1]

    def run(views: Sequence[Tensor], pads: Pads) -> Tensor:
        # The average counts padding, so explicit zeros give the same result.
        return F.avg_pool2d(_padded(views[0], pads), pool.kernel_size, pool.stride, (0, columns.padding))

    return run
