"""Pictures as a loss sees them: their pixels and, for losses that look through VGG, its feature maps of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from engine.device.precision import Precision
from engine.training.losses.vgg import LEAST, Maps, VGGFeatures
from engine.training.run.precision import autocast

Shift = tuple[int, int]
WIDTH = 24  # of a frame, both sides together: 8 at least on one, as many as the step of the deepest maps that losses look at


@dataclass(frozen=True, slots=True)
class Look:
    """A batch of pictures [N, 3, H, W] and VGG's maps of it, none if no loss asks for them."""

    picture: Tensor
    maps: Maps

    def detach(self) -> "Look":
        return Look(self.picture.detach(), {layer: maps.detach() for layer, maps in self.maps.items()})

    def layers(self, names: Sequence[str]) -> Maps:
        return {name: self.maps[name] for name in names}

    def rows(self, count: int) -> Maps:
        """The maps of the first pictures."""
        return {layer: maps[:count] for layer, maps in self.maps.items()}


def maps_of(picture: Tensor, vgg: VGGFeatures | None, shift: Shift, precision: Precision) -> Maps:
    """VGG's maps of pictures in [0, 1] that are moved around by so many rows and columns, and are enlarged where VGG could not
    halve them often enough; none without a VGG.
    """
    if vgg is None:
        return {}
    moved, zoom = picture.roll(shift, (2, 3)), -(-LEAST // min(picture.shape[2:]))
    if zoom > 1:
        moved = F.interpolate(moved, scale_factor=zoom)
    with autocast(picture.device, precision):
        found: dict[str, Tensor] = vgg(moved)
    return found


def draw_shift(size: tuple[int, int], generator: Generator) -> Shift:
    """Any of the ways to move a picture around: its borders, where a network pads, come to lie where VGG's own padding does
    not hide them.
    """
    down, right = (int(torch.randint(limit, (), generator=generator)) for limit in size)
    return down, right


@dataclass(frozen=True, slots=True)
class Frame:
    """So many rows and columns of its mirror image around a picture, for the same purpose. Unlike moving it around it brings no
    edge into a whole picture: a landscape's two sides do not meet.
    """

    top: int
    bottom: int
    left: int
    right: int

    @classmethod
    def draw(cls, size: tuple[int, int], generator: Generator) -> "Frame":
        """Of `WIDTH` rows and columns in all, fewer around a tiny picture, a third to two thirds of them on one side."""
        sides = []
        for length in size:
            total = min(WIDTH, length - 1)
            before = int(torch.randint(total // 3, total - total // 3 + 1, (), generator=generator))
            sides += [before, total - before]
        return cls(*sides)

    def around(self, pictures: Tensor) -> Tensor:
        """[N, C, H, W]"""
        return F.pad(pictures, (self.left, self.right, self.top, self.bottom), "reflect")

    def heights(self, rows: int) -> Tensor:
        """-1 at the picture's top to 1 at its bottom, for every row of the framed picture."""
        return F.pad(torch.linspace(-1, 1, rows)[None, None], (self.top, self.bottom), "reflect")[0, 0]
