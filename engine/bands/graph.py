"""Row graph of a network: its ``torch.fx`` trace as a list of operations, each with the rule for its rows.

Every value has a rate (its rows per row of the network's input) and a delay: once the input's rows above y are known, the
value's rows above ``rate * y - delay`` are known. An operation reads its inputs at a delay of its own (``Schedule``).
Operations without a rule (``engine.bands.rules``) are refused by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn

from engine.bands.rules import Call, Layout, Rule, constant_rule, fused, rule_of
from engine.bands.trace import trace

_PERMUTED = {
    (Layout.NCHW, (0, 2, 3, 1)): Layout.NHWC,
    (Layout.NHWC, (0, 3, 1, 2)): Layout.NCHW,
}
"""(layout, order of its axes) -> layout of the permuted view."""


@dataclass(frozen=True, slots=True)
class Value:
    """Rows that an operation yields."""

    channels: int
    """Number of channels."""
    dtype: torch.dtype
    """Type of its numbers."""
    layout: Layout
    """Layout in which its operation yields it."""
    rate: Fraction
    """Its rows (columns) per row (column) of the network's input."""


@dataclass(frozen=True, slots=True)
class Op:
    """One operation of a network."""

    name: str
    """Name of the value that it yields."""
    inputs: tuple[str, ...]
    """Names of the values, or concatenations of values, that it reads."""
    layouts: tuple[Layout, ...]
    """Layout in which it reads each input."""
    rule: Rule
    """Rows that it reads, and its computation."""


@dataclass(frozen=True, slots=True)
class RowGraph:
    """A network, or a part of one, as operations on rows."""

    input: str
    """Name of the input."""
    output: str
    """Name of the value that is the output."""
    values: dict[str, Value]
    """Values by name; rates are relative to ``input``."""
    ops: tuple[Op, ...]
    """Operations in the order of execution."""
    concatenations: dict[str, tuple[str, ...]]
    """Name of a concatenation -> names of its parts, side by side in channels."""
    skips: tuple[str, ...] = ()
    """Names of further inputs: outputs of earlier parts, at the rows of ``input``."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of all inputs."""
        return self.input, *self.skips

    def macs(self, first: int = 0, end: int | None = None) -> Fraction:
        """Multiply-adds of the operations [first, end) for each input pixel."""
        return sum((op.rule.macs * self.values[op.name].rate ** 2 for op in self.ops[first:end]), Fraction(0))

    def members(self, name: str) -> tuple[str, ...]:
        """Values of a concatenation, nested ones resolved; a value is its own only member."""
        parts = self.concatenations.get(name)
        return (name,) if parts is None else tuple(v for part in parts for v in self.members(part))

    def nested(self, names: Iterable[str]) -> Iterator[str]:
        """The concatenations among ``names``, and those within them."""
        for name in names:
            if name in self.concatenations:
                yield name
                yield from self.nested(self.concatenations[name])

    @property
    def scale(self) -> Fraction:
        """Output rows per input row."""
        return self.values[self.output].rate


@dataclass(frozen=True, slots=True)
class Schedule:
    """Delays of a graph's values and operations."""

    delay: dict[str, int]
    """Value -> its delay, in its own rows."""
    read: dict[str, int]
    """Operation -> delay at which it reads its inputs, in their rows."""


def schedule(graph: RowGraph) -> Schedule:
    """The smallest delays at which every operation finds its input rows complete; none runs earlier than its readers need.

    So what joins the end of a long chain is made there, and not kept for as many rows as the chain reads ahead.
    """
    delay, read = dict.fromkeys(graph.inputs, 0), {}
    slowest: dict[str, int] = {}  # operation -> delay of the last of its inputs
    for op in graph.ops:
        period, residue = op.rule.grid
        slowest[op.name] = max(delay[member] for name in op.inputs for member in graph.members(name))
        earliest = slowest[op.name] + op.rule.reach
        read[op.name] = earliest + (residue - earliest) % period
        delay[op.name] = int(read[op.name] * op.rule.factor)
    needed: dict[str, int] = {}  # value -> largest delay for which no reader waits
    for op in reversed(graph.ops):
        wait = 0
        if op.name in needed and op.name != graph.output and op.rule.grid == (1, 0) and op.rule.factor == 1:
            wait = needed[op.name] - delay[op.name]
            read[op.name] += wait
            delay[op.name] += wait
        last = slowest[op.name] + wait
        for member in (member for name in op.inputs for member in graph.members(name)):
            needed[member] = min(needed.get(member, last), last)
    return Schedule(delay, read)


