"""Texture: distances between the distributions of patches, or of feature maps' vectors, and the unevenness of phases.

Where a texture lies does not matter to them. Feature maps may come in half precision; all differences are taken in fp32, for
they are small and what they are taken of is large.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.errors import UsageError
from engine.training.losses.vgg import Maps
from engine.training.run.precision import at_least_fp32

TEXTURE_LAYERS = ("relu1_2", "relu2_2", "relu3_3")  # that VGG-16 and VGG-19 both have
_FAINT = 2.5e-4  # texture of a sixteenth of a level, and less, is none
_POSITIONS = 32  # of a feature map, down and across, whose vectors are compared at a time


class SlicedWasserstein(nn.Module):
    """How far the patches of two pictures are apart as distributions; where a patch lies does not matter.

    The patches (patch x patch x 3 values) are projected on random directions of length one, and along each the
    1-Wasserstein distance of the two sets of numbers is the mean difference of their sorted values (Rabin et al. 2012;
    as a texture loss Heitz et al. 2021; of patches Elnekave and Weiss 2022, "GPDM"). The mean over the directions and over
    `scales` scales, each half as large as the one before, in units of the pixels' values. A projection of all patches is
    one convolution. The first picture of one batch is compared with the first of the other, and so on: a landscape's
    texture depends on where one looks.

    `phases` compares, in each call, the patches at every `phases`-th row and column alone, from a place drawn anew. Together
    the patches of a regular grid may have the distribution of a photograph's; at one phase they do not. A network that
    enlarges 4 times and has no texture to give makes such a grid, of 4 pixels.

    `detail` takes directions that are blind to colour and to slopes of it, which leaves at each scale the finest texture, and
    divides their distance by the mean size of the real patches' values along them, crop by crop. Without, what varies slowly
    drowns fine texture, and a bright crop a dark one.

    `heights` makes a patch's height a part of it, as a fourth channel that grows from 0 at the top to `heights` at the bottom:
    leaves should then be found above and water below. With 1 the whole way down is as far as from black to white.

    `at_a_time` directions, a divisor of `projections`, take memory at a time: the fake pictures' gradient is taken at once and
    kept in the projections' place. None: all of them.
    """

    def __init__(
        self,
        patch: int = 7,
        projections: int = 64,
        scales: int = 2,
        *,
        phases: int = 1,
        heights: float = 0.0,
        detail: bool = False,
        at_a_time: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("patch", patch), ("projections", projections), ("scales", scales), ("phases", phases)):
            if value < 1:
                raise UsageError(f"{name} = {value}: at least 1 is needed")
        if at_a_time is not None and (at_a_time < 1 or projections % at_a_time):
            raise UsageError(f"at_a_time = {at_a_time}: take a divisor of the {projections} projections")
        self.patch, self.projections, self.scales, self.phases = patch, projections, scales, phases
        self.heights, self.detail, self.at_a_time = heights, detail, at_a_time

    def forward(self, fake: Tensor, real: Tensor, generator: torch.Generator) -> Tensor:
        """(N, 3, H, W) in [0, 1], twice -> scalar, fp32; fp64 of fp64.

        The directions and the phase are drawn anew for every call and scale, from `generator`, on the CPU. Raises UsageError
        for batches of different shapes and for pictures that are smaller than a patch at the last scale.
        """
        self._check(fake, real)
        with torch.autocast(fake.device.type, enabled=False):
            fake = at_least_fp32(fake)
            real = real.to(fake)
            if self.heights:
                fake, real = self._with_heights(fake), self._with_heights(real)
            distances = []
            for scale in range(self.scales):
                if scale:
                    fake, real = F.avg_pool2d(fake, 2), F.avg_pool2d(real, 2)
                filters = self._draw_directions(fake.shape[1], generator).to(fake)
                stride = max(1, self.phases >> scale)
                phase = _draw_phase(stride, generator)
                ours, theirs = self._from(phase, fake), self._from(phase, real)
                if self.at_a_time is None:
                    distances.append(self._distance(ours, theirs, filters, stride))
                else:
                    groups = torch.split(filters, self.at_a_time)
                    parts = [partial(self._distance, real=theirs, filters=few, stride=stride) for few in groups]
                    distances.append(_MeanOneByOne.apply(ours, parts))  # type: ignore[no-untyped-call]
            return torch.stack(distances).mean()

    def _distance(self, fake: Tensor, real: Tensor, filters: Tensor, stride: int) -> Tensor:
        ours, theirs = (F.conv2d(batch, filters, stride=stride).flatten(2) for batch in (fake, real))
        distance = _sorted_difference(ours, theirs).abs()
        if self.detail:
            distance = distance / (theirs.abs().mean(-1, keepdim=True) + _FAINT)
        return distance.mean()

    def _check(self, fake: Tensor, real: Tensor) -> None:
        for name, batch in (("fake", fake), ("real", real)):
            if batch.ndim != 4 or batch.shape[1] != 3 or not len(batch):
                raise UsageError(f"{name} has the shape {tuple(batch.shape)}; a batch of RGB pictures is (N, 3, H, W)")
        _check_equal(fake, real)
        least = self.patch << (self.scales - 1)
        height, width = fake.shape[2:]
        if min(height, width) < least:
            raise UsageError(
                f"pictures of {height} x {width} pixels; patches of {self.patch} at {self.scales} scales need at "
                f"least {least} x {least}: take larger crops or fewer scales"
            )

    def _with_heights(self, batch: Tensor) -> Tensor:
        pictures, _, height, width = batch.shape
        down = torch.linspace(0, self.heights, height).to(batch)
        return torch.cat([batch, down[:, None].expand(pictures, 1, height, width)], 1)

    def _draw_directions(self, channels: int, generator: torch.Generator) -> Tensor:
        filters = torch.randn(self.projections, channels, self.patch, self.patch, generator=generator)
        if self.detail:
            filters = _without_slopes(filters - filters.mean((2, 3), keepdim=True))
        return F.normalize(filters.flatten(1)).view_as(filters)

    def _from(self, phase: Sequence[int], batch: Tensor) -> Tensor:
        """The batch from this row and column on, as far as there is room for a patch."""
        y, x = (min(at, size - self.patch) for at, size in zip(phase, batch.shape[2:], strict=True))
        return batch[:, :, y:, x:]


class _MeanOneByOne(torch.autograd.Function):
    """The mean of scalar functions of one tensor, none of which keeps anything for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:  # noqa: ANN401 (torch's)
        if not ctx.needs_input_grad[0]:
            return torch.stack([part(x) for part in parts]).mean()
        x = x.detach().requires_grad_()
        values = []
        with torch.enable_grad():
            for part in parts:
                value = part(x) / len(parts)
                value.backward()  # type: ignore[no-untyped-call]
                values.append(value.detach())
        ctx.save_for_backward(x.grad)
        return torch.stack(values).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        return grad * ctx.saved_tensors[0], None


