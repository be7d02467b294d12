"""Networks that spandrel builds, behind the interface of this package's own; spandrel is an optional dependency.

spandrel (https://github.com/chaiNNer-org/spandrel, MIT; each architecture keeps its licence) gets tensors that were read
and checked before, never a file. How far such a network sees is not known, so it runs in tiles whose halo is measured.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib import util
from math import lcm
from typing import Any

import torch
from torch import Tensor, fx

from engine.archs.layers import RGB, Upscaler, check_image_channels, image_of, rgb_of
from engine.causes import raise_if_exhausted
from engine.errors import ModelError, UsageError, option
from engine.geometry import UNBOUNDED

PREFIX = "spandrel "
"""Begins the architecture's name in manifests."""


class Foreign(Upscaler):
    """A network of spandrel's, whole: its tail only drops or repeats channels."""

    noise_channels = 0
    has_halves = False  # some keep float32 buffers, which spandrel does not tell
    ends = ()

    def __init__(self, descriptor: Any, grid: int) -> None:  # noqa: ANN401 (spandrel is not always there)
        """
        Args:
            descriptor: network as spandrel describes it.
            grid: grid on which the network looks at pixels, such as that of its windows.

        Raises:
            ModelError: it makes other images than it takes.
        """
        super().__init__()
        self.network, self.scale = descriptor.model, int(descriptor.scale)
        self.image_channels = check_image_channels(descriptor.input_channels)
        if descriptor.output_channels not in (self.image_channels, RGB):
            raise ModelError(f"makes images of {descriptor.output_channels} channels from {self.image_channels}")
        self.output_channels = descriptor.output_channels
        self.align = lcm(grid, descriptor.size_requirements.multiple_of)

    def trunk(self, x: Tensor) -> Tensor:
        if isinstance(x, fx.Proxy):
            raise UsageError(f"a network by spandrel: cannot be streamed in bands; use {option('executor', 'tiles')}")
        image = image_of(x, channels=self.image_channels)
        result: Tensor = self.network(image)
        return result

    def tail(self, x: Tensor) -> Tensor:
        return rgb_of(x, self.output_channels)

    def _seen_by(self, q: int) -> tuple[int, int]:
        return q // self.scale - UNBOUNDED, q // self.scale + UNBOUNDED


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
        ModelError: spandrel cannot load the tensors.
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
