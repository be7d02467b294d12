"""What an iteration sees: batches of small crops and of what they should become.

Every random choice comes from the caller's generator, on the CPU, so a seed means the same on every device.
"""

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
from engine.training.sr.chain import ChainPicture
from engine.training.sr.recipe import Recipe

CANDIDATES, SHORTLIST = 96, 8

Enlarge = Callable[[Tensor], Tensor]  # a network's input [N, inputs, h, w] -> [N, 3, scale h, scale w], clamped


@dataclass(frozen=True, slots=True)
class Batch:
    """`lr` [N, 3, h, w] and `hr` [N, 3, H, W], float32 in [0, 1], without input noise.

    The first `pairs` rows are exact pairs. The first `matched` show the same place, the ones after `pairs` only about
    (reconstructions); rows from `matched` on (free samples) stand beside crops with about their colours. `coarse`
    [N - pairs, 3, h, w] is what the output of the rows after `pairs` should reduce to.
    """

    lr: Tensor
    hr: Tensor
    coarse: Tensor
    pairs: int
    matched: int


class Source(Protocol):
    """Where batches come from."""

    def draw(self, generator: Generator) -> Batch: ...


@dataclass(frozen=True, slots=True)
class Crop:
    """An HR crop, and of a chain row its input and what that should have been."""

    hr: Tensor
    lr: Tensor | None = None
    coarse: Tensor | None = None