def split(graph: RowGraph) -> tuple[RowGraph, ...]:
    """The graph cut before its first enlargement, so that the part behind it can process fewer rows at a time.

    Returns the uncut graph if more than one value crosses the cut, or if an operation behind it reads on a grid of rows.
    """
    index = next((i for i, op in enumerate(graph.ops) if op.rule.factor > 1), 0)
    crossing = _crossing(graph, index)
    if len(crossing) != 1 or index == 0 or not _is_plain(graph.ops[index:]):
        return (graph,)
    (value,) = crossing
    return (graph,) if value == graph.input else _cut(graph, index, value)


def radius(graph: RowGraph, align: int) -> int:
    """Radius of the receptive field: input pixels to either side that an output pixel depends on, at the worst phase.

    Args:
        graph: the network.
        align: divisor of every height and width that it accepts; the pattern repeats with it.
    """
    pixels = np.arange(align * int(graph.scale))
    return max(_reached(graph, pixels, in_columns=in_columns) for in_columns in (False, True))


def _reached(graph: RowGraph, pixels: NDArray[np.int64], *, in_columns: bool) -> int:
    """Input rows, or columns, to either side that one of these pixels of an output column, or row, depends on."""
    seen = {graph.output: (pixels, pixels)}
    for op in reversed(graph.ops):
        low, high = seen.pop(op.name)
        factor, (period, residue), columns = op.rule.factor, op.rule.grid, op.rule.column_reach
        if factor >= 1:
            low, high = low // int(factor), high // int(factor)
            low = (low + residue) // period * period - residue
            high = (high + residue) // period * period - residue + period - 1
        else:
            low, high = low * factor.denominator, (high + 1) * factor.denominator - 1
        for index, name in enumerate(op.inputs):
            reach = op.rule.reach_of(index)
            if in_columns and columns is not None:
                reach = columns if reach else 0
            for member in graph.members(name):
                lowest, highest = seen.get(member, (low - reach, high + reach))
                seen[member] = np.minimum(lowest, low - reach), np.maximum(highest, high + reach)
    low, high = seen[graph.input]
    origins = pixels // int(graph.scale)
    return int(max((origins - low).max(), (high - origins).max()))


LINKS = 24
"""Links of a long network, about: its residual groups and both ends."""


def links(graph: RowGraph) -> tuple[RowGraph, ...]:
    """The graph as a chain of links with about equal work, which threads compute at the same time for different bands.

    A link reads the output of the one before, and at most one other value crosses a cut: an earlier link's output (a skip).
    """
    ends: list[int] = []
    crossings: list[set[str]] = []
    outputs = {graph.input}
    for index, op in enumerate(graph.ops[:-1], start=1):
        crossing = _crossing(graph, index)
        skips = crossing - {op.name}
        rates = {graph.values[name].rate for name in crossing}
        is_chain = op.name in crossing and skips <= outputs and len(skips) <= 1 and len(rates) == 1
        if is_chain and _is_plain(graph.ops[index:]):
            ends.append(index)
            crossings.append(skips)
            outputs.add(op.name)
    skipped = set().union(*crossings)
    result: list[RowGraph] = []
    rest, first, least = graph, 0, graph.macs() / LINKS
    for end in ends:
        output = graph.ops[end - 1].name
        if output in skipped or graph.macs(first, end) >= least:
            link, rest = _cut(rest, end - first, output)
            result.append(link)
            first = end
    return (*result, rest)


def _is_plain(ops: Sequence[Op]) -> bool:
    """Whether no operation reads on a grid of rows."""
    return all(op.rule.grid == (1, 0) for op in ops)


