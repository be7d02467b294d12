"""Batches of a training iteration: low-resolution crops and their targets.

Every random choice comes from the caller's generator, on the CPU, so that a seed gives the same batches on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from engine.errors import InputError, UsageError
from engine.training.losses.features import maps_of
from engine.training.losses.vgg import VGGFeatures
from engine.training.photo import Picture, to_unit
from engine.training.sr import degradations
from engine.training.sr.chain import SimulatedInput
from engine.training.sr.recipe import Recipe

CANDIDATES = 96
"""Random crops that a free sample is compared with."""

SHORTLIST = 8
"""Candidates of the closest colours, which are compared by VGG's feature maps."""

Enlarge = Callable[[Tensor], Tensor]
"""A network with clamped output: [N, 3 + noise channels, h, w] -> [N, 3, scale * h, scale * w]."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one iteration in the order exact pairs, reconstructions, free samples."""

    lr: Tensor
    """float32 [N, 3, h, w] in [0, 1], without input noise."""

    hr: Tensor
    """float32 [N, 3, H, W] in [0, 1]."""

    coarse: Tensor
    """[N - pairs, 3, h, w]: images that the outputs of the rows after ``pairs`` should reduce to."""

    pairs: int
    """Number of exact pairs, whose ``lr`` is ``hr`` reduced."""

    matched: int
    """Number of rows whose ``lr`` and ``hr`` show the same place: exact pairs, and reconstructions approximately."""


class BatchSource(Protocol):
    """Source of training batches."""

    def draw(self, generator: Generator) -> Batch:
        """Draw the batch of one iteration."""


@dataclass(frozen=True, slots=True)
class Crop:
    """One row of a batch, uint8 except for simulated inputs."""

    hr: Tensor

    lr: Tensor | None = None
    """Crop of a simulated input, if the row has one."""

    coarse: Tensor | None = None
    """Target of that crop at its own size."""


