"""What a network does to rows: its ``torch.fx`` trace as a list of operations that each know which rows they need.

Every value has a rate (its rows for each row of the input) and a delay (how many of its own rows it lags behind the
input): after the input's rows up to y, a value has its rows up to rate * y - delay. An operation reads its inputs at a
delay of its own, with ``reach`` rows more on either side (``Schedule``). Only operations that need a bounded number of
rows can stream; any other one is refused by name.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from engine.archs.layers import WindowRows, check_whole_windows
from engine.errors import UsageError

PLANES, TOKENS = 2, 1
"""The axis of the rows: of [1, C, H, W] and of [1, H, W, C]. In memory both are [H, W, C]."""

_CHANNELS = ((PLANES, 1), (TOKENS, 3))
"""The axis of the rows and, in that layout, of the channels."""

_PERMUTED: dict[tuple[int, ...], tuple[int, int]] = {(0, 2, 3, 1): (PLANES, TOKENS), (0, 3, 1, 2): (TOKENS, PLANES)}

_FUNCTIONS = {
    operator.add, operator.sub, operator.mul, operator.truediv, operator.neg,
    torch.add, torch.sub, torch.mul, torch.div, torch.neg, torch.abs, torch.clamp, torch.relu, torch.sigmoid, torch.tanh,
    F.leaky_relu, F.relu, F.gelu, F.silu, F.elu, F.hardswish, F.mish, F.softplus, F.prelu, F.sigmoid, F.tanh,
    check_whole_windows,
}  # fmt: skip
_METHODS = {
    "to",
    "float",
    "half",
    "bfloat16",
    "add",
    "sub",
    "mul",
    "div",
    "neg",
    "abs",
    "clamp",
    "relu",
    "sigmoid",
    "tanh",
}
_MODULES = (
    nn.LeakyReLU, nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.ELU, nn.PReLU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Mish,
    nn.Identity, nn.Dropout, nn.BatchNorm2d,
)  # fmt: skip
_PER_TOKEN = (nn.Linear, nn.LayerNorm)


@dataclass(frozen=True, slots=True)
class Value:
    """What an operation yields. ``axis``: PLANES or TOKENS; ``rate`` holds for its columns too."""

    channels: int
    dtype: torch.dtype
    axis: int
    rate: Fraction


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows [top, top + count) that an operation is to make, of a picture whose rows are [low, high)."""

    top: int
    count: int
    low: int
    high: int

    @property
    def outside(self) -> bool:
        return self.top + self.count <= self.low or self.top >= self.high

    @property
    def inside(self) -> bool:
        return self.top >= self.low and self.top + self.count <= self.high

    def grow(self, reach: int) -> Rows:
        return replace(self, top=self.top - reach, count=self.count + 2 * reach)

    def scale(self, factor: Fraction) -> Rows:
        return Rows(*(int(n * factor) for n in (self.top, self.count, self.low, self.high)))


Run = Callable[[Sequence[Tensor], Rows], Tensor]
"""Views of the inputs' rows in their own layout, and the output's rows -> the output in its layout."""

Into = Callable[[Sequence[Tensor], Tensor], object]
"""The same without knowing rows, written to the second argument."""


def _copy(views: Sequence[Tensor], out: Tensor) -> None:
    out.copy_(views[0])


@dataclass(frozen=True, slots=True)
class Rule:
    """How one kind of operation treats rows: ``run`` makes them, ``into`` takes them to where they belong; or ``into``
    alone makes them there, which saves a pass over memory.

    ``factor``: output rows for each input row; ``across``: how many columns on either side it reads, if its columns can
    be made some at a time.
    """

    run: Run | None
    into: Into = _copy
    factor: Fraction = Fraction(1)
    reach: int = 0
    across: int | None = None
    grid: tuple[int, int] = (1, 0)  # (period, residue) that the delay at which it reads must have
    macs: int = 0  # multiply-adds for each output pixel
    workspace: int = 0  # bytes that the operation itself takes for each output pixel while it runs


