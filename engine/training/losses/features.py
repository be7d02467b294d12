"""Inputs of the losses: pixels and, for losses of features, VGG's feature maps of them.

Borders are moved at random before VGG sees an image. VGG's own zero padding would otherwise hide the artefacts that a
network's padding leaves at the image's border.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from engine.device.precision import Precision
from engine.training.losses.vgg import MIN_SIDE, Maps, VGGFeatures
from engine.training.run.precision import autocast

Roll = tuple[int, int]
"""Rows and columns by which an image is rolled."""

PADDING = 24
"""Mirrored rows or columns of both sides together; at least 8, the stride of the deepest maps of a loss, on one side."""


@dataclass(frozen=True, slots=True)
class ImageFeatures:
    """A batch of images and its feature maps."""

    image: Tensor
    """[N, 3, H, W]."""
    maps: Maps
    """Feature maps [N, C, h, w] by the name of VGG's layer; empty without VGG."""

    def detach(self) -> ImageFeatures:
        """The same values without gradients."""
        return ImageFeatures(self.image.detach(), {layer: maps.detach() for layer, maps in self.maps.items()})

    def layers(self, names: Sequence[str]) -> Maps:
        """The maps of the named layers."""
        return {name: self.maps[name] for name in names}

    def rows(self, count: int) -> Maps:
        """The maps of the first ``count`` images."""
        return {layer: maps[:count] for layer, maps in self.maps.items()}


def maps_of(image: Tensor, vgg: VGGFeatures | None, roll: Roll, precision: Precision) -> Maps:
    """VGG's feature maps of rolled images; none without VGG.

    Args:
        image: [N, 3, H, W] in [0, 1]. Images smaller than VGG's minimum are enlarged by repeating pixels.
        vgg: the network; None: no maps.
        roll: rows and columns by which the images are rolled first.
        precision: precision of VGG's convolutions.
    """
    if vgg is None:
        return {}
    moved, zoom = image.roll(roll, (2, 3)), -(-MIN_SIDE // min(image.shape[2:]))
    if zoom > 1:
        moved = F.interpolate(moved, scale_factor=zoom)
    with autocast(image.device, precision):
        maps: dict[str, Tensor] = vgg(moved)
    return maps


def draw_roll(size: tuple[int, int], generator: Generator) -> Roll:
    """A uniformly drawn roll of images of ``size`` (height, width)."""
    down, right = (int(torch.randint(limit, (), generator=generator)) for limit in size)
    return down, right


@dataclass(frozen=True, slots=True)
class ReflectPad:
    """Widths of a mirrored border around whole images.

    Unlike a roll it brings no edge into the image: the two sides of a landscape do not meet.
    """

    top: int
    bottom: int
    left: int
    right: int

    @classmethod
    def draw(cls, size: tuple[int, int], generator: Generator) -> ReflectPad:
        """Random widths for images of ``size`` (height, width).

        Both sides together have ``PADDING`` rows or columns, fewer around tiny images; each side has a third to two thirds.
        """
        sides = []
        for length in size:
            total = min(PADDING, length - 1)
            before = int(torch.randint(total // 3, total - total // 3 + 1, (), generator=generator))
            sides += [before, total - before]
        return cls(*sides)

    def __call__(self, images: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H + top + bottom, W + left + right]."""
        return F.pad(images, (self.left, self.right, self.top, self.bottom), "reflect")

    def heights(self, rows: int) -> Tensor:
        """Height of every row of a padded image of ``rows`` rows: -1 at the image's top, 1 at its bottom, mirrored outside."""
        return F.pad(torch.linspace(-1, 1, rows)[None, None], (self.top, self.bottom), "reflect")[0, 0]
