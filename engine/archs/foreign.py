"""Networks that spandrel builds, behind the interface of this package's own; spandrel is an optional dependency.

spandrel (https://github.com/chaiNNer-org/spandrel, MIT; each architecture keeps its licence) gets tensors that were read
and checked before, never a file. How far such a network sees is not known here: its trace tells (``engine.bands.check``), or
``engine.probe.reach`` measures it, whatever spandrel says about tiles.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from importlib import util
from math import lcm
from typing import Any, Self

import torch
from torch import Tensor, fx, nn

from engine.archs.layers import RGB, Upscaler, cast_to_weights, check_image_channels, image_of, rgb_of
from engine.causes import raise_if_exhausted
from engine.errors import ModelError
from engine.geometry import UNBOUNDED

PREFIX = "spandrel "
"""Begins the architecture's name in manifests."""

_WINDOWS = ("window_size", "win_size", "split_size", "ws")
"""Attributes of modules that hold the sides of attention windows."""

_LARGEST_GRID = 256
"""Largest grid of windows, in pixels, that tiles are laid on."""


class Foreign(Upscaler):
    """A network of spandrel's, whole: its tail only drops or repeats channels."""

    noise_channels = 0
    is_own = False
    has_halves = False  # not measured by default: some keep float32 buffers, which spandrel does not tell
    ends = ()

    def __init__(self, descriptor: Any, grid: int) -> None:  # noqa: ANN401 (spandrel is not always there)
        """
        Args:
            descriptor: network as spandrel describes it.
            grid: multiple of the grid on which the network looks at pixels, where its modules do not tell.

        Raises:
            ModelError: it makes other images than it takes, or takes squares only.
        """
        super().__init__()
        size = descriptor.size_requirements
        if size.square:
            raise ModelError("takes square pictures only; open it with chaiNNer")
        self.network, self.scale = descriptor.model, int(descriptor.scale)
        # It calls the network as its authors do: some take a level of noise, or yield another range or more than a picture.
        self._descriptor = descriptor
        self.image_channels = check_image_channels(descriptor.input_channels)
        if descriptor.output_channels not in (self.image_channels, RGB):
            raise ModelError(f"makes images of {descriptor.output_channels} channels from {self.image_channels}")
        self.output_channels = descriptor.output_channels
        self.halves = tuple(
            name
            for name, is_supported in (("fp16", descriptor.supports_half), ("bf16", descriptor.supports_bfloat16))
            if is_supported
        )
        windows = lcm(grid, size.multiple_of, *_windows(self.network))
        grid = windows if windows <= _LARGEST_GRID else lcm(grid, size.multiple_of)
        # No picture and no tile is smaller than the grid.
        self.align = -(-max(1, size.minimum) // grid) * grid

    def trunk(self, x: Tensor) -> Tensor:
        image = cast_to_weights(self.network, image_of(x, channels=self.image_channels))
        # A trace leaves out what the descriptor does around the network: it pads, which ``align`` makes needless.
        is_traced = isinstance(x, fx.Proxy)
        output: Tensor = (
            self._descriptor._call_fn(self.network, image).clamp(0, 1) if is_traced else self._descriptor(image)
        )
        return output.to(x.dtype)

    def to_mixed(self, dtype: torch.dtype) -> Self:
        self.network.to(dtype)
        return self

    def tail(self, x: Tensor) -> Tensor:
        return rgb_of(x, self.output_channels)

    def _seen_by(self, q: int) -> tuple[int, int]:
        return q // self.scale - UNBOUNDED, q // self.scale + UNBOUNDED


def _windows(network: nn.Module) -> Iterator[int]:
    """Sides of the attention windows of a network, as its modules name them."""
    for module in network.modules():
        for name in _WINDOWS:
            value = getattr(module, name, None)
            for side in value if isinstance(value, tuple | list) else (value,):
                if type(side) is int and side > 0:
                    yield side


def is_installed() -> bool:
    """Whether spandrel is there; it is not imported."""
    return util.find_spec("spandrel") is not None


def load_spandrel() -> Any:  # noqa: ANN401
    """The module spandrel. Its dependency torchvision is imported beside any build of PyTorch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about image files that torchvision cannot read without other libraries
        try:
            import torchvision  # noqa: F401
        except RuntimeError:
            # The wheel of PyPI has operators for CUDA, which a CPU build of PyTorch cannot load. No network calls one, but
            # torchvision describes two of them when it is imported.
            schemas: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
            for name in ("nms", "qnms"):
                schemas.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _KEPT.append(schemas)
        import spandrel
    warnings.filterwarnings("ignore", "torch.meshgrid")  # some networks call it in an old way, which changes nothing
    return spandrel


_KEPT: list[object] = []
"""Descriptions of operators, which last as long as this list holds them."""


def build(state: Mapping[str, Tensor], name: str, grid: int) -> Foreign:
    """The network of these tensors, frozen and in evaluation mode.

    Args:
        state: tensors under the names of its authors.
        name: the network as the community calls it.
        grid: as for ``Foreign``.

    Raises:
        ModelError: spandrel cannot load the tensors, or the network takes or makes other things than pictures.
    """
    spandrel = load_spandrel()
    floats = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    if bad := next((k for k, t in floats.items() if t.is_floating_point() and not bool(t.isfinite().all())), None):
        raise ModelError(f"{bad} holds NaN or infinite values; fetch it again")
    try:
        descriptor = spandrel.MAIN_REGISTRY.load(floats)
    except Exception as error:  # whatever an incomplete set of tensors leads to
        raise_if_exhausted(error)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"spandrel cannot load {name} ({reason}); fetch it again, or open it with chaiNNer") from error
    if not isinstance(descriptor, spandrel.ImageModelDescriptor):
        raise ModelError(f"{name} needs more than a picture; open it with chaiNNer")
    return Foreign(descriptor, grid).eval().requires_grad_(False)