@dataclass(frozen=True, slots=True)
class Op:
    """One step of the network: the value of its name from ``inputs``, which it sees with their rows along ``axes``."""

    name: str
    inputs: tuple[str, ...]
    axes: tuple[int, ...]
    rule: Rule


@dataclass(frozen=True, slots=True)
class RowGraph:
    """A network, or a part of one, as operations on rows; rates are relative to its input.

    ``concatenations``: name -> the values that lie side by side in it.
    """

    input: str
    output: str
    values: dict[str, Value]
    ops: tuple[Op, ...]
    concatenations: dict[str, tuple[str, ...]]

    @property
    def scale(self) -> Fraction:
        return self.values[self.output].rate


@dataclass(frozen=True, slots=True)
class Schedule:
    """``delay``: of every value, in its own rows; ``read``: of every operation, in its inputs' rows."""

    delay: dict[str, int]
    read: dict[str, int]


def schedule(graph: RowGraph) -> Schedule:
    """The smallest delays with which every operation finds the rows that it needs."""
    delay, read = {graph.input: 0}, {}

    def of(name: str) -> int:
        parts = graph.concatenations.get(name)
        return delay[name] if parts is None else max(map(of, parts))

    for op in graph.ops:
        period, residue = op.rule.grid
        at = max(map(of, op.inputs)) + op.rule.reach
        read[op.name] = at + (residue - at) % period
        delay[op.name] = int(read[op.name] * op.rule.factor)
    return Schedule(delay, read)


def split(graph: RowGraph) -> tuple[RowGraph, ...]:
    """The graph, or its parts before and after the first enlargement, which can then take fewer rows at a time.

    It is cut only where one value passes; operations on a grid of rows stay before the cut.
    """
    index = next((i for i, op in enumerate(graph.ops) if op.rule.factor > 1), 0)
    tail = graph.ops[index:]
    made = {o.name for o in tail}
    inside = {n: p for n, p in graph.concatenations.items() if made.intersection(p)}
    needed = {n for o in tail for n in o.inputs if n not in inside} | {n for p in inside.values() for n in p}
    passing = needed - made - inside.keys()
    if len(passing) != 1 or index == 0 or any(o.rule.grid != (1, 0) for o in tail):
        return (graph,)
    (cut,) = passing
    if cut in graph.concatenations or cut == graph.input:
        return (graph,)
    rate = graph.values[cut].rate
    outside = {n: p for n, p in graph.concatenations.items() if n not in inside}
    values = {n: replace(graph.values[n], rate=graph.values[n].rate / rate) for n in (cut, *made, *inside)}
    before = RowGraph(graph.input, cut, graph.values, graph.ops[:index], outside)
    return before, RowGraph(cut, graph.output, values, tail, inside)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, WindowRows) or super().is_leaf_module(m, module_qualified_name)


class _Recorder(fx.Interpreter):
    """Runs the trace once on a small picture and keeps what every node yields."""

    def __init__(self, network: nn.Module, graph: fx.Graph) -> None:
        super().__init__(network, graph=graph)
        self.seen: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:  # noqa: ANN401
        self.seen[n] = super().run_node(n)
        return self.seen[n]


@torch.inference_mode()
def read_graph(network: nn.Module, align: int, inputs: int = 3) -> RowGraph:
    """The rows that ``network`` ([1, inputs, H, W] -> [1, 3, scale H, scale W]) needs; ``align``: what H and W are multiples
    of.

    Raises UsageError, by name, for an operation that looks at more than a bounded number of rows.
    """
    graph = _Tracer().trace(network)
    recorder = _Recorder(network, graph)
    side = max(8, 2 * align) // align * align
    device = next(network.parameters()).device
    recorder.run(torch.zeros(1, inputs, side, side, device=device))
    return _Reader(network, recorder.seen).read(graph)