class FeatureWasserstein(nn.Module):
    """How far the vectors of two pictures' feature maps are apart as distributions (Heitz et al. 2021), squared.

    As `SlicedWasserstein`, with two differences: the vectors' components are divided by their standard deviation in the
    real pictures (and a tenth of that of the whole map, for components that hardly vary), so that every layer and every
    component counts alike; and the differences of the sorted values are squared. Of maps larger than 32 x 32 every second,
    fourth, ... row and column is taken, from a place drawn anew.
    """

    def __init__(self, projections: int = 64) -> None:
        super().__init__()
        self.projections = projections

    def forward(self, fake: Maps, real: Maps, generator: torch.Generator, *, heights: Tensor | None = None) -> Tensor:
        """Maps (N, C, H, W) of the same layers, twice -> scalar, fp32; `real` gets no gradient.

        `heights` of the pictures' rows make a vector's height a component of it; a height of 1 counts as much as a deviation of
        all other components together.
        """
        distances = []
        for layer, ours in fake.items():
            theirs = real[layer].detach()
            _check_equal(ours, theirs)
            with torch.autocast(ours.device.type, enabled=False):
                distances.append(self._distance(ours, theirs, generator, heights))
        return torch.stack(distances).mean()

    def _distance(self, fake: Tensor, real: Tensor, generator: torch.Generator, heights: Tensor | None) -> Tensor:
        rows = fake.shape[2]
        stride = max(1, min(fake.shape[2:]) // _POSITIONS)
        y, x = _draw_phase(stride, generator)
        fake, real = (at_least_fp32(maps[:, :, y::stride, x::stride]) for maps in (fake, real))
        deviation = real.std((0, 2, 3)) + 0.1 * real.std()
        directions = F.normalize(torch.randn(fake.shape[1], self.projections, generator=generator), dim=0).to(fake)
        directions = directions / deviation.clamp_min(torch.finfo(fake.dtype).tiny)[:, None]
        projected = [torch.einsum("nchw,cp->nphw", maps, directions) for maps in (fake, real)]
        if heights is not None:
            slopes = torch.randn(self.projections, 1, 1, generator=generator).to(fake)
            down = F.adaptive_avg_pool1d(heights.to(fake)[None], rows)[0, y::stride, None]
            projected = [maps + slopes * down for maps in projected]
        return _sorted_difference(*(maps.flatten(2) for maps in projected)).square().mean()


class Checkerboard(nn.Module):
    """How unevenly a network that enlarges `scale` times spreads fine texture over the scale x scale pixels it makes of one.

    A texture that lies where it likes varies as much at each of those places, its phases; one that is made within the
    squares weaves their borders into the picture (checkerboard artefacts, Odena et al. 2016). Random 3x3 filters whose
    weights add up to zero in each colour, and which are therefore blind to colour itself, answer to texture; the mean size of
    their answers at a phase, divided by its mean over the phases, should be 1. The loss is the mean squared difference from
    1, over phases and filters; unlike a patch distance it needs no real picture, and small, weak textures count as much as
    strong ones, in which a distance drowns them.
    """

    def __init__(self, scale: int, filters: int = 32) -> None:
        super().__init__()
        self.scale, self.filters = scale, filters

    def forward(self, fake: Tensor, generator: torch.Generator) -> Tensor:
        """(N, 3, H, W) in [0, 1], the first pixel at phase 0 -> scalar, fp32; fp64 of fp64.

        The filters are drawn anew for every call, from `generator`, on the CPU. Raises UsageError for pictures that hold no
        whole square inside their outermost pixels.
        """
        height, width = ((n - 2) // self.scale for n in fake.shape[2:])
        if min(height, width) < 1:
            raise UsageError(
                f"pictures of {fake.shape[2]} x {fake.shape[3]} pixels hold no square of {self.scale} x {self.scale} with "
                f"a pixel around it: take larger crops"
            )
        with torch.autocast(fake.device.type, enabled=False):
            filters = torch.randn(self.filters, 3, 3, 3, generator=generator)
            filters = F.normalize((filters - filters.mean((2, 3), keepdim=True)).flatten(1)).view_as(filters)
            fake = at_least_fp32(fake)
            answers = F.conv2d(fake, filters.to(fake)).abs()
            squares = answers[:, :, : height * self.scale, : width * self.scale]
            squares = squares.reshape(len(fake), self.filters, height, self.scale, width, self.scale)
            phases = squares.mean((2, 4)) + _FAINT
            even: Tensor = phases / phases.mean((2, 3), keepdim=True)
            return even.mean(0).sub(1).square().mean()


def _without_slopes(filters: Tensor) -> Tensor:
    """Without what answers to a colour that grows evenly, across or down; of filters whose weights add up to zero."""
    ramp = torch.linspace(-1, 1, filters.shape[-1])
    for slope in (ramp.expand_as(filters), ramp[:, None].expand_as(filters)):
        share = (filters * slope).sum((2, 3), keepdim=True) / slope.square().sum((2, 3), keepdim=True)
        filters = filters - share * slope
    return filters


def _draw_phase(stride: int, generator: torch.Generator) -> list[int]:
    return torch.randint(stride, (2,), generator=generator).tolist() if stride > 1 else [0, 0]


def _sorted_difference(fake: Tensor, real: Tensor) -> Tensor:
    """Sorted values are quantiles: the differences of those of the same rank, along the last axis."""
    return fake.sort(-1).values - real.sort(-1).values


def _check_equal(fake: Tensor, real: Tensor) -> None:
    if fake.shape != real.shape:
        raise UsageError(f"fake is {tuple(fake.shape)} and real {tuple(real.shape)}; only equal shapes can be compared")
