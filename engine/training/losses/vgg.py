"""VGG's feature maps, frozen: what pictures are compared by beside their pixels (Simonyan and Zisserman 2015).

The weights are the user's own files. Knows where they are looked for and how they are read, no loss.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.errors import InputError, UsageError
from engine.model.checkpoints import read_checkpoint

# Without the classifier: the width of each convolution, 0 for a pooling. Every convolution is followed by a ReLU, so that
# position N of torchvision's `features` is layer N here.
LAYOUTS = {
    "VGG-16": (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512),
    "VGG-19": (64, 64, 0, 128, 128, 0, 256, 256, 256, 256, 0, 512, 512, 512, 512, 0, 512, 512, 512, 512),
}
HUB_FILES = {
    "VGG-19": "vgg19-*.pth",
    "VGG-16": "vgg16-*.pth",
}  # torchvision's, in the order in which they are looked for
LEAST = 16  # pixels of a side
ABSENT = "no VGG weights (--vgg FILE, or torchvision's vgg19 or vgg16 in the hub cache)"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Maps = Mapping[str, Tensor]


class VGGFeatures(nn.Module):
    """The maps of the layers that are named: `conv3_1` is a convolution's output, `relu3_1` the same after its ReLU.

    `weights` is torchvision's file of VGG-16 or VGG-19, or its `features` alone, as .pth or .safetensors. Layers behind the
    last one that is named are left out. Raises InputError if the file cannot be read or is of another network, UsageError
    for a layer that the network does not have.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, weights: Path, layers: Sequence[str]) -> None:
        super().__init__()
        self.path = weights
        self.name, state = _read(weights)
        names = _layer_names(LAYOUTS[self.name])
        if missing := [layer for layer in layers if layer not in names]:
            raise UsageError(
                f"{weights}: {self.name} has no layer {missing[0]}: name a file with the weights of VGG-19"
            )
        depth = 1 + max(names.index(layer) for layer in layers)
        self._wanted = {index: name for index, name in enumerate(names[:depth]) if name in layers}
        with torch.device("meta"):
            self.features = nn.Sequential(*modules(LAYOUTS[self.name])[:depth])
        used = {key.removeprefix("features."): value for key, value in state.items()}
        self.features.load_state_dict({key: used[key] for key in self.features.state_dict()}, assign=True)
        self.features.float().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)
        self.requires_grad_(False)

    @cached_property
    def digest(self) -> str:
        """sha256 of the file."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) in [0, 1] -> a map (N, C, H / 2^n, W / 2^n) for each layer, n being the poolings before it."""
        if min(x.shape[-2:]) < LEAST:
            raise UsageError(
                f"a picture of {x.shape[-2]} x {x.shape[-1]} pixels: {self.name} halves at least {LEAST} x {LEAST}"
            )
        x = (x - self.mean) / self.std
        found = {}
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self._wanted:
                found[self._wanted[index]] = x
        return found


def open_vgg(path: Path | None, layers: Sequence[str]) -> VGGFeatures | None:
    """The network of the file `path` if given, else of torchvision's file in torch.hub's folder, else None.

    Raises as `VGGFeatures`.
    """
    path = path or find_vgg(layers)
    return VGGFeatures(path, layers) if path is not None else None


def absent() -> InputError:
    """What is wrong where `open_vgg` finds none and some loss cannot do without."""
    return InputError(f"{ABSENT}, which feature_texture and the discriminator projected look with: take preset quick")


def find_vgg(layers: Sequence[str]) -> Path | None:
    """A file in torch.hub's folder, by its name, of a network that has these layers."""
    folder = Path(torch.hub.get_dir(), "checkpoints")
    able = (pattern for name, pattern in HUB_FILES.items() if set(layers) <= set(_layer_names(LAYOUTS[name])))
    return next((found for pattern in able for found in sorted(folder.glob(pattern))), None)


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


def modules(layout: Sequence[int]) -> list[nn.Module]:
    """The layers of a layout, in torchvision's order, so that a layer's place is its number there."""
    layers: list[nn.Module] = []
    inputs = 3
    for width in layout:
        layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()] if width else [nn.MaxPool2d(2)]
        inputs = width or inputs
    return layers


def _read(path: Path) -> tuple[str, dict[str, Tensor]]:
    """Which VGG it is, and the tensors of its convolutions under torchvision's names; a classifier is left behind."""
    state = {key: value for key, value in read_checkpoint(path).items() if key.startswith("features.")}
    for name, layout in LAYOUTS.items():
        with torch.device("meta"):
            shapes = {
                f"features.{key}": value.shape for key, value in nn.Sequential(*modules(layout)).state_dict().items()
            }
        if shapes == {key: value.shape for key, value in state.items()}:
            return name, state
    raise InputError(
        f"{path}: the weights of neither {' nor '.join(LAYOUTS)}: torchvision's vgg19-dcbb9e9d.pth is wanted"
    )