class _Reader:
    """Turns nodes into operations, in order, and remembers where every value lies."""

    def __init__(self, network: nn.Module, seen: Mapping[fx.Node, Any]) -> None:
        self._modules = dict(network.named_modules())
        self._seen = seen
        self._alias: dict[fx.Node, tuple[str, int]] = {}  # node -> value, and the axis of its rows in the node's view
        self._values: dict[str, Value] = {}
        self._ops: list[Op] = []
        self._concatenations: dict[str, tuple[str, ...]] = {}

    def read(self, graph: fx.Graph) -> RowGraph:
        nodes = list(graph.nodes)
        for node in nodes[:-1]:
            if node.op == "placeholder":
                self._name(node, PLANES, Fraction(1))
            elif node.op != "get_attr":
                self._add(node)
        output = self._alias[nodes[-1].args[0]][0]
        return RowGraph(nodes[0].name, output, self._values, tuple(self._fused(output)), self._concatenations)

    def _fused(self, output: str) -> Iterator[Op]:
        """The operations, with one that ``into`` alone makes, of one value that nobody else reads, done on that value's way."""
        readers = Counter(name for op in self._ops for name in op.inputs)
        readers.update(name for parts in self._concatenations.values() for name in parts)
        readers[output] += 1
        following = {op.inputs: op for op in self._ops if op.rule.run is None and op.rule.factor == 1}
        done: set[str] = set()
        for op in self._ops:
            if op.name in done:
                continue
            after = following.get((op.name,))
            if (
                op.rule.into is _copy
                and readers[op.name] == 1
                and after
                and after.axes[0] == self._values[op.name].axis
            ):
                done.add(after.name)
                op = replace(op, name=after.name, rule=replace(op.rule, into=after.rule.into))
            yield op

    def _add(self, node: fx.Node) -> None:
        inputs = [n for n in node.all_input_nodes if n in self._alias]
        names = [self._alias[n][0] for n in inputs]
        if len({self._values[n].rate for n in names}) != 1:
            raise _refusal(node, self._module(node), "its inputs differ in resolution")
        rate, axis = self._values[names[0]].rate, self._alias[inputs[0]][1]
        if self._is_alias(node, inputs):
            self._alias[node] = (names[0], _PERMUTED[_axes(node)][1] if node.target == "permute" else axis)
        elif node.target is torch.cat:
            self._concatenate(node, axis)
            self._name(node, axis, rate)
        else:
            rule = self._rule(node, inputs, axis)
            self._ops.append(Op(node.name, tuple(names), tuple(self._alias[n][1] for n in inputs), rule))
            self._name(node, axis, rate * rule.factor)

    def _name(self, node: fx.Node, axis: int, rate: Fraction) -> None:
        """Record the node's own value."""
        result = self._seen[node]
        self._values[node.name] = Value(result.shape[1 if axis == PLANES else 3], result.dtype, axis, rate)
        self._alias[node] = (node.name, axis)

    def _is_alias(self, node: fx.Node, inputs: Sequence[fx.Node]) -> bool:
        """Whether the node changes no number and no order in memory."""
        if node.op != "call_method":
            return False
        if node.target == "permute":
            if _PERMUTED.get(_axes(node), (0, 0))[0] != self._alias[inputs[0]][1]:
                raise _refusal(node, None, "it moves other axes than rows, columns and channels")
            return True
        return node.target == "to" and self._seen[node].dtype == self._values[self._alias[inputs[0]][0]].dtype

    def _concatenate(self, node: fx.Node, axis: int) -> None:
        parts: Any
        dim: Any
        parts, dim = (*node.args, *node.kwargs.values(), 0)[:2]
        if (axis, dim % 4) not in _CHANNELS:
            raise _refusal(node, None, "it does not concatenate channels")
        self._concatenations[node.name] = tuple(self._alias[n][0] for n in parts)

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self._modules[str(node.target)] if node.op == "call_module" else None

    def _rule(self, node: fx.Node, inputs: Sequence[fx.Node], axis: int) -> Rule:
        module = self._module(node)
        if isinstance(module, nn.Conv2d):
            return _convolution(node, module)
        if isinstance(module, WindowRows):
            return _window_attention(module)
        if (shuffle := _shuffle(node, module)) is not None:
            return shuffle
        if node.target is F.interpolate or isinstance(module, nn.Upsample):
            return self._interpolation(node, module)
        if not self._is_row_by_row(node, module, axis):
            raise _refusal(node, module, "it looks at more than a bounded number of rows")
        if (into := _into(node, module, len(inputs))) is not None:
            return Rule(None, into, across=0)
        across = None if node.target is check_whole_windows else 0  # it looks at the width
        return Rule(self._call(node, inputs, module), across=across, macs=_linear_macs(module))

    def _interpolation(self, node: fx.Node, module: nn.Module | None) -> Rule:
        given = node.kwargs if module is None else {k: getattr(module, k) for k in ("size", "scale_factor", "mode")}
        factor, mode = given.get("scale_factor"), given.get("mode", "nearest")
        corners = given.get("align_corners") or getattr(module, "align_corners", None)
        if isinstance(factor, tuple) and len(set(factor)) == 1:
            factor = factor[0]
        if not isinstance(factor, int | float) or factor != int(factor) or given.get("size") is not None:
            raise _refusal(node, module, "only whole factors, the same for rows and columns, can")
        scale = int(factor)
        if mode == "nearest":
            return Rule(None, _repeat_into(scale), Fraction(scale), across=0)
        if mode == "bilinear" and not corners:
            # The rows with their border, and the enlarged border that is cut off again.
            workspace = 2 * self._seen[node].shape[1] * self._seen[node].itemsize
            return Rule(_bilinear(scale), factor=Fraction(scale), reach=1, workspace=workspace)
        raise _refusal(node, module, f"mode {mode} with these corners is not known")

    def _is_row_by_row(self, node: fx.Node, module: nn.Module | None, axis: int) -> bool:
        if getattr(module, "inplace", False) or node.kwargs.get("inplace"):
            # It writes on what others may read; the engine's own networks and most of the community's do without.
            return len(node.all_input_nodes[0].users) == 1
        if node.target == "narrow":
            return len(node.args) > 1 and (axis, int(node.args[1]) % 4) in _CHANNELS  # type: ignore[arg-type]
        if isinstance(module, nn.LayerNorm):
            return axis == TOKENS and len(module.normalized_shape) == 1
        if isinstance(module, nn.Linear):
            return axis == TOKENS
        if isinstance(module, nn.BatchNorm2d):
            return not module.training and module.running_mean is not None
        return isinstance(module, _MODULES) or node.target in (_METHODS if node.op == "call_method" else _FUNCTIONS)

    def _call(self, node: fx.Node, inputs: Sequence[fx.Node], module: nn.Module | None) -> Run:
        """The node itself, on views instead of whole pictures."""
        constants = {n: self._seen[n] for n in node.all_input_nodes if n not in self._alias}

        def run(views: Sequence[Tensor], rows: Rows) -> Tensor:
            at = {**constants, **dict(zip(inputs, views, strict=True))}
            args, kwargs = fx.node.map_arg(node.args, at.__getitem__), fx.node.map_arg(node.kwargs, at.__getitem__)
            result: Tensor
            if node.op == "call_method":
                result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                result = (module or node.target)(*args, **kwargs)  # type: ignore[operator]
            return result

        return run


