"""Operations and memory of a network on a GPU, counted on PyTorch's meta device: nothing is computed.

A count is of the operations that PyTorch dispatches, and of the engine's own kernels where the GPU runs them. It holds the
library's passes that are known: cuDNN adds a bias in a pass of its own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from engine.bands.stream import RowStream
from engine.kernels.last_conv import COLORS
from engine.kernels.launch import Observer, observed_launches
from engine.model.bundle import Model
from engine.plan.gpus import Gpu
from engine.plan.measured import Fallback, Footprint
from engine.plan.roofline import Counts, Operation
from engine.probe.footprint import band_memory
from engine.run.operations import Args, Operations
from engine.run.stage import Stage

META = torch.device("meta")

_SIDES = (192, 384)
"""Sides of the two tiles whose memory gives a line, as on a GPU that is there (``engine.probe.footprint``)."""

_SIDE = 256
"""Side of the tile whose operations are counted."""

WIDTH = 4096
"""Columns of the strip whose operations are counted."""

_HELD = 1.25
"""Bytes that PyTorch's allocator holds for each live one: an assumption, for blocks that fit no later map."""

_HALVES = (torch.float16, torch.bfloat16)

_CONVOLUTIONS = ("aten::convolution", "aten::_convolution", "aten::cudnn_convolution")

_MACS: dict[str, Callable[[Sequence[Tensor], Mapping[str, Any]], int]] = {
    "_conv3x3_kernel": lambda tensors, options: 9 * options["inputs"] * options["outputs"],
    "_last_conv_kernel": lambda tensors, options: 9 * options["inputs"] * COLORS,
    # Products of queries and keys, and of weights and values: every pixel with all of its window.
    "_window_attention_kernel": lambda tensors, options: 2 * tensors[-1].shape[-1] * options["window"] ** 2,
    "_norm_linear_kernel": lambda tensors, options: tensors[1].numel(),
    "_mlp_kernel": lambda tensors, options: sum(weight.numel() for weight in tensors[2:-1] if weight.ndim == 2),
}
"""Multiply-adds of the engine's kernels for a pixel, from the tensors and the options of a launch."""


