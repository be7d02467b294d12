"""Runs a convolutional network that shrinks its input over the rows of a picture, top to bottom, with no recomputation.

An operation reads, for its output row o, the input rows [o * stride - padding, o * stride - padding + kernel). So it makes
an output row as soon as those have come, and a row is dropped when its last reader is done with it. Padding is added at
the picture's own borders only, which is why the result is the whole picture's: no overlap, no trimming.

``engine.bands`` streams networks that enlarge, in bands of one fixed shape, for speed. This is for networks with strides,
and for looking.
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


@dataclass(frozen=True, slots=True)
class Window:
    """What one output position reads along one axis."""

    kernel: int = 1
    stride: int = 1
    padding: int = 0

    def outputs(self, length: int) -> int:
        """How many positions an input of this length gives."""
        return (length + 2 * self.padding - self.kernel) // self.stride + 1

    def complete(self, seen: int, length: int) -> int:
        """How many of them the first ``seen`` inputs complete."""
        if seen >= length:
            return self.outputs(length)
        return max(0, (seen + self.padding - self.kernel) // self.stride + 1)

    def reads(self, first: int, last: int) -> tuple[int, int]:
        """[from, to) of the inputs of positions [first, last); they may lie in the padding."""
        return first * self.stride - self.padding, (last - 1) * self.stride - self.padding + self.kernel


@dataclass(frozen=True, slots=True)
class _Op:
    name: str
    inputs: tuple[str, ...]
    rows: Window
    columns: Window
    run: Callable[[Sequence[Tensor], Pads], Tensor]


class StridedNetwork:
    """A network as operations on rows. Its ``forward`` takes [1, C, H, W] and returns a tuple of tensors.

    It may consist of convolutions, max pooling without padding, average pooling that counts its padding,
    BatchNorm in evaluation mode, ReLU and concatenations of channels; else TypeError.
    """

    def __init__(self, network: nn.Module) -> None:
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
        """(height, width) of every value for a picture of this size. Raises InputError when one would be empty."""
        sizes = {self.input: (height, width)}
        for op in self.ops:
            rows, columns = sizes[op.inputs[0]]
            sizes[op.name] = op.rows.outputs(rows), op.columns.outputs(columns)
            if min(sizes[op.name]) < 1:
                raise InputError(f"a picture of {width}x{height} is too small for {self.name}; score larger pictures")
        return sizes


class StridedRowStream:
    """One pass of a network over a picture of (height, width)."""

    def __init__(self, network: StridedNetwork, size: tuple[int, int]) -> None:
        self._network = network
        self._heights = {name: height for name, (height, _) in network.sizes(*size).items()}
        self._held: dict[str, Tensor] = {}
        self._made = dict.fromkeys(network.readers, 0)  # rows of each value so far, held or dropped

    @torch.inference_mode()
    def push(self, rows: Tensor) -> tuple[Tensor | None, ...]:
        """Take the next rows, [1, C, r, W]; returns the rows of every output that they complete, or None."""
        network = self._network
        outputs: dict[str, Tensor | None] = {}
        self._take(network.input, rows)
        for op in network.ops:
            made = self._make(op)
            if made is not None:
                self._take(op.name, made)
            if op.name in network.outputs:
                outputs[op.name] = made
            for name in op.inputs:
                if op is network.readers[name][-1]:
                    self._drop(name)  # at once: what the next operations make takes its place
            if not network.readers[op.name]:
                self._drop(op.name)
        return tuple(outputs[name] for name in network.outputs)

    @property
    def nbytes(self) -> int:
        """Memory held between pushes."""
        return sum(rows.nbytes for rows in self._held.values())

    def _make(self, op: _Op) -> Tensor | None:
        first = self._made[op.name]
        last = min(op.rows.complete(self._made[name], self._heights[name]) for name in op.inputs)
        if last == first:
            return None
        top, bottom = op.rows.reads(first, last)
        height = self._heights[op.inputs[0]]
        views = [self._view(name, max(0, top), min(bottom, height)) for name in op.inputs]
        return op.run(views, (max(0, -top), max(0, bottom - height)))

    def _take(self, name: str, rows: Tensor) -> None:
        self._held[name] = torch.cat([self._held[name], rows], 2) if name in self._held else rows
        self._made[name] += rows.shape[2]

    def _view(self, name: str, top: int, bottom: int) -> Tensor:
        held = self._held[name]
        origin = self._made[name] - held.shape[2]
        return held[:, :, top - origin : bottom - origin]

    def _drop(self, name: str) -> None:
        """Forget the rows that nobody will read again."""
        readers = self._network.readers[name]
        needed = min((max(0, op.rows.reads(self._made[op.name], 0)[0]) for op in readers), default=self._made[name])
        held = self._held.get(name)
        if held is None:
            return
        unread = self._made[name] - needed
        if unread <= 0:
            del self._held[name]
        elif unread < held.shape[2]:
            self._held[name] = held[:, :, -unread:].clone()  # a view would keep all of it alive


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


def _require(node: fx.Node, known: bool) -> None:
    if not known:
        raise TypeError(f"{node.name} ({node.target}) is nothing that StridedNetwork runs over rows")


def _windows(module: Any) -> tuple[Window, Window]:  # noqa: ANN401
    """Of a convolution or a pooling: along the rows and along the columns."""
    kernel, stride, padding = (_pair(n) for n in (module.kernel_size, module.stride, module.padding))
    return Window(kernel[0], stride[0], padding[0]), Window(kernel[1], stride[1], padding[1])


def _pair(n: int | tuple[int, int]) -> tuple[int, int]:
    return (n, n) if isinstance(n, int) else n


def _apply(module: nn.Module) -> Callable[[Sequence[Tensor], Pads], Tensor]:
    def run(views: Sequence[Tensor], pads: Pads) -> Tensor:
        result: Tensor = module(views[0])
        return result

    return run


def _padded(x: Tensor, pads: Pads) -> Tensor:
    return F.pad(x, (0, 0, *pads)) if any(pads) else x


def _convolution(conv: nn.Conv2d) -> Callable[[Sequence[Tensor], Pads], Tensor]:
    columns = _windows(conv)[1]

    def run(views: Sequence[Tensor], pads: Pads) -> Tensor:
        padding = (0, columns.padding)
        return F.conv2d(_padded(views[0], pads), conv.weight, conv.bias, conv.stride, padding, 1, conv.groups)

    return run


def _average(pool: nn.AvgPool2d) -> Callable[[Sequence[Tensor], Pads], Tensor]:
    columns = _windows(pool)[1]

    def run(views: Sequence[Tensor], pads: Pads) -> Tensor:
        # Padded zeros are counted, so zeros that are there give the same average.
        return F.avg_pool2d(_padded(views[0], pads), pool.kernel_size, pool.stride, (0, columns.padding))

    return run
