"""The paper's account of synthesis memory (OUR-GAN, section 4.2 and Table 2), for any networks.

Memory = parameters + input and output features of the largest layer, all in float32; 1 GB = 10^9 bytes. This is a lower
bound for a framework without overhead. Shapes come from the networks themselves, run on the meta device. "All parameters"
is counted in two readings, for one network and for all networks, because the paper's number fits the smaller one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from engine.archs import Upscaler
from engine.archs.hpvaegan import BaseGenerator
from engine.archs.layers import RGB

GB = 10**9

PAPER_THEORETICAL_GB = 1.35
"""Theoretical synthesis memory of OUR-GAN in Table 2."""

PAPER_MEASURED_GB = 4.29
"""Synthesis memory of OUR-GAN on a GPU, as measured by the paper."""

_FLOAT_BYTES = 4
_META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class Subregion:
    """Input of one of the paper's super-resolution steps, in low-resolution pixels."""

    height: int
    """Height without overlap."""
    width: int
    """Width without overlap."""
    overlap: int
    """Additional pixels on every side."""

    @property
    def pixels(self) -> int:
        """Pixels of the network's input."""
        return (self.height + 2 * self.overlap) * (self.width + 2 * self.overlap)

    @property
    def pixels_as_evaluated(self) -> int:
        """Pixels as the paper evaluates its equation 8.

        It prints coefficient 4 before (h + w) * overlap. Its values, 12.98 M and 2.55 M output pixels, follow with
        coefficient 1; 2 is right.
        """
        return self.height * self.width + (self.height + self.width) * self.overlap + 4 * self.overlap**2


PAPER_SUBREGION = Subregion(270, 512, 24)
"""Example after equation 8: a quarter of 1024 x 540 with SwinIR's overlap."""


@dataclass(frozen=True, slots=True)
class LayerSize:
    """Features of a layer."""

    name: str
    """Name of the layer in its network."""
    floats: int
    """Numbers in its input and output together."""
    pixels: int
    """Input pixels of the network for which ``floats`` was counted."""

    def nbytes(self, pixels: int) -> int:
        """Bytes of its features for an input of ``pixels``, to which they are proportional."""
        return self.floats * pixels * _FLOAT_BYTES // self.pixels


@dataclass(frozen=True, slots=True)
class NetworkSize:
    """Parameters and largest layer of one step's network."""

    step: int
    """The paper's number of the step, from 1."""
    architecture: str
    """Name of the architecture."""
    parameters: int
    """Number of parameters."""
    layer: LayerSize
    """Layer with the most features."""

    def nbytes(self, pixels: int) -> int:
        """Bytes of its parameters and of its largest layer's features for an input of ``pixels``."""
        return self.parameters * _FLOAT_BYTES + self.layer.nbytes(pixels)


@dataclass(frozen=True, slots=True)
class MemoryAccount:
    """The account for one choice of inputs; sizes in bytes."""

    name: str
    """Description of the inputs."""
    step: int
    """Step whose network takes the most memory."""
    pixels: int
    """Low-resolution pixels of that network's input."""
    features: int
    """Features of that network's largest layer."""
    at_work: int
    """``features`` and the parameters of that network."""
    everything: int
    """``features`` and the parameters of all networks."""


def account_for(
    name: str, networks: Sequence[NetworkSize], pixels: Sequence[int], all_parameters: int
) -> MemoryAccount:
    """Account for networks with inputs of ``pixels`` low-resolution pixels each."""
    largest, count = max(zip(networks, pixels, strict=True), key=lambda pair: pair[0].nbytes(pair[1]))
    features = largest.layer.nbytes(count)
    everything = features + all_parameters * _FLOAT_BYTES
    return MemoryAccount(name, largest.step, count, features, largest.nbytes(count), everything)


def parameter_count(network: nn.Module) -> int:
    """Number of parameters of a network."""
    return sum(p.numel() for p in network.parameters())


def largest_layer(network: Upscaler) -> LayerSize:
    """Layer of a super-resolution network with the most features; the network is left unchanged."""
    side = max(8, network.align)
    tensors = {name: t.to(_META) for name, t in (*network.named_parameters(), *network.named_buffers())}
    with _count_features(network) as floats, torch.no_grad():
        functional_call(network, tensors, (torch.empty(1, RGB + network.noise_channels, side, side, device=_META),))
    return _largest(floats, side * side)


def largest_base_layer(base: BaseGenerator, size: tuple[int, int] | None = None) -> LayerSize:
    """Layer of step 1 with the most features for an image of ``size`` (height, width); default: the trained size."""
    with _META:
        twin = BaseGenerator(base.config, base.sizes)
    with _count_features(twin) as floats:
        twin.sample(lambda scale, shape: torch.empty(shape, device=_META), size)
    height, width = size or base.base_size
    return _largest(floats, height * width)


def _largest(floats: dict[str, int], pixels: int) -> LayerSize:
    name = max(floats, key=lambda n: floats[n])
    return LayerSize(name, floats[name], pixels)


@contextmanager
def _count_features(network: nn.Module) -> Iterator[dict[str, int]]:
    """Count the numbers in the input and output of every layer with parameters of its own, in runs of the network."""
    floats: dict[str, int] = {}

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            floats[name] = max(floats.get(name, 0), inputs[0].numel() + output.numel())

        return hook

    layers = [(n, m) for n, m in network.named_modules() if next(m.parameters(recurse=False), None) is not None]
    handles = [module.register_forward_hook(hook_for(name)) for name, module in layers]
    try:
        yield floats
    finally:
        for handle in handles:
            handle.remove()
