"""Frozen feature maps of VGG-16 and VGG-19 (Simonyan and Zisserman 2015), from published weights or a user's file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.errors import InputError, UsageError, option
from engine.io.files import sha256
from engine.model.checkpoints import read_checkpoint
from engine.model.weight_files import WEIGHTS

LAYOUTS = {
    "VGG-16": (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512),
    "VGG-19": (64, 64, 0, 128, 128, 0, 256, 256, 256, 256, 0, 512, 512, 512, 512, 0, 512, 512, 512, 512),
}
"""Width of each convolution, 0 for a pooling. A ReLU follows every convolution, as in torchvision's ``features``."""
FILES = {"VGG-19": "vgg19", "VGG-16": "vgg16"}
"""Weight files by network, in order of preference."""
MIN_SIDE = 16
"""Smallest side of an image, pixels."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Maps = Mapping[str, Tensor]
"""Feature maps [N, C, h, w] by the name of their layer."""


class VGGFeatures(nn.Module):
    """Feature maps of named layers: ``conv3_1`` is a convolution's output, ``relu3_1`` the same after its ReLU.

    Args:
        weights: torchvision's file of VGG-16 or VGG-19, or its ``features`` alone, as .pth or .safetensors.
        layers: names of the layers; the network ends behind the last one.

    Raises:
        InputError: the file cannot be read or holds another network.
        UsageError: the network has no layer of that name.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, weights: Path, layers: Sequence[str]) -> None:
        super().__init__()
        self.path = weights
        self.name, state = _read(weights)
        names = _layer_names(LAYOUTS[self.name])
        if missing := [layer for layer in layers if layer not in names]:
            raise UsageError(f"{weights}: {self.name} has no layer {missing[0]}; give weights of VGG-19")
        depth = 1 + max(names.index(layer) for layer in layers)
        self._outputs = {index: name for index, name in enumerate(names[:depth]) if name in layers}
        with torch.device("meta"):
            self.features = nn.Sequential(*build_layers(LAYOUTS[self.name])[:depth])
        tensors = {key.removeprefix("features."): value for key, value in state.items()}
        self.features.load_state_dict({key: tensors[key] for key in self.features.state_dict()}, assign=True)
        self.features.float().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)
        self.requires_grad_(False)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file."""
        return sha256(self.path)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) in [0, 1] -> (N, C, H / 2^n, W / 2^n) for each layer, with n poolings before it.

        Raises:
            UsageError: a side is below ``MIN_SIDE``.
        """
        if min(x.shape[-2:]) < MIN_SIDE:
            raise UsageError(
                f"image of {x.shape[-2]} x {x.shape[-1]} pixels: too small for {self.name} ({MIN_SIDE} x {MIN_SIDE}); "
                f"use larger crops"
            )
        x = (x - self.mean) / self.std
        maps = {}
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self._outputs:
                maps[self._outputs[index]] = x
        return maps


def open_vgg(path: Path | None, layers: Sequence[str]) -> VGGFeatures | None:
    """The network of a weights file.

    Args:
        path: the file; None: the file that ``find_vgg`` finds.
        layers: layers of ``VGGFeatures``.

    Returns:
        None without ``path`` if no file is found.

    Raises:
        InputError: as ``VGGFeatures``, or a published file with another digest.
        UsageError: as ``VGGFeatures``.
    """
    path = path or find_vgg(layers)
    if path is None:
        return None
    for name in FILES.values():
        WEIGHTS[name].check(path)
    return VGGFeatures(path, layers)


def missing_vgg_error(layers: Sequence[str]) -> InputError:
    """Error for losses that cannot do without the layers that ``open_vgg`` did not find."""
    file = next(WEIGHTS[FILES[name]] for name in ("VGG-16", "VGG-19") if _has_layers(name, layers))
    return InputError(
        "VGG weights: not found (needed by feature_texture and the discriminator projected); "
        f"{file.advice()}, give {option('vgg', 'FILE')}, or use the preset quick"
    )


def find_vgg(layers: Sequence[str]) -> Path | None:
    """Published file, by its name, of a network that has these layers."""
    found = (WEIGHTS[file].find() for name, file in FILES.items() if _has_layers(name, layers))
    return next((path for path in found if path is not None), None)


def build_layers(layout: Sequence[int]) -> list[nn.Module]:
    """Layers with fresh weights; an index here is the number in torchvision's ``features``."""
    layers: list[nn.Module] = []
    inputs = 3
    for width in layout:
        layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()] if width else [nn.MaxPool2d(2)]
        inputs = width or inputs
    return layers


def _has_layers(name: str, layers: Sequence[str]) -> bool:
    return set(layers) <= set(_layer_names(LAYOUTS[name]))


def _layer_names(layout: Sequence[int]) -> list[str]:
    names, block, number = [], 1, 0
    for width in layout:
        if width:
            number += 1
            names += [f"conv{block}_{number}", f"relu{block}_{number}"]
        else:
            names.append(f"pool{block}")
            block, number = block + 1, 0
    return names


def _read(path: Path) -> tuple[str, dict[str, Tensor]]:
    """Name of the network, and the tensors of its convolutions under torchvision's names."""
    state = {key: value for key, value in read_checkpoint(path).items() if key.startswith("features.")}
    for name, layout in LAYOUTS.items():
        with torch.device("meta"):
            layers = nn.Sequential(*build_layers(layout))
        shapes = {f"features.{key}": value.shape for key, value in layers.state_dict().items()}
        if shapes == {key: value.shape for key, value in state.items()}:
            return name, state
    raise InputError(f"{path}: weights of neither {' nor '.join(LAYOUTS)}; give torchvision's vgg16-397923af.pth")
