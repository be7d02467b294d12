"""Frozen statistics: what a network computes over the whole picture, recorded from tiles and taken as constants by every tile.

Squeeze-excitation averages a map, GroupNorm takes its mean and variance, channel attention multiplies its queries and keys:
each is an operation whose inputs grow with the picture and whose result does not. Two small runs of different shapes find these
*sites*. Their results are averages over pixels, so tiles can record them. With the results as constants, a network is local.

Knows operations and shapes, no architecture. Whether a network is local then is measured by ``engine.probe.reach``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.geometry import Box
from engine.io.files import replacing
from engine.run.operations import Args, Operations

_aten = torch.ops.aten

Shape = tuple[int, int]
"""(height, width) of a picture or a tile, in LR pixels."""


@dataclass(frozen=True, slots=True)
class Axes:
    """Spatial axes of a tensor whose size follows that of the picture."""

    rows: int
    """Axis of the rows, or of all pixels where rows and columns are one axis."""
    columns: int | None
    """Axis of the columns; None if ``rows`` holds all pixels."""
    factor: float
    """Rows for each LR row."""
    extra: float = 0.0
    """Rows beyond that: negative where unpadded convolutions cut the border off."""

    def extent(self, shape: Shape) -> Shape:
        """Rows and columns for a tile or a picture of this shape."""
        height, width = (round(self.factor * side + self.extra) for side in shape)
        return height, width

    def cut(self, x: Tensor, core: Core) -> Tensor:
        """The part of ``x`` that belongs to the core of a tile."""
        if core.is_whole:
            return x
        (top, bottom), (left, right) = (self._range(side, core) for side in (0, 1))
        if self.columns is not None:
            return x.narrow(self.rows, top, bottom - top).narrow(self.columns, left, right - left)
        height, width = self.extent(core.shape)
        image = x.reshape(*x.shape[: self.rows], height, width, *x.shape[self.rows + 1 :])
        return (
            image.narrow(self.rows, top, bottom - top)
            .narrow(self.rows + 1, left, right - left)
            .flatten(self.rows, self.rows + 1)
        )

    def _range(self, side: int, core: Core) -> tuple[int, int]:
        """Half-open range of rows (side 0) or columns of the core."""
        first, last = ((core.box.y0, core.box.y1), (core.box.x0, core.box.x1))[side]
        start, stop = (round(self.factor * n + self.extra / 2) for n in (first, last))
        return (start if first else 0), (stop if last < core.shape[side] else self.extent(core.shape)[side])


@dataclass(frozen=True, slots=True)
class Core:
    """Part of a tile that no other tile has, in LR pixels of the tile. At the picture's border it reaches the tile's."""

    box: Box
    shape: Shape
    """(height, width) of the tile."""

    @property
    def is_whole(self) -> bool:
        """Whether the core is all of the tile."""
        return self.box == Box(0, 0, *self.shape)


@dataclass(frozen=True, slots=True)
class Site:
    """An operation of a network whose result does not grow with the picture."""

    operation: str
    """Name of the operation."""
    axes: tuple[Axes, ...]
    """Spatial axes of its tensors, which it reduces."""

    def pixels(self, shape: Shape) -> int:
        """Pixels that it reduces in a picture or tile of this shape."""
        return math.prod(self.axes[0].extent(shape))


@dataclass(frozen=True, slots=True)
class _Kind:
    """How an operation is recorded and replaced. Moments are averages over pixels, so those of tiles can be averaged."""

    moments: Callable[[Any, Args, dict[str, Any], Sequence[Tensor], int], Tensor]
    """(operation, arguments, options, tensors of the core, their pixels) -> moments, float64."""
    result: Callable[[Args, dict[str, Any], Tensor, int], Any]
    """(arguments, options, moments, pixels of the picture) -> result."""
    tensors: int = 1
    """Number of its first arguments that are reduced."""
    grows: int = 0
    """Number of its first results that grow with the picture."""


def _mean(func: Any, args: Args, kwargs: dict[str, Any], cores: Sequence[Tensor], pixels: int) -> Tensor:  # noqa: ANN401
    return func(*cores, *args[len(cores) :], **kwargs).double()  # type: ignore[no-any-return]


def _per_pixel(func: Any, args: Args, kwargs: dict[str, Any], cores: Sequence[Tensor], pixels: int) -> Tensor:  # noqa: ANN401
    return _mean(func, args, kwargs, cores, pixels) / pixels


def _square(func: Any, args: Args, kwargs: dict[str, Any], cores: Sequence[Tensor], pixels: int) -> Tensor:  # noqa: ANN401
    return _mean(func, args, kwargs, cores, pixels).square() / pixels


def _variance(func: Any, args: Args, kwargs: dict[str, Any], cores: Sequence[Tensor], pixels: int) -> Tensor:  # noqa: ANN401
    """Mean, and mean of the squares, behind each other."""
    options = {key: value for key, value in kwargs.items() if key != "correction"}
    variance, mean = (t.double() for t in torch.var_mean(cores[0].float(), *args[1:], correction=0, **options))
    return torch.stack([mean, variance + mean.square()])


def _group_norm(func: Any, args: Args, kwargs: dict[str, Any], cores: Sequence[Tensor], pixels: int) -> Tensor:  # noqa: ANN401
    groups = args[6]
    return _variance(func, (None, -1), {}, [cores[0].reshape(cores[0].shape[0], groups, -1)], pixels)


def _var_mean_of(args: Args, kwargs: dict[str, Any], moments: Tensor, pixels: int) -> tuple[Tensor, Tensor]:
    """Variance, corrected for as many values as there are pixels, and mean."""
    correction = kwargs.get("correction")
    variance = (moments[1] - moments[0].square()).clamp(min=0)
    return variance * (pixels / max(1, pixels - (1 if correction is None else correction))), moments[0]


def _normalised(args: Args, kwargs: dict[str, Any], moments: Tensor, pixels: int) -> tuple[Tensor, Tensor, Tensor]:
    """As ``native_group_norm``, for the moments [2, batch, groups]."""
    x, weight, bias, batch, channels, _, groups, eps = args
    mean = moments[0]
    rstd = ((moments[1] - mean.square()).clamp(min=0) + eps).rsqrt()
    factor, offset = (t.repeat_interleave(channels // groups, 1) for t in (rstd, -mean * rstd))  # [batch, channels]
    if weight is not None:
        factor, offset = factor * weight, offset * weight
    if bias is not None:
        offset = offset + bias
    shape = (batch, channels, *[1] * (x.ndim - 2))
    y = torch.addcmul(offset.to(x.dtype).view(shape), x, factor.to(x.dtype).view(shape))
    return y, mean.to(x.dtype), rstd.to(x.dtype)


_PRODUCT = _Kind(_per_pixel, lambda args, kwargs, m, n: (m * n).to(args[0].dtype), tensors=2)

_KINDS: dict[Any, _Kind] = {
    _aten.mean: _Kind(_mean, lambda args, kwargs, m, n: m.to(args[0].dtype)),
    _aten.sum: _Kind(_per_pixel, lambda args, kwargs, m, n: (m * n).to(args[0].dtype)),
    _aten.linalg_vector_norm: _Kind(_square, lambda args, kwargs, m, n: (m * n).sqrt().to(args[0].dtype)),
    _aten.var_mean: _Kind(
        _variance, lambda args, kwargs, m, n: tuple(t.to(args[0].dtype) for t in _var_mean_of(args, kwargs, m, n))
    ),
    _aten.var: _Kind(_variance, lambda args, kwargs, m, n: _var_mean_of(args, kwargs, m, n)[0].to(args[0].dtype)),
    _aten.std: _Kind(
        _variance, lambda args, kwargs, m, n: _var_mean_of(args, kwargs, m, n)[0].sqrt().to(args[0].dtype)
    ),
    _aten.native_group_norm: _Kind(_group_norm, _normalised, grows=1),
    _aten.bmm: _PRODUCT,
    _aten.mm: _PRODUCT,
}
"""Operations that may be sites. All others are left to the probe, which finds networks that are not local."""


class _Sites(Operations):
    """Calls ``visit_site`` for the operations that may be sites, with their number."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._next = 0

    def visit(self, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        kind = _KINDS.get(func._overloadpacket)
        if kind is None:
            return func(*args, **kwargs)
        self._next += 1
        return self.visit_site(self._next - 1, kind, func, args, kwargs)

    def visit_site(self, number: int, kind: _Kind, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        """The result of an operation."""
        raise NotImplementedError


class _Trace(_Sites):  # type: ignore[no-untyped-call]
    """Notes the shapes of all operations that may be sites."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[torch.Size], list[torch.Size]]] = []

    def visit_site(self, number: int, kind: _Kind, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        result = func(*args, **kwargs)
        results = result if isinstance(result, tuple) else (result,)
        inputs = [x.shape for x in args[: kind.tensors]]
        self.calls.append((func._schema.name, inputs, [y.shape for y in results[kind.grows :]]))
        return result


class Recorder(_Sites):  # type: ignore[no-untyped-call]
    """Replaces the results of sites, and with a core records their moments."""

    def __init__(self, statistics: Statistics, core: Core | None = None) -> None:
        """
        Args:
            statistics: sites, and constants where they are known.
            core: part of the tile that is recorded; None to record nothing.
        """
        super().__init__()
        self._statistics, self._core = statistics, core
        self.moments: dict[int, tuple[Tensor, int]] = {}
        """Moments of the core by the number of the site, and their pixels."""

    def visit_site(self, number: int, kind: _Kind, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        site = self._statistics.sites.get(number)
        if site is None:
            return func(*args, **kwargs)
        moments = self._statistics.constants.get(number)
        if self._core is not None:
            cores = [axes.cut(x, self._core) for axes, x in zip(site.axes, args, strict=False)]
            pixels = math.prod(cores[0].shape[a] for a in (site.axes[0].rows, site.axes[0].columns) if a is not None)
            recorded = kind.moments(func, args, kwargs, cores, pixels)
            self.moments[number] = recorded, pixels
            moments = recorded if moments is None else moments
        assert moments is not None
        moments = moments.to(args[0].device)
        return kind.result(args, kwargs, moments, site.pixels(self._statistics.shape))


@dataclass(frozen=True, slots=True)
class Statistics:
    """Sites of a network, and for one picture their moments."""

    sites: Mapping[int, Site]
    """Sites by their number among the operations that may be sites."""
    shape: Shape
    """(height, width) of the picture, in LR pixels."""
    constants: Mapping[int, Tensor]
    """Moments over the picture, float64, by the number of the site; empty before they are recorded."""

    @property
    def digest(self) -> str:
        """SHA-256 of the shape and the constants."""
        sha = hashlib.sha256(str(self.shape).encode())
        for number, moments in sorted(self.constants.items()):
            sha.update(f"{number} {tuple(moments.shape)}".encode())
            sha.update(moments.contiguous().numpy().data)
        return sha.hexdigest()

    def frozen(self) -> Recorder:
        """Context in which one run of the network takes the constants."""
        return Recorder(self)

    def save(self, path: Path) -> None:
        """Write shape and constants, atomically. Raises OSError."""
        tensors = {f"{number}": moments.contiguous() for number, moments in self.constants.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            save_file({**tensors, "shape": torch.tensor(self.shape)}, part)

    def load(self, path: Path) -> Statistics | None:
        """These sites with the constants of a file; None if there is none, or if it is damaged or of another network."""
        try:
            tensors = load_file(path)
            height, width = tensors.pop("shape").tolist()
            constants = {int(number): moments for number, moments in tensors.items()}
        except (OSError, ValueError, KeyError, SafetensorError):
            return None
        return Statistics(self.sites, (height, width), constants) if constants.keys() == self.sites.keys() else None


def find_sites(
    network: Callable[[Tensor], Tensor], inputs: int, align: int, device: torch.device
) -> dict[int, Site] | None:
    """The sites of a network, from the shapes of two small runs.

    Args:
        network: [1, inputs, h, w] -> [1, 3, h * scale, w * scale].
        inputs: channels of its input.
        align: divisor of both sides.
        device: device that computes.

    Returns:
        Sites by number; empty if no operation looks at the whole picture. None if they differ between the two shapes, or
        reduce axes whose pixels are not known.
    """
    side = -(-32 // align) * align
    shapes = [(side, 2 * side), (3 * side, 4 * side)]
    traces = []
    for height, width in shapes:
        tile = torch.zeros(1, inputs, height, width, device=device).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode(), _Trace() as trace:
            network(tile)
        traces.append(trace.calls)
    if [name for name, *_ in traces[0]] != [name for name, *_ in traces[1]]:
        return None
    sites: dict[int, Site] = {}
    for number, ((name, inputs_1, outputs_1), (_, inputs_2, outputs_2)) in enumerate(zip(*traces, strict=True)):
        if outputs_1 != outputs_2 or inputs_1 == inputs_2:
            continue
        axes = [_axes(a, b, shapes) for a, b in zip(inputs_1, inputs_2, strict=True)]
        if any(a is None for a in axes):
            return None
        sites[number] = Site(name, tuple(a for a in axes if a is not None))
    return sites


def _axes(first: torch.Size, second: torch.Size, shapes: Sequence[Shape]) -> Axes | None:
    """Spatial axes of a tensor from its shapes for two pictures; None if they are not known."""
    if len(first) != len(second):
        return None
    changed = [axis for axis, (a, b) in enumerate(zip(first, second, strict=True)) if a != b]
    if len(changed) == 2:
        slopes = [
            (second[axis] - first[axis]) / (shapes[1][side] - shapes[0][side]) for side, axis in enumerate(changed)
        ]
        extras = [first[axis] - slopes[0] * shapes[0][side] for side, axis in enumerate(changed)]
        if slopes[0] == slopes[1] > 0 and extras[0] == extras[1]:
            return Axes(changed[0], changed[1], slopes[0], extras[0])
    elif len(changed) == 1:
        (axis,) = changed
        areas = [height * width for height, width in shapes]
        factor = math.sqrt((second[axis] - first[axis]) / (areas[1] - areas[0]))
        if round(factor**2 * areas[0]) == first[axis]:
            return Axes(axis, None, factor)
    return None


def averaged(records: Iterable[Mapping[int, tuple[Tensor, int]]]) -> dict[int, Tensor]:
    """Moments of several cores, averaged by their pixels, on the host."""
    sums: dict[int, Tensor] = {}
    counts: dict[int, int] = {}
    for record in records:
        for number, (moments, pixels) in record.items():
            weighted = moments.cpu() * pixels
            sums[number] = sums[number] + weighted if number in sums else weighted
            counts[number] = counts.get(number, 0) + pixels
    return {number: total / counts[number] for number, total in sums.items()}