class PhotographPairs:
    """Crops of one photograph with their reductions, and crops of simulated inputs with the photograph's crop beside them."""

    def __init__(
        self,
        photo: Picture,
        simulated: Sequence[SimulatedInput],
        recipe: Recipe,
        scale: int,
        trained: int,
        device: torch.device,
        vgg: VGGFeatures | None = None,
    ) -> None:
        """Check that every image is large enough for a crop.

        Args:
            photo: the photograph at the size of the step's output.
            simulated: simulated inputs, for the recipe's share of the rows.
            recipe: batch, crop, degradation and augmentation.
            scale: enlargement of the step.
            trained: number of columns, from the left, that training may see.
            device: where batches are returned.
            vgg: compares textures when a free sample looks for a similar crop.

        Raises:
            InputError: an image is smaller than a crop.
        """
        self.photo, self.recipe, self.scale, self.device = photo, recipe, scale, device
        self.vgg = vgg
        self.size = (photo.size[0], trained)
        self.simulated_rows = round(recipe.chain * recipe.batch) if simulated else 0
        self.simulated = list(simulated)
        check_crop(self.size, recipe.crop, "the photograph at this step")
        for one in simulated:
            check_crop((one.picture.shape[1], self._columns(one)), recipe.crop // scale, "a simulated input")

    @property
    def aligned(self) -> bool:
        """Whether enlarged simulated inputs have the photograph's size, so that places match pixel by pixel."""
        sizes = {(self.scale * one.picture.shape[1], self.scale * one.picture.shape[2]) for one in self.simulated}
        return sizes <= {self.photo.size}

    def draw(self, generator: Generator) -> Batch:
        """Draw the batch of one iteration."""
        kinds = sorted(
            self.simulated[_randint(len(self.simulated), generator)].paired for _ in range(self.simulated_rows)
        )
        paired = sum(kinds)
        exact = [self._exact_crop(generator) for _ in range(self.recipe.batch - self.simulated_rows)]
        simulated = [self._simulated_crop(index < paired, generator) for index in range(self.simulated_rows)]
        hr = to_unit(torch.stack([crop.hr for crop in (*exact, *simulated)]).to(self.device))
        simulated_lr = self._stack([crop.lr for crop in simulated], hr)
        exact_lr = degrade(hr[: len(exact)], self.recipe, self.scale, generator) if exact else simulated_lr[:0]
        coarse = self._stack([crop.coarse for crop in simulated], hr)
        return Batch(torch.cat([exact_lr, simulated_lr]), hr, coarse, len(exact), len(exact) + paired)

    def _exact_crop(self, generator: Generator) -> Crop:
        side = self.recipe.crop
        y, x = _randint(self.size[0] - side + 1, generator), _randint(self.size[1] - side + 1, generator)
        augment = Augmentation.draw(self.recipe, generator)
        return Crop(augment(self.photo.crop(y, x, side, side)))

    def _simulated_crop(self, paired: bool, generator: Generator) -> Crop:
        """Crop of a simulated input, with the photograph's crop at the same relative place, or a similar one."""
        candidates = [one for one in self.simulated if one.paired == paired]
        one = candidates[_randint(len(candidates), generator)]
        side = self.recipe.crop
        small = side // self.scale
        bottom, right = one.picture.shape[1] - small, self._columns(one) - small
        y, x = _randint(bottom + 1, generator), _randint(right + 1, generator)
        rows, columns = slice(y, y + small), slice(x, x + small)
        picture, target = one.picture[:, rows, columns], one.target[:, rows, columns]
        if not paired:
            real = self._best_match(picture, generator)
        elif self.aligned:
            real = self.photo.crop(y * self.scale, x * self.scale, side, side)
        else:
            top = round(y / max(1, bottom) * (self.size[0] - side))
            left = round(x / max(1, right) * (self.size[1] - side))
            real = self.photo.crop(top, left, side, side)
        augment = Augmentation.draw(self.recipe, generator)
        return Crop(augment(real), augment(picture), augment(target))

    def _best_match(self, picture: Tensor, generator: Generator) -> Tensor:
        """Find the crop most similar to a small image among ``CANDIDATES`` random ones.

        Grass then learns its texture from grass, and rock from rock. Crops are compared by their distribution of colours.
        With a VGG the best ``SHORTLIST`` are compared by their mean feature maps: bright stones and bright water have the
        same colours.
        """
        side, small = self.recipe.crop, picture.float()
        places = [
            (_randint(self.size[0] - side + 1, generator), _randint(self.size[1] - side + 1, generator))
            for _ in range(CANDIDATES)
        ]
        crops = [self.photo.crop(y, x, side, side) for y, x in places]
        reduced = F.avg_pool2d(to_unit(torch.stack(crops)), self.scale)
        distances = torch.stack([(_sorted_colours(one) - _sorted_colours(small)).abs().mean() for one in reduced])
        if self.vgg is None:
            return crops[int(distances.argmin())]
        best = distances.topk(SHORTLIST, largest=False).indices
        distances = _feature_distance(torch.cat([small[None], reduced[best]]).to(self.device), self.vgg)
        return crops[int(best[distances.argmin()])]

    def _columns(self, one: SimulatedInput) -> int:
        """Number of columns that training may see; all of a free sample."""
        width = int(one.picture.shape[2])
        return width * self.size[1] // self.photo.size[1] if one.paired else width

    def _stack(self, parts: Sequence[Tensor | None], like: Tensor) -> Tensor:
        """[n, 3, h, w] with the dtype and device of ``like``; n may be 0."""
        small = self.recipe.crop // self.scale
        tensors = [part.to(like) for part in parts if part is not None]
        return torch.stack(tensors) if tensors else like.new_empty(0, 3, small, small)


class TeacherPairs:
    """Reduced crops of any photographs with a teacher's output as target."""

    def __init__(
        self, photos: Sequence[tuple[Picture, int]], enlarge: Enlarge, recipe: Recipe, scale: int, device: torch.device
    ) -> None:
        """Check that every photograph is large enough for a crop.

        Args:
            photos: each with the number of columns, from the left, that training may see. Crops are drawn in proportion to
                the area.
            enlarge: the teacher.
            recipe: batch, crop, degradation and augmentation.
            scale: enlargement of the teacher.
            device: where batches are returned.

        Raises:
            InputError: a photograph is smaller than a crop.
        """
        self.photos, self.enlarge, self.recipe, self.scale, self.device = photos, enlarge, recipe, scale, device
        for picture, trained in photos:
            check_crop((picture.size[0], trained), recipe.crop, "a photograph")
        self.areas = torch.tensor([float(picture.size[0] * trained) for picture, trained in photos])

    def draw(self, generator: Generator) -> Batch:
        """Draw the batch of one iteration."""
        hr = to_unit(torch.stack([self._crop(generator) for _ in range(self.recipe.batch)]).to(self.device))
        lr = degrade(hr, self.recipe, self.scale, generator)
        return Batch(lr, self.enlarge(lr).to(self.device), lr[:0], len(lr), len(lr))

    def _crop(self, generator: Generator) -> Tensor:
        picture, trained = self.photos[int(torch.multinomial(self.areas, 1, generator=generator))]
        side = self.recipe.crop
        y, x = _randint(picture.size[0] - side + 1, generator), _randint(trained - side + 1, generator)
        return Augmentation.draw(self.recipe, generator)(picture.crop(y, x, side, side))


@dataclass(frozen=True, slots=True)
class Augmentation:
    """A flip and a rotation, applied alike to all parts of a row."""

    flip: bool
    """Mirror left and right, before the rotation."""

    quarter_turns: int

    @classmethod
    def draw(cls, recipe: Recipe, generator: Generator) -> Augmentation:
        return cls(recipe.flip and _randint(2, generator) == 1, _randint(4, generator) if recipe.rotate else 0)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.flip(-1) if self.flip else x
        return torch.rot90(x, self.quarter_turns, (-2, -1)) if self.quarter_turns else x


def degrade(hr: Tensor, recipe: Recipe, scale: int, generator: Generator) -> Tensor:
    """Reduce HR crops [N, 3, H, W] by the recipe's degradation."""
    if recipe.degradation == "bicubic":
        return degradations.bicubic(hr, scale)
    return degradations.bsrgan(hr, scale, generator)


def add_noise(lr: Tensor, recipe: Recipe, channels: int, generator: Generator) -> Tensor:
    """Add input noise of the recipe's strength and append noise channels.

    Args:
        lr: [N, 3, h, w].
        recipe: strength and kind of the noise; the result is not clipped.
        channels: number of noise channels, normally distributed.
        generator: CPU generator.

    Returns:
        The network's input [N, 3 + channels, h, w].
    """
    if recipe.sigma:
        sigma = torch.full((lr.shape[0], 1, 1, 1), recipe.sigma)
        if recipe.noise == "uniform":
            sigma *= torch.rand(sigma.shape, generator=generator)
        lr = lr + (sigma * torch.randn(lr.shape, generator=generator)).to(lr.device)
    if channels:
        shape = (lr.shape[0], channels, *lr.shape[2:])
        lr = torch.cat([lr, torch.randn(shape, generator=generator).to(lr)], 1)
    return lr


def check_crop(size: tuple[int, int], side: int, name: str) -> None:
    """Raise InputError unless a crop fits into (height, width)."""
    if min(size) < side:
        raise InputError(
            f"{name}: {size[1]}x{size[0]} pixels to train on, smaller than a crop of {side}x{side}; use a smaller crop"
        )


def check_grid(crop: int, scale: int, align: int) -> None:
    """Raise UsageError unless a crop's LR side is a multiple of the network's window."""
    if crop % (scale * align):
        raise UsageError(f"crop = {crop}: must be a multiple of {scale * align} for this network; change the preset")


def _sorted_colours(picture: Tensor) -> Tensor:
    """Sorted values of each channel; their mean difference is the 1-Wasserstein distance of two histograms."""
    return picture.flatten(1).sort(-1).values


@torch.no_grad()
def _feature_distance(pictures: Tensor, vgg: VGGFeatures) -> Tensor:
    """Distance of the mean feature maps of ``pictures[1:]`` to those of ``pictures[0]``, averaged over layers.

    Args:
        pictures: [N, 3, h, w] in [0, 1].
        vgg: its layers count equally.

    Returns:
        [N - 1] on the CPU.
    """
    means = [maps.float().mean((2, 3)) for maps in maps_of(pictures, vgg, (0, 0), "bf16").values()]
    return torch.stack([(mean[1:] - mean[0]).norm(dim=1) / mean.norm(dim=1).mean() for mean in means]).mean(0).cpu()


def _randint(limit: int, generator: Generator) -> int:
    """Random integer in [0, limit)."""
    return int(torch.randint(limit, (), generator=generator))