def _axes(node: fx.Node) -> tuple[int, ...]:
    axes = node.args[1:]
    return tuple(axes[0] if len(axes) == 1 else axes)  # type: ignore[arg-type]


def _refusal(node: fx.Node, module: nn.Module | None, reason: str) -> UsageError:
    kind = type(module).__name__ if module is not None else getattr(node.target, "__name__", str(node.target))
    return UsageError(f"{kind} ({node.name}) cannot be streamed in bands: {reason}; use --executor tiles")


def _into(node: fx.Node, module: nn.Module | None, inputs: int) -> Into | None:
    """For what the engine's networks do between convolutions. ``inputs``: how many of its arguments are rows."""
    if node.target == "to":
        return _copy
    if node.target is F.leaky_relu or isinstance(module, nn.LeakyReLU):
        slope = module.negative_slope if isinstance(module, nn.LeakyReLU) else node.kwargs.get("negative_slope", 0.01)
        return lambda views, out: torch.ops.aten.leaky_relu.out(views[0], slope, out=out)
    if node.target in (operator.add, torch.add) and inputs == 2 and node.args == (*node.all_input_nodes,):
        alpha: Any = node.kwargs.get("alpha", 1)
        return lambda views, out: torch.add(views[0], views[1], alpha=alpha, out=out)
    return None