class Counter(Operations):
    """Counts operations and live bytes inside a ``with`` block.

    Attributes:
        operations: kernels in the order of their launch.
        peak: largest number of bytes that were live at a time, of those allocated in the block.
    """

    def __init__(self) -> None:
        # It imports Triton, which takes 0.4 s and 80 MB; on a CPU nothing is counted.
        from torch.utils.flop_counter import flop_registry

        super().__init__()  # type: ignore[no-untyped-call]
        self.whole = self._formulas = flop_registry
        self.operations: list[Operation] = []
        self.peak = self._now = 0
        self._live: dict[int, int] = {}
        """Bytes of every storage by its address."""

    def visit(self, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        result = func(*args, **kwargs)
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        for tensor in outputs:
            self._follow(tensor)
        if not _is_free(func):
            inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            self._count(func, args, kwargs, inputs, outputs)
        return result

    def kernel(self, name: str, tensors: Iterable[Tensor], options: dict[str, Any]) -> None:
        """Count a launch of one of the engine's kernels, whose last tensor is its result."""
        tensors = list(tensors)
        out, is_half = tensors[-1], any(tensor.dtype in _HALVES for tensor in tensors)
        pixels = out.numel() // (COLORS if name == "_last_conv_kernel" else out.shape[-1])
        flops = 2 * pixels * _MACS[name](tensors, options) if name in _MACS else 0
        self.operations.append(Operation(flops, _bytes(tensors), is_half))

    def _count(
        self,
        func: Any,  # noqa: ANN401
        args: Args,
        kwargs: dict[str, Any],
        inputs: list[Tensor],
        outputs: list[Tensor],
    ) -> None:
        name = func._schema.name
        formula = self._formulas.get(func._overloadpacket)
        flops = formula(*args, **kwargs, out_val=outputs[0]) if formula is not None and len(outputs) == 1 else 0
        is_half = bool(inputs) and inputs[0].dtype in _HALVES
        if name == "aten::copy_":
            inputs = inputs[1:]  # the target is not read
        self.operations.append(Operation(int(flops), _bytes(inputs) + _bytes(outputs), is_half))
        if name in _CONVOLUTIONS and args[2] is not None:
            self.operations.append(Operation(0, 2 * _bytes(outputs), is_half))

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        self._live[key] = storage.nbytes()
        self._now += self._live[key]
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._now -= self._live.pop(key, 0)


def _is_free(func: Any) -> bool:  # noqa: ANN401
    """Whether an operation launches nothing: a view, or an allocation."""
    if func._schema.name in ("aten::empty", "aten::empty_strided", "aten::new_empty", "aten::empty_like"):
        return True
    aliases = [value.alias_info for value in func._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.itemsize for t in tensors)


def as_on(gpu: Gpu | None, observer: Observer = lambda *_: None) -> AbstractContextManager[None]:
    """Context in which the meta device takes the engine's kernels, unless ``gpu`` lacks them: stages are made in it, too."""
    return observed_launches(observer) if gpu is None or gpu.runs_kernels else nullcontext()


def meta_stage(model: Model, index: int, precision: str, gpu: Gpu | None = None) -> Stage:
    """A stage of a model without memory, which runs as it would on a GPU."""
    with as_on(gpu):
        return Stage(model.new_network(index), META, precision)


@contextmanager
def counting(gpu: Gpu | None = None) -> Iterator[Counter]:
    """Count what runs on the meta device inside a ``with`` block, with the engine's kernels unless ``gpu`` lacks them."""
    counter = Counter()
    with as_on(gpu, counter.kernel), torch.inference_mode(), counter:
        yield counter


def count_tile(stage: Stage, height: int, width: int, batch: int = 1, gpu: Gpu | None = None) -> Counter:
    """Count a run of a batch of tiles, with its input and output."""
    with counting(gpu) as counter:
        tiles = torch.empty(batch, stage.inputs, height, width, device=META)
        stage.run(tiles.contiguous(memory_format=torch.channels_last))
    return counter


def fallback(model: Model, index: int, *, in_bands: bool) -> Fallback:
    """Memory of a stage in float32, for what half precision cannot represent; ``in_bands``: also in bands."""
    stage = Stage(model.new_network(index), META, "fp32")
    tensors = (*stage.network.parameters(), *stage.network.buffers())
    weights = sum(t.numel() * t.itemsize for t in tensors)
    return Fallback(weights, tile_bytes(stage), band_memory(stage) if in_bands else None)


def tile_counts(stage: Stage, gpu: Gpu | None = None) -> Counts:
    """Operations of a tile."""
    side = max(_SIDE // stage.align, 1) * stage.align
    return Counts(side * side, tuple(count_tile(stage, side, side, gpu=gpu).operations))


def tile_bytes(stage: Stage, gpu: Gpu | None = None) -> Footprint:
    """Memory of tiles, as the allocator holds it; its time is left at 0."""
    sides = [side // stage.align * stage.align for side in _SIDES]
    small, large = (count_tile(stage, side, side, gpu=gpu).peak for side in sides)
    per_pixel = (large - small) / (sides[1] ** 2 - sides[0] ** 2)
    fixed = max(0.0, large - per_pixel * sides[1] ** 2)
    return Footprint(int(_HELD * fixed), _HELD * per_pixel, 0.0)


def band_counts(stage: Stage, width: int, gpu: Gpu | None = None) -> Counts:
    """Operations of one band in the middle of a picture of ``width`` columns."""
    with as_on(gpu):
        plan = stage.stream_plan(max(width // stage.align, 1) * stage.align)
    band = torch.empty(1, stage.inputs, plan.band, plan.width, device=META)
    with counting(gpu) as counter:
        stream = RowStream(plan, META)
        stream.start(0, 1 << 30)
        stream._next = 1 << 20  # far below the border, where every operation has rows
        counter.operations.clear()  # rows of zero above the picture are of its start, not of a band
        for _ in stage.push(stream, band):
            pass
    return Counts(plan.band * plan.width, tuple(counter.operations))
