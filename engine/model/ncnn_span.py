"""SPAN in ncnn's format: names and shapes of its weights, in the order of the graph. Builds no network."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.archs.span import BLOCKS, MEAN, RANGE
from engine.errors import ModelError
from engine.model.ncnn_layers import Layer

KINDS = {"Swish", "Sigmoid", "PixelShuffle"}
"""Kinds of layers that no other network has all of."""

LAYERS = KINDS | {"Input", "MemoryData", "BinaryOp", "Split", "Convolution", "Concat"}
"""All kinds of its layers."""

_BLOCK = ("Convolution", "Swish", "Convolution", "Swish", "Convolution", "Sigmoid", *["BinaryOp"] * 3)

_BODY = ("Convolution", *_BLOCK * BLOCKS, "Convolution", "Concat", "Convolution", "Convolution", "PixelShuffle")
"""Kinds of the layers behind the image, in their order; splits copy blobs alone."""

_NAMES = (
    "conv_1", *(f"block_{i}.c{j}_r" for i in range(1, BLOCKS + 1) for j in (1, 2, 3)), "conv_2", "conv_cat", "upsampler.0",
)  # fmt: skip
"""Convolutions under the names of the published code, in the order of the graph."""

_MEAN = "mean"
_TOLERANCE = 1e-4


def shapes(layers: Sequence[Layer]) -> dict[str, torch.Size]:
    """Shapes of the weights by name, in the order of the file: the mean where there is one, then the convolutions.

    Raises ModelError for another network, KeyError or ValueError for a damaged graph.
    """
    kinds = tuple(layer.kind for layer in layers if layer.kind not in ("Input", "Split"))
    head = kinds[: max(0, len(kinds) - len(_BODY))]
    if kinds[len(head) :] != _BODY or head not in (
        (),
        ("MemoryData", "BinaryOp"),
        ("MemoryData", "BinaryOp", "BinaryOp"),
    ):
        raise ModelError(f"a graph of {len(layers)} layers in another order than those of SPAN; name its .pth")
    found = {_MEAN: torch.Size((len(MEAN),))} if head else {}
    for name, layer in zip(_NAMES, (layer for layer in layers if layer.kind == "Convolution"), strict=True):
        layer.check_convolution(1 if name == "conv_cat" else 3)
        found[f"{name}.weight"] = layer.shape
    return found


def canonical(state: dict[str, torch.Tensor], layers: Sequence[Layer]) -> dict[str, torch.Tensor]:
    """The tensors for an image in levels of 255. Raises ModelError for a mean that is not that of the published networks."""
    if _MEAN not in state:
        return {**state, "no_norm": torch.zeros(1)}
    mean = state.pop(_MEAN)
    if not torch.allclose(mean, torch.tensor(MEAN), atol=_TOLERANCE):
        raise ModelError(f"takes the mean {mean.tolist()} from the image; networks with the mean {list(MEAN)} are read")
    seen = [layer.value(2) for layer in layers if layer.kind == "BinaryOp" and layer.value(0) == 2 and layer.value(1)]
    weight = "conv_1.weight"
    return {**state, weight: state[weight].float() * ((seen[0] if seen else 1) / RANGE)}