def _crossing(graph: RowGraph, index: int) -> set[str]:
    """Values that the operations from ``index`` on read, and do not make."""
    made = {op.name for op in graph.ops[index:]}
    read = {member for op in graph.ops[index:] for name in op.inputs for member in graph.members(name)}
    return read - made


def _cut(graph: RowGraph, index: int, value: str) -> tuple[RowGraph, RowGraph]:
    """The graph before and from operation ``index`` on, which ``value`` connects; other values become skips."""
    head, tail = graph.ops[:index], graph.ops[index:]
    concatenations = [
        {name: graph.concatenations[name] for op in ops for name in graph.nested(op.inputs)} for ops in (head, tail)
    ]
    rate = graph.values[value].rate
    values = {name: replace(v, rate=v.rate / rate) for name, v in graph.values.items()}
    read = {member for op in head for name in op.inputs for member in graph.members(name)}
    skips = tuple(name for name in graph.skips if name in read)
    crossing = tuple(sorted(_crossing(graph, index) - {value}))
    return (
        RowGraph(graph.input, value, graph.values, head, concatenations[0], skips),
        RowGraph(value, graph.output, values, tail, concatenations[1], crossing),
    )


@torch.inference_mode()
def read_graph(
    network: nn.Module, align: int, inputs: int = 3, use_triton: bool | None = None, *, packs: bool = False
) -> RowGraph:
    """Trace a network and find the rule of each of its operations.

    Args:
        network: maps [1, ``inputs``, H, W] to [1, 3, scale * H, scale * W].
        align: divisor of every H and W that the network accepts.
        inputs: channels of the network's input.
        use_triton: whether operations take their kernels; None: where the device has them.
        packs: whether convolutions run on a CPU as ``engine.bands.cpu`` does it, where PyTorch has what that takes.

    Raises:
        UsageError: an operation has no rule; the message names it.
    """
    side = max(8, 2 * align) // align * align
    device = next(network.parameters()).device
    # Sizes that follow the picture's have one factor for rows and columns, unlike sizes that do not.
    traced = trace(network, torch.zeros(1, inputs, side, 2 * side, device=device))
    return _GraphReader(network, traced.results, use_triton, packs).read(traced.graph)


