"""The paper's account of synthesis memory (section 4.2, Table 2): all parameters and the input and output features of the
largest layer, in float32, 1 GB = 10^9 bytes. It says what a framework without overhead would need at the least.

Counted from the networks themselves, run on the meta device, which has shapes and no values. Knows nothing of plans or of
what a run measures. Two readings of "all parameters" are given, because the paper's own number fits the smaller one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from engine.archs import Upscaler
from engine.archs.hpvaegan import BaseGenerator
from engine.archs.layers import RGB

FLOAT = 4
GB = 10**9

PAPER_PRINTED = 1.35
"""Theoretical synthesis memory of OUR-GAN in Table 2, in GB."""

PAPER_MEASURED = 4.29
"""What the paper measured for it on a GPU, in GB."""

_META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class Subregion:
    """A stage's input of the paper: ``height`` x ``width`` low-resolution pixels with ``overlap`` more on every side."""

    height: int
    width: int
    overlap: int

    @property
    def pixels(self) -> int:
        """Low-resolution pixels that the network takes in."""
        return (self.height + 2 * self.overlap) * (self.width + 2 * self.overlap)

    @property
    def pixels_as_evaluated(self) -> int:
        """The paper's number: equation 8 is printed with coefficient 4 before (h + w) * overlap, its values (12.98 M and
        2.55 M output pixels) follow with coefficient 1, and 2 is right."""
        return self.height * self.width + (self.height + self.width) * self.overlap + 4 * self.overlap**2


PAPER_SUBREGION = Subregion(270, 512, 24)
"""Of the paper's example after equation 8: a quarter of 1024 x 540 and SwinIR's overlap."""


@dataclass(frozen=True, slots=True)
class Layer:
    """The layer with the most features. ``floats``: of its input and its output, for ``pixels`` input pixels."""

    name: str
    floats: int
    pixels: int

    def nbytes(self, pixels: int) -> int:
        """For so many input pixels: features are proportional to them."""
        return self.floats * pixels * FLOAT // self.pixels


@dataclass(frozen=True, slots=True)
class Network:
    """One step's network as the account sees it."""

    step: int
    architecture: str
    parameters: int
    layer: Layer

    def nbytes(self, pixels: int) -> int:
        """Its own parameters and the largest layer's features."""
        return self.parameters * FLOAT + self.layer.nbytes(pixels)


@dataclass(frozen=True, slots=True)
class Account:
    """Bytes. ``at_work``: with the parameters of the network that needs most, ``everything``: with those of all networks.

    ``step`` is that network's, which takes in ``pixels`` low-resolution pixels at a time.
    """

    name: str
    step: int
    pixels: int
    features: int
    at_work: int
    everything: int

    @classmethod
    def of(cls, name: str, networks: Sequence[Network], pixels: Sequence[int], all_parameters: int) -> Account:
        """``pixels``: what each of the networks takes in at a time."""
        largest, taken = max(zip(networks, pixels, strict=True), key=lambda pair: pair[0].nbytes(pair[1]))
        features = largest.layer.nbytes(taken)
        return cls(name, largest.step, taken, features, largest.nbytes(taken), features + all_parameters * FLOAT)


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def largest_layer(network: Upscaler) -> Layer:
    """Of a super-resolution network, among its layers with parameters. The network is left as it is."""
    side = max(8, network.align)
    shapes = {name: t.to(_META) for name, t in (*network.named_parameters(), *network.named_buffers())}
    with _features(network) as seen, torch.no_grad():
        functional_call(network, shapes, (torch.empty(1, RGB + network.noise_channels, side, side, device=_META),))
    name = max(seen, key=lambda n: seen[n])
    return Layer(name, seen[name], side * side)


def largest_structure_layer(structure: BaseGenerator, size: tuple[int, int] | None = None) -> Layer:
    """Of step 1 for an image of ``size`` (height, width), by default the one it was trained for."""
    with _META:
        twin = BaseGenerator(structure.config, structure.sizes)
    with _features(twin) as seen:
        twin.sample(lambda m, shape: torch.empty(shape, device=_META), size)
    height, width = size or structure.base_size
    name = max(seen, key=lambda n: seen[n])
    return Layer(name, seen[name], height * width)


@contextmanager
def _features(network: nn.Module) -> Iterator[dict[str, int]]:
    """Collects, while the network runs, the numbers in the input and the output of every layer with parameters of its own."""
    seen: dict[str, int] = {}

    def watch(name: str) -> Any:  # noqa: ANN401
        def look(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = max(seen.get(name, 0), inputs[0].numel() + output.numel())

        return look

    layers = [(n, m) for n, m in network.named_modules() if next(m.parameters(recurse=False), None) is not None]
    hooks = [module.register_forward_hook(watch(name)) for name, module in layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
