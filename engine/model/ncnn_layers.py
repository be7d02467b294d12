"""Layers of ncnn's graphs, as their lines describe them. Knows no network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from engine.archs.layers import MAX_CHANNELS
from engine.errors import ModelError

ATTRIBUTES = {"kernel": ("1", 0), "dilation": ("2", 1), "stride": ("3", 1), "padding": ("4", 0), "bias": ("5", 0)}
"""Attributes of a convolution: the number that ncnn gives each, and its default where the graph leaves it out."""

_LARGEST_KERNEL = 5


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer as the graph describes it."""

    kind: str
    """Kind of the layer, such as Convolution."""
    name: str
    """Name in the graph."""
    values: Mapping[str, str]
    """Values by their numbers."""

    def value(self, number: int, default: float = 0) -> float:
        """The value of a number. Raises ValueError if it is no number."""
        return float(self.values.get(str(number), default))

    @property
    def outputs(self) -> int:
        """Channels that a convolution or PReLU yields."""
        return int(self.values["0"])

    @property
    def weights(self) -> int:
        """Number of weights, without the bias."""
        return int(self.values[{"PReLU": "0", "InnerProduct": "2"}.get(self.kind, "6")])

    @property
    def shape(self) -> torch.Size:
        """[outputs, inputs, kernel, kernel] of a convolution's weights. Raises ModelError for impossible ones."""
        kernel = 1 if self.kind == "InnerProduct" else int(self.value(1))
        inputs, rest = divmod(self.weights, max(1, self.outputs * kernel**2))
        if rest or not (
            0 < self.outputs <= MAX_CHANNELS and 0 < inputs <= MAX_CHANNELS and 0 < kernel <= _LARGEST_KERNEL
        ):
            raise ModelError(
                f"{self.name} has {self.outputs} channels, {self.weights} weights and a kernel of {kernel}; fetch it again"
            )
        return torch.Size((self.outputs, inputs, kernel, kernel))

    def check_convolution(self, kernel: int) -> None:
        """Raise ModelError unless this is a convolution with a bias that keeps the size, with a kernel of ``kernel``."""
        required = {"kernel": kernel, "dilation": 1, "stride": 1, "padding": kernel // 2, "bias": 1}
        attributes = {name: int(self.value(int(number), default)) for name, (number, default) in ATTRIBUTES.items()}
        if wrong := [f"{name} {value}" for name, value in attributes.items() if value != required[name]]:
            raise ModelError(
                f"{self.name} has {', '.join(wrong)}; padded {kernel} x {kernel} convolutions with a bias are read"
            )