class _GraphReader:
    """Turns the nodes of a trace, in order, into operations and the values between them."""

    def __init__(
        self, network: nn.Module, results: Mapping[fx.Node, Any], use_triton: bool | None, packs: bool
    ) -> None:
        self._use_triton, self._packs = use_triton, packs
        self._modules = dict(network.named_modules())
        self._results = results
        self._views: dict[fx.Node, tuple[str, Layout]] = {}  # node -> (its value, layout of the node's view of it)
        self._aliased: dict[fx.Node, fx.Node] = {}  # node that is a view -> the node that it views
        self._values: dict[str, Value] = {}
        self._ops: list[Op] = []
        self._concatenations: dict[str, tuple[str, ...]] = {}

    def read(self, graph: fx.Graph) -> RowGraph:
        *nodes, output_node = graph.nodes
        for node in nodes:
            if node.op == "placeholder":
                self._add_value(node, Layout.NCHW, Fraction(1))
            elif not self._is_constant(node):
                self._add(node)
        output = self._views[output_node.args[0]][0]
        ops = _fuse(_living(self._ops, self._concatenations, output), self._values, self._concatenations, output)
        return RowGraph(nodes[0].name, output, self._values, tuple(ops), self._concatenations)

    def _is_constant(self, node: fx.Node) -> bool:
        """Whether no rows reach a node, or only their type and device."""
        read = node.args[:1] if node.target in ("to", "type_as") else node.all_input_nodes
        return node.op == "get_attr" or not any(n in self._views for n in read)

    def _add(self, node: fx.Node) -> None:
        call = self._call(node)
        names = tuple(self._views[n][0] for n in call.inputs)
        if len({self._values[n].rate for n in names}) != 1:
            raise call.refusal("its inputs differ in resolution")
        rate = self._values[names[0]].rate
        if (layout := self._layout_of_alias(call)) is not None:
            self._views[node] = (names[0], layout)
            self._aliased[node] = call.inputs[0]
        elif node.target is torch.cat:
            self._concatenations[node.name] = self._parts(call)
            self._add_value(node, call.layout, rate)
        else:
            rule = rule_of(call)
            self._ops.append(Op(node.name, names, tuple(self._views[n][1] for n in call.inputs), rule))
            self._add_value(node, call.layout, rate * rule.factor)

    def _call(self, node: fx.Node) -> Call:
        inputs = tuple(n for n in node.all_input_nodes if n in self._views)
        return Call(
            node=node,
            module=self._modules[str(node.target)] if node.op == "call_module" else None,
            inputs=inputs,
            operands=tuple(self._results[n] for n in inputs),
            layout=self._views[inputs[0]][1],
            constants={n: self._results[n] for n in node.all_input_nodes if n not in self._views},
            result=self._results[node],
            is_shared=self._is_shared(inputs[0]),
            use_triton=self._use_triton,
            packs=self._packs,
        )

    def _is_shared(self, node: fx.Node | None) -> bool:
        """Whether the numbers of a node have more than one reader."""
        while node is not None:
            if len(node.users) > 1:
                return True
            node = self._aliased.get(node)
        return False

    def _add_value(self, node: fx.Node, layout: Layout, rate: Fraction) -> None:
        result = self._results[node]
        self._values[node.name] = Value(result.shape[layout.channels], result.dtype, layout, rate)
        self._views[node] = (node.name, layout)

    def _layout_of_alias(self, call: Call) -> Layout | None:
        """Layout of a call that yields its input's numbers in its input's memory; None for any other call."""
        if call.is_identity:
            return call.layout
        if call.node.target == "permute" and call.node.op == "call_method":
            order = call.node.args[1:] if len(call.node.args) > 2 else call.argument(1, "dims")
            layout = _PERMUTED.get((call.layout, tuple(order)))
            if layout is None:
                raise call.refusal("it moves axes other than rows, columns and channels")
            return layout
        return None

    def _parts(self, call: Call) -> tuple[str, ...]:
        """Values that ``torch.cat`` joins."""
        if call.argument(1, "dim", 0) % 4 != call.layout.channels:
            raise call.refusal("it concatenates along another axis than channels")
        return tuple(
            self._views[n][0] if n in self._views else self._constant_part(call, n) for n in call.argument(0, "tensors")
        )

    def _constant_part(self, call: Call, node: fx.Node) -> str:
        """Value of rows that are all the same, as large as another input of the call."""
        if node.name not in self._values:
            name, layout = self._views[call.inputs[0]]
            self._ops.append(Op(node.name, (name,), (layout,), constant_rule(call, node)))
            self._values[node.name] = replace(
                self._values[name], channels=self._results[node].shape[layout.channels], layout=layout
            )
        return node.name


def _living(ops: Sequence[Op], concatenations: Mapping[str, tuple[str, ...]], output: str) -> list[Op]:
    """The operations that lead to the output."""
    read, living = {output}, []
    for op in reversed(ops):
        if op.name in read:
            living.append(op)
            names = list(op.inputs)
            while names:
                name = names.pop()
                read.add(name)
                names += concatenations.get(name, ())
    return living[::-1]


def _fuse(
    ops: list[Op], values: Mapping[str, Value], concatenations: Mapping[str, tuple[str, ...]], output: str
) -> list[Op]:
    """The operations, where one whose result has a single reader is merged into it, if there is a rule for both.

    The result then needs no memory of its own.
    """
    readers = Counter(name for op in ops for name in op.inputs)
    readers.update(name for parts in concatenations.values() for name in parts)
    readers[output] += 1
    result: dict[str, Op] = {}
    for op in ops:
        for position, name in enumerate(op.inputs):
            first = result.get(name)
            if first is None or readers[name] > 1 or op.layouts[position] is not values[name].layout:
                continue
            rule = fused(first.rule, op.rule, position)
            if rule is not None:
                del result[name]
                inputs, layouts = (
                    (*a, *b[:position], *b[position + 1 :])
                    for a, b in ((first.inputs, op.inputs), (first.layouts, op.layouts))
                )
                op = Op(op.name, inputs, layouts, rule)
                break
        result[op.name] = op
    return list(result.values())
