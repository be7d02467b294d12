"""Real-CUGAN in ncnn's format: names and shapes of its weights, in the order of the graph. Builds no network."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.errors import ModelError
from engine.model.ncnn_layers import Layer

KINDS = {"Deconvolution", "Pooling", "InnerProduct"}
"""Kinds of layers that no other network has all of."""

LAYERS = KINDS | {"Input", "Split", "Convolution", "BinaryOp", "Crop", "PixelShuffle"}
"""All kinds of its layers."""

WEIGHTED = ("Convolution", "Deconvolution", "InnerProduct")

PRO = "pro"
"""Tensor whose presence marks the form that maps its input into 0.15 to 0.85."""

_BLOCK = ("conv.0", "conv.2")
_EXCITED = (*_BLOCK, "seblock.conv1", "seblock.conv2")

_UNET_1 = (
    *(f"conv1.{n}" for n in _BLOCK),
    "conv1_down",
    *(f"conv2.{n}" for n in _EXCITED),
    "conv2_up",
    "conv3",
    "conv_bottom",
)

_UNET_2 = (
    *(f"conv1.{n}" for n in _BLOCK), "conv1_down", *(f"conv2.{n}" for n in _EXCITED), "conv2_down",
    *(f"conv3.{n}" for n in _EXCITED), "conv3_up", *(f"conv4.{n}" for n in _EXCITED), "conv4_up", "conv5", "conv_bottom",
)  # fmt: skip

_NAMES = (*(f"unet1.{n}" for n in _UNET_1), *(f"unet2.{n}" for n in _UNET_2))
"""Layers with weights under the names of the published code, in the order of the graph; x4 has one more."""

_FINAL = "conv_final"


def shapes(layers: Sequence[Layer]) -> dict[str, torch.Size]:
    """Shapes of the weights by name, as they lie in the file: [outputs, inputs, kernel, kernel].

    Raises ModelError for another network, KeyError or ValueError for a damaged graph.
    """
    weighted = [layer for layer in layers if layer.kind in WEIGHTED]
    names = (*_NAMES, _FINAL) if len(weighted) == len(_NAMES) + 1 else _NAMES
    if len(weighted) != len(names):
        raise ModelError(f"a graph of {len(weighted)} layers with weights is no Real-CUGAN, which has {len(_NAMES)}")
    return {f"{name}.weight": layer.shape for name, layer in zip(names, weighted, strict=True)}


def is_pro(layers: Sequence[Layer]) -> bool:
    """Whether the graph is of the pro form: the exporter numbered two operations that the program does itself."""
    first = next((layer.name for layer in layers if layer.kind == "BinaryOp"), "_0")
    return not first.endswith("_0")


def canonical(state: dict[str, torch.Tensor], layers: Sequence[Layer]) -> dict[str, torch.Tensor]:
    """The tensors as PyTorch holds them: transposed convolutions have their inputs first."""
    weighted = [layer for layer in layers if layer.kind in WEIGHTED]
    names = {name for name, layer in zip(shapes(layers), weighted, strict=True) if layer.kind == "Deconvolution"}
    result = {name: t.transpose(0, 1).contiguous() if name in names else t for name, t in state.items()}
    return result | ({PRO: torch.zeros(1)} if is_pro(layers) else {})
