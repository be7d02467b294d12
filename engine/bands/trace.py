"""Trace of a network: the calls that it makes for a small picture, each with its result.

``torch.fx`` runs the network's own code with stand-ins for tensors. Every call is computed at once, so a stand-in knows its
shape, and code that asks for it is traced, too. Parts of a tensor are ``narrow`` in the trace, and writing to a part of one is
``cat``, so operations have one form each.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from engine.archs.last_conv import PackedLastConv
from engine.archs.layers import PixelRows, WindowRows

_FACTS = ("shape", "ndim", "dtype", "device", "itemsize", "is_cuda", "size", "dim", "numel")
"""Attributes and methods of a tensor that do not depend on its numbers."""

_SPLITS = ("split", "chunk")
"""Operations that yield parts of their input, as functions and as methods."""


@dataclass(frozen=True, slots=True)
class Trace:
    """Calls of a network for one picture."""

    graph: fx.Graph
    """Calls in their order."""
    results: Mapping[fx.Node, Any]
    """Results of the calls, and the values of constants."""


def trace(network: nn.Module, picture: Tensor) -> Trace:
    """Run a network on a picture [1, inputs, h, w] and record its calls.

    Branches are taken as for this picture. What the network's code raises where it meets a stand-in is passed on. The network
    is left as it was: torch.fx puts constants into it, and code such as DAT's keeps tensors, here stand-ins, in its modules.
    """
    tracer, before = _Tracer(picture), [(module, dict(vars(module))) for module in network.modules()]
    try:
        return Trace(tracer.trace(network), tracer.results)
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)


class _Tracer(fx.Tracer):
    def __init__(self, picture: Tensor) -> None:
        super().__init__()
        self.results: dict[fx.Node, Any] = {}
        self._picture = picture
        self._interpreter: fx.Interpreter | None = None
        self._computes = False
        """Whether a call is computed, in which modules and parameters are themselves."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, PackedLastConv | PixelRows | WindowRows) or super().is_leaf_module(
            m, module_qualified_name
        )

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:  # noqa: ANN401
        node = super().create_node(kind, target, *args, **kwargs)
        if self._interpreter is None:
            assert isinstance(self.root, nn.Module)
            self._interpreter = fx.Interpreter(self.root, graph=self.graph)
            self._interpreter.env, self._interpreter.args_iter = self.results, iter([self._picture])
        self._computes = True
        try:
            self.results[node] = self._interpreter.run_node(node)
        finally:
            self._computes = False
        return node

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> Any:  # noqa: ANN401
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        if getattr(target, "__name__", target) not in _SPLITS:
            return proxy
        axis, parts = kwargs.get("dim", args[2] if len(args) > 2 else 0), self.results[proxy.node]
        self.graph.erase_node(proxy.node)
        return tuple(_parts(args[0], axis, [part.shape[axis] for part in parts]))

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _StandIn(node, self)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:  # noqa: ANN401
        return forward(*args, **kwargs) if self._computes else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:  # noqa: ANN401
        return attr_val if self._computes else super().getattr(attr, attr_val, parameter_proxy_cache)


class _StandIn(fx.Proxy):
    """Stand-in for a tensor, which tells the shape and the type of the one that was computed."""

    @property
    def _result(self) -> Any:  # noqa: ANN401
        tracer = self.tracer
        assert isinstance(tracer, _Tracer)
        return tracer.results[self.node]

    def __getattr__(self, k: str) -> Any:  # noqa: ANN401
        # `size` and its like are methods: a stand-in has no method of its own but by this one.
        return getattr(self._result, k) if k in _FACTS else super().__getattr__(k)

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401
        cuts = _cuts(index, self._result)
        if cuts is None:
            return self.tracer.create_proxy("call_function", operator.getitem, (self, index), {})
        part: Any = self
        for axis, first, length in cuts:
            part = part.narrow(axis, first, length)
        return part

    def __setitem__(self, index: Any, value: Any) -> None:  # noqa: ANN401
        cuts = _cuts(index, self._result)
        if cuts is None or len(cuts) != 1 or not isinstance(value, fx.Proxy):
            raise NotImplementedError("writing to more than a part along one axis")
        ((axis, first, length),) = cuts
        rest = self._result.shape[axis] - first - length
        before, _, after = _parts(self, axis, [first, length, rest])
        parts: Any = [part for part in (before, value, after) if part is not None]
        joined: Any = torch.cat(parts, axis)
        self.node = joined.node


def _parts(x: Any, axis: int, lengths: list[int]) -> Iterator[Any]:  # noqa: ANN401
    """Parts of a stand-in side by side along an axis, None for empty ones."""
    first = 0
    for length in lengths:
        yield x.narrow(axis, first, length) if length else None
        first += length


def _cuts(index: Any, value: Any) -> list[tuple[int, int, int]] | None:  # noqa: ANN401
    """(axis, first, length) along each axis that an index cuts; None if it does more than that."""
    if not isinstance(value, Tensor):
        return None
    entries = list(index) if isinstance(index, tuple) else [index]
    if any(entry is Ellipsis for entry in entries):
        at = next(i for i, entry in enumerate(entries) if entry is Ellipsis)
        entries[at : at + 1] = [slice(None)] * (value.ndim - len(entries) + 1)
    if len(entries) > value.ndim or not all(isinstance(e, slice) and e.step in (None, 1) for e in entries):
        return None
    ranges = [range(size)[entry] for entry, size in zip(entries, value.shape, strict=False)]
    sizes = enumerate(zip(ranges, value.shape, strict=False))
    return [(axis, cut.start, len(cut)) for axis, (cut, size) in sizes if len(cut) != size]