def _repeat_into(scale: int) -> Into:
    def into(views: Sequence[Tensor], out: Tensor) -> None:
        """Nearest-neighbour enlargement of [1, C, H, W]: every pixel to ``scale`` rows and columns."""
        channels, height, width = out.shape[1:]
        cells = out[0].view(channels, height // scale, scale, width // scale, scale)
        cells.copy_(views[0][0, :, :, None, :, None].expand(cells.shape))

    return into


def _linear_macs(module: nn.Module | None) -> int:
    return module.in_features * module.out_features if isinstance(module, nn.Linear) else 0


def _convolution(node: fx.Node, conv: nn.Conv2d) -> Rule:
    height, width = conv.kernel_size
    same = [d * (k // 2) for d, k in zip(conv.dilation, (height, width), strict=True)]
    padding = same if conv.padding == "same" else list(conv.padding)
    if conv.stride != (1, 1) or height % 2 == 0 or width % 2 == 0 or padding != same or conv.padding_mode != "zeros":
        raise _refusal(node, conv, "only stride 1, odd kernels and zero padding to the same size can")

    def run(views: Sequence[Tensor], rows: Rows) -> Tensor:
        return F.conv2d(views[0], conv.weight, conv.bias, 1, (0, same[1]), conv.dilation, conv.groups)

    macs = conv.in_channels // conv.groups * conv.out_channels * height * width
    return Rule(run, reach=same[0], across=same[1], macs=macs)


def _window_attention(layer: WindowRows) -> Rule:
    window, shift = layer.window, layer.shift

    def run(views: Sequence[Tensor], rows: Rows) -> Tensor:
        tops = range(rows.top, rows.top + rows.count, window)
        seams = [i for i, y in enumerate(tops) if y < rows.low < y + window or y < rows.high < y + window]
        return layer.attend(views[0], seams)

    macs = sum(_linear_macs(m) for m in layer.modules())
    return Rule(run, grid=(window, -shift % window), macs=macs, workspace=layer.workspace)


def _shuffle(node: fx.Node, module: nn.Module | None) -> Rule | None:
    if isinstance(module, nn.PixelShuffle | nn.PixelUnshuffle):
        up = isinstance(module, nn.PixelShuffle)
        factor = module.upscale_factor if isinstance(module, nn.PixelShuffle) else module.downscale_factor
    elif node.target in (F.pixel_shuffle, F.pixel_unshuffle):
        up, factor = node.target is F.pixel_shuffle, int((*node.args[1:], *node.kwargs.values())[0])  # type: ignore[arg-type]
    else:
        return None
    if up:
        return Rule(lambda views, rows: F.pixel_shuffle(views[0], factor), factor=Fraction(factor))
    return Rule(lambda views, rows: F.pixel_unshuffle(views[0], factor), factor=Fraction(1, factor), grid=(factor, 0))


def _bilinear(scale: int) -> Run:
    def run(views: Sequence[Tensor], rows: Rows) -> Tensor:
        read = rows.scale(Fraction(1, scale)).grow(1)
        # Beyond the border PyTorch repeats the picture's first and last row.
        index = torch.arange(read.top, read.top + read.count).clamp(read.low, read.high - 1) - read.top
        view = views[0] if read.inside else views[0][:, :, index.clamp(0, read.count - 1).to(views[0].device)]
        return F.interpolate(view, scale_factor=scale, mode="bilinear")[:, :, scale:-scale]

    return run