class PhotographPairs:
    """Crops of one photograph with their reductions, and crops of chain pictures with the photograph's at their place.

    `trained`: how many columns, from the left, may be seen. `vgg` helps to find crops that look alike.
    """

    def __init__(
        self,
        photo: Picture,
        chain: Sequence[ChainPicture],
        recipe: Recipe,
        scale: int,
        trained: int,
        device: torch.device,
        vgg: VGGFeatures | None = None,
    ) -> None:
        self.photo, self.recipe, self.scale, self.device = photo, recipe, scale, device
        self.vgg = vgg
        self.size = (photo.size[0], trained)
        self.chained = round(recipe.chain * recipe.batch) if chain else 0
        self.chain = list(chain)
        check_crop(self.size, recipe.crop, "the photograph at this step")
        for one in chain:
            check_crop((one.picture.shape[1], self._columns(one)), recipe.crop // scale, "a chain picture")

    @property
    def aligned(self) -> bool:
        """Whether a chain picture enlarged is as large as the photograph, so that places agree pixel by pixel."""
        sizes = {(self.scale * one.picture.shape[1], self.scale * one.picture.shape[2]) for one in self.chain}
        return sizes <= {self.photo.size}

    def draw(self, generator: Generator) -> Batch:
        which = sorted(self.chain[_below(len(self.chain), generator)].paired for _ in range(self.chained))
        paired = sum(which)
        plain = [self._photograph(generator) for _ in range(self.recipe.batch - self.chained)]
        chained = [self._chained(index < paired, generator) for index in range(self.chained)]
        hr = to_unit(torch.stack([crop.hr for crop in (*plain, *chained)]).to(self.device))
        given = self._stack([crop.lr for crop in chained], hr)
        made = degrade(hr[: len(plain)], self.recipe, self.scale, generator) if plain else given[:0]
        coarse = self._stack([crop.coarse for crop in chained], hr)
        lr = torch.cat([made, given])
        return Batch(lr, hr, coarse, len(plain), len(plain) + paired)

    def _photograph(self, generator: Generator) -> Crop:
        side = self.recipe.crop
        y, x = _below(self.size[0] - side + 1, generator), _below(self.size[1] - side + 1, generator)
        turn = _Turn.draw(self.recipe, generator)
        return Crop(turn(self.photo.crop(y, x, side, side)))

    def _chained(self, paired: bool, generator: Generator) -> Crop:
        """The crop of the photograph lies at the same relative place; a free sample's is the one that looks most like it."""
        candidates = [one for one in self.chain if one.paired == paired]
        one = candidates[_below(len(candidates), generator)]
        side = self.recipe.crop
        small = side // self.scale
        down, right = one.picture.shape[1] - small, self._columns(one) - small
        y, x = _below(down + 1, generator), _below(right + 1, generator)
        rows, columns = slice(y, y + small), slice(x, x + small)
        picture, target = one.picture[:, rows, columns], one.target[:, rows, columns]
        if not paired:
            real = self._alike(picture, generator)
        elif self.aligned:
            real = self.photo.crop(y * self.scale, x * self.scale, side, side)
        else:
            top, left = (
                round(y / max(1, down) * (self.size[0] - side)),
                round(x / max(1, right) * (self.size[1] - side)),
            )
            real = self.photo.crop(top, left, side, side)
        turn = _Turn.draw(self.recipe, generator)
        return Crop(turn(real), turn(picture), turn(target))

    def _alike(self, picture: Tensor, generator: Generator) -> Tensor:
        """The crop, of `CANDIDATES` drawn ones, that looks most like the small picture: grass is to learn its texture from
        grass, and rock from rock.

        By the distribution of colours; where there is a VGG, of the best by colours the one whose maps are most alike in the mean,
        for bright stones and bright water have the same colours.
        """
        side, small = self.recipe.crop, picture.float()
        places = [
            (_below(self.size[0] - side + 1, generator), _below(self.size[1] - side + 1, generator))
            for _ in range(CANDIDATES)
        ]
        crops = [self.photo.crop(y, x, side, side) for y, x in places]
        reduced = F.avg_pool2d(to_unit(torch.stack(crops)), self.scale)
        far = torch.stack([(_colours(one) - _colours(small)).abs().mean() for one in reduced])
        if self.vgg is None:
            return crops[int(far.argmin())]
        best = far.topk(SHORTLIST, largest=False).indices
        return crops[int(best[_unlike(torch.cat([small[None], reduced[best]]).to(self.device), self.vgg).argmin()])]

    def _columns(self, one: ChainPicture) -> int:
        """How many of its columns show what may be trained on; a free sample shows all of it."""
        width = int(one.picture.shape[2])
        return width * self.size[1] // self.photo.size[1] if one.paired else width

    def _stack(self, parts: Sequence[Tensor | None], like: Tensor) -> Tensor:
        """[n, 3, h, w] as `like`; n may be 0."""
        small = self.recipe.crop // self.scale
        found = [part.to(like) for part in parts if part is not None]
        return torch.stack(found) if found else like.new_empty(0, 3, small, small)


class TeacherPairs:
    """Reduced crops of any photographs, and what a trained network makes of them: pairs for a smaller network.

    `photos`: pictures and how many of their columns, from the left, may be seen. Large ones are drawn more often.
    """

    def __init__(
        self, photos: Sequence[tuple[Picture, int]], enlarge: Enlarge, recipe: Recipe, scale: int, device: torch.device
    ) -> None:
        self.photos, self.enlarge, self.recipe, self.scale, self.device = photos, enlarge, recipe, scale, device
        for picture, trained in photos:
            check_crop((picture.size[0], trained), recipe.crop, "a photograph")
        self.areas = torch.tensor([float(picture.size[0] * trained) for picture, trained in photos])

    def draw(self, generator: Generator) -> Batch:
        hr = to_unit(torch.stack([self._crop(generator) for _ in range(self.recipe.batch)]).to(self.device))
        lr = degrade(hr, self.recipe, self.scale, generator)
        return Batch(lr, self.enlarge(lr).to(self.device), lr[:0], len(lr), len(lr))

    def _crop(self, generator: Generator) -> Tensor:
        picture, trained = self.photos[int(torch.multinomial(self.areas, 1, generator=generator))]
        side = self.recipe.crop
        y, x = _below(picture.size[0] - side + 1, generator), _below(trained - side + 1, generator)
        return _Turn.draw(self.recipe, generator)(picture.crop(y, x, side, side))


@dataclass(frozen=True, slots=True)
class _Turn:
    """One augmentation, to be applied to all parts of a pair."""

    mirrored: bool
    quarters: int

    @classmethod
    def draw(cls, recipe: Recipe, generator: Generator) -> "_Turn":
        return cls(recipe.flip and _below(2, generator) == 1, _below(4, generator) if recipe.rotate else 0)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.flip(-1) if self.mirrored else x
        return torch.rot90(x, self.quarters, (-2, -1)) if self.quarters else x


def degrade(hr: Tensor, recipe: Recipe, scale: int, generator: Generator) -> Tensor:
    """HR crops to LR ones, as the recipe says."""
    if recipe.degradation == "bicubic":
        return degradations.bicubic(hr, scale)
    return degradations.bsrgan(hr, scale, generator)


def add_noise(lr: Tensor, recipe: Recipe, channels: int, generator: Generator) -> Tensor:
    """[N, 3, h, w] -> a network's input [N, 3 + channels, h, w]: noise of the recipe's strength in the picture, which is
    never clipped before the network, and `channels` of normal numbers behind it.
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


def check_crop(size: tuple[int, int], side: int, what: str) -> None:
    if min(size) < side:
        raise InputError(
            f"{what} has {size[1]}x{size[0]} pixels to train on, a crop {side}x{side}: take a smaller crop"
        )


def check_grid(crop: int, scale: int, align: int) -> None:
    """A crop's LR side is whole windows."""
    if crop % (scale * align):
        raise UsageError(f"crop = {crop}: must be a multiple of {scale * align} for this network")


def _colours(picture: Tensor) -> Tensor:
    """The sorted values of each channel: the mean difference of two is the 1-Wasserstein distance of their histograms."""
    return picture.flatten(1).sort(-1).values


@torch.no_grad()
def _unlike(pictures: Tensor, vgg: VGGFeatures) -> Tensor:
    """How far the means of the maps of all but the first of [N, 3, h, w] are from those of the first, layer by layer alike."""
    means = [maps.float().mean((2, 3)) for maps in maps_of(pictures, vgg, (0, 0), "bf16").values()]
    return torch.stack([(mean[1:] - mean[0]).norm(dim=1) / mean.norm(dim=1).mean() for mean in means]).mean(0).cpu()


def _below(limit: int, generator: Generator) -> int:
    """A whole number from 0 to limit - 1."""
    return int(torch.randint(limit, (), generator=generator))
