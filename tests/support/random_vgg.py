"""VGG-16 and VGG-19 with random weights, as torchvision's files name them."""

import math

import torch

CONVOLUTIONS = {
    "VGG-16": [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28],
    "VGG-19": [0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34],
}
"""torchvision's numbers of the convolutions."""
BEFORE_POOLING = {"VGG-16": [2, 7, 14, 21], "VGG-19": [2, 7, 16, 25]}
"""torchvision's numbers of the convolutions before a pooling."""
BLOCKS = {"VGG-16": (2, 2, 3, 3, 3), "VGG-19": (2, 2, 4, 4, 4)}
"""Convolutions in each block."""


def random_vgg(name):
    """Random weights of the network's convolutions under torchvision's names."""
    generator, inputs, tensors = torch.Generator().manual_seed(0), 3, {}
    widths = [width for width, count in zip((64, 128, 256, 512, 512), BLOCKS[name], strict=True) for _ in range(count)]
    for index, width in zip(CONVOLUTIONS[name], widths, strict=True):
        gain = math.sqrt(2 / (9 * inputs))
        tensors[f"features.{index}.weight"] = gain * torch.randn(width, inputs, 3, 3, generator=generator)
        tensors[f"features.{index}.bias"] = 0.1 * torch.randn(width, generator=generator)
        inputs = width
    return tensors
