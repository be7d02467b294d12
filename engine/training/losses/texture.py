"""Texture losses: distances between distributions of patches or feature vectors, and checkerboard artefacts.

The losses ignore where a texture lies. Feature maps may be in half precision; differences are taken in fp32, because they
are small compared with the values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from engine.errors import UsageError
from engine.training.losses.vgg import Maps
from engine.training.run.precision import at_least_fp32

TEXTURE_LAYERS = ("relu1_2", "relu2_2", "relu3_3")
"""Layers whose vectors are compared, present in VGG-16 and VGG-19."""

_FAINT = 2.5e-4
"""Texture of a sixteenth of a grey level; anything fainter counts as none."""
_POSITIONS = 32
"""Rows and columns of a feature map that are compared in one call."""


class SlicedWasserstein(nn.Module):
    """Sliced Wasserstein distance between the patches of two images, wherever a patch lies.

    Patches (patch x patch x 3 values) are projected on random directions of length one. Along each direction the
    1-Wasserstein distance of two sets of numbers is the mean difference of their sorted values (Rabin et al. 2012; as a
    texture loss Heitz et al. 2021; of patches Elnekave and Weiss 2022, "GPDM"). The result is the mean over directions and
    scales, in units of pixel values. Images of a batch are compared pairwise, because a landscape's texture depends on the
    place. The projection of all patches is one convolution.

    Args:
        patch: side of a patch, pixels.
        projections: number of directions.
        scales: number of image sizes, each half as large as the one before.
        phases: stride between compared patches, from a random offset in each call. All patches of a regular grid
            together may have a photograph's distribution; at a single phase they do not. A network without texture that
            enlarges 4 times makes such a grid with a period of 4 pixels.
        heights: value at the bottom of a fourth channel that grows from 0 at the top, so that leaves belong above and water
            below; with 1 the whole height counts as much as black against white. 0: no such channel.

    Raises:
        UsageError: an argument below its minimum.
    """

    def __init__(
        self, patch: int = 7, projections: int = 64, scales: int = 2, *, phases: int = 1, heights: float = 0.0
    ) -> None:
        super().__init__()
        for name, value in (("patch", patch), ("projections", projections), ("scales", scales), ("phases", phases)):
            if value < 1:
                raise UsageError(f"{name} = {value}: too small; use at least 1")
        self.patch, self.projections, self.scales, self.phases = patch, projections, scales, phases
        self.heights = heights

    def forward(self, fake: Tensor, real: Tensor, generator: Generator) -> Tensor:
        """Distance of two batches (N, 3, H, W) in [0, 1]: a scalar, fp32; fp64 for fp64.

        Directions and phase are drawn for every call and scale from ``generator``, on the CPU.

        Raises:
            UsageError: shapes differ, or an image is smaller than a patch at the last scale.
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
                directions = self._draw_directions(fake.shape[1], generator).to(fake)
                stride = max(1, self.phases >> scale)
                offset = _draw_offset(stride, generator)
                distances.append(self._distance(self._cut(fake, offset), self._cut(real, offset), directions, stride))
            return torch.stack(distances).mean()

    def _draw_directions(self, channels: int, generator: Generator) -> Tensor:
        """Filters [projections, channels, patch, patch] of length one."""
        filters = self._restrict(torch.randn(self.projections, channels, self.patch, self.patch, generator=generator))
        return F.normalize(filters.flatten(1)).view_as(filters)

    def _restrict(self, filters: Tensor) -> Tensor:
        """Component of the filters that is compared."""
        return filters

    def _distance(self, fake: Tensor, real: Tensor, directions: Tensor, stride: int) -> Tensor:
        """Mean distance along the directions at one scale."""
        return _sorted_difference(*_projections(fake, real, directions, stride)).abs().mean()

    def _check(self, fake: Tensor, real: Tensor) -> None:
        for name, batch in (("fake", fake), ("real", real)):
            if batch.ndim != 4 or batch.shape[1] != 3 or not len(batch):
                raise UsageError(f"{name}: not a batch of RGB images (shape {tuple(batch.shape)}); pass (N, 3, H, W)")
        _check_equal(fake, real)
        least = self.patch << (self.scales - 1)
        height, width = fake.shape[2:]
        if min(height, width) < least:
            raise UsageError(
                f"images of {height} x {width} pixels: too small (patches of {self.patch} at {self.scales} scales need "
                f"{least} x {least}); use larger crops or fewer scales"
            )

    def _with_heights(self, batch: Tensor) -> Tensor:
        count, _, height, width = batch.shape
        down = torch.linspace(0, self.heights, height).to(batch)
        return torch.cat([batch, down[:, None].expand(count, 1, height, width)], 1)

    def _cut(self, batch: Tensor, offset: Sequence[int]) -> Tensor:
        """The batch without the rows and columns before ``offset``, with room for at least one patch."""
        y, x = (min(start, size - self.patch) for start, size in zip(offset, batch.shape[2:], strict=True))
        return batch[:, :, y:, x:]


class FineTexture(SlicedWasserstein):
    """Sliced Wasserstein distance of the finest texture at each scale, relative to the real images' (decision 0017).

    Directions are blind to colour and to slopes of it. The distance along each is divided by the mean size of the real
    patches' values, crop by crop. In the plain distance slow variation drowns fine texture, and bright crops dark ones.

    Args:
        patch: side of a patch, pixels.
        projections: number of directions.
        scales: number of image sizes, each half as large as the one before.
        phases: as ``SlicedWasserstein``.
        at_a_time: number of directions in memory together, a divisor of ``projections``; their gradient is computed at
            once and kept instead of the projections. None: all.

    Raises:
        UsageError: an argument out of range.
    """

    def __init__(
        self,
        patch: int = 3,
        projections: int = 64,
        scales: int = 3,
        *,
        phases: int = 1,
        at_a_time: int | None = None,
    ) -> None:
        super().__init__(patch, projections, scales, phases=phases)
        if at_a_time is not None and (at_a_time < 1 or projections % at_a_time):
            raise UsageError(f"at_a_time = {at_a_time}: no divisor of the {projections} projections; use one")
        self.at_a_time = at_a_time

    def _restrict(self, filters: Tensor) -> Tensor:
        return _without_slopes(filters - filters.mean((2, 3), keepdim=True))

    def _distance(self, fake: Tensor, real: Tensor, directions: Tensor, stride: int) -> Tensor:
        if self.at_a_time is None:
            return self._relative_distance(fake, real, directions, stride)
        groups = torch.split(directions, self.at_a_time)
        parts = [partial(self._relative_distance, real=real, directions=few, stride=stride) for few in groups]
        distance: Tensor = _MeanOneByOne.apply(fake, parts)  # type: ignore[no-untyped-call]
        return distance

    def _relative_distance(self, fake: Tensor, real: Tensor, directions: Tensor, stride: int) -> Tensor:
        fake_values, real_values = _projections(fake, real, directions, stride)
        distance = _sorted_difference(fake_values, real_values).abs()
        return (distance / (real_values.abs().mean(-1, keepdim=True) + _FAINT)).mean()


class _MeanOneByOne(torch.autograd.Function):
    """Mean of scalar functions of one tensor, computed with their gradients one after the other to save memory."""

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
    """Squared sliced Wasserstein distance between the feature vectors of two images (Heitz et al. 2021).

    Differences from ``SlicedWasserstein``:

    * components are divided by their standard deviation in the real images plus a tenth of the whole map's, so that all
      layers count alike;
    * differences of sorted values are squared;
    * maps larger than 32 x 32 are sampled with a stride from a random offset.
    """

    def __init__(self, projections: int = 64) -> None:
        super().__init__()
        self.projections = projections

    def forward(self, fake: Maps, real: Maps, generator: Generator, *, heights: Tensor | None = None) -> Tensor:
        """Mean distance over the layers: a scalar, fp32.

        Args:
            fake: maps [N, C, H, W] by layer.
            real: maps of the same layers and shapes; they get no gradient.
            generator: source of directions and offsets, on the CPU.
            heights: height of each row of the images [rows], a further component of the vectors; a height of 1 counts
                as much as one standard deviation of all other components.

        Raises:
            UsageError: shapes differ.
        """
        distances = []
        for layer, fake_maps in fake.items():
            real_maps = real[layer].detach()
            _check_equal(fake_maps, real_maps)
            with torch.autocast(fake_maps.device.type, enabled=False):
                distances.append(self._distance(fake_maps, real_maps, generator, heights))
        return torch.stack(distances).mean()

    def _distance(self, fake: Tensor, real: Tensor, generator: Generator, heights: Tensor | None) -> Tensor:
        rows = fake.shape[2]
        stride = max(1, min(fake.shape[2:]) // _POSITIONS)
        y, x = _draw_offset(stride, generator)
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
    """Uneven strength of fine texture over the scale x scale pixels that a network makes of one (Odena et al. 2016).

    Even texture varies as strongly at each of these places (phases); texture made within the squares shows their borders.
    Random 3 x 3 filters that are blind to colour respond to texture. The mean size of their responses at a phase, divided
    by its mean over all phases, should be 1; the loss is the mean squared difference from 1 over phases and filters. It
    needs no real image, and weak textures count as much as strong ones.

    Args:
        scale: the network's enlargement.
        filters: number of random filters.
    """

    def __init__(self, scale: int, filters: int = 32) -> None:
        super().__init__()
        self.scale, self.filters = scale, filters

    def forward(self, fake: Tensor, generator: Generator) -> Tensor:
        """Unevenness of (N, 3, H, W) in [0, 1] whose first pixel has phase 0: a scalar, fp32; fp64 for fp64.

        The filters are drawn for every call from ``generator``, on the CPU.

        Raises:
            UsageError: no whole square lies inside the outermost pixels.
        """
        height, width = ((n - 2) // self.scale for n in fake.shape[2:])
        if min(height, width) < 1:
            raise UsageError(
                f"images of {fake.shape[2]} x {fake.shape[3]} pixels: no square of {self.scale} x {self.scale} with a "
                f"pixel around it; use larger crops"
            )
        with torch.autocast(fake.device.type, enabled=False):
            filters = torch.randn(self.filters, 3, 3, 3, generator=generator)
            filters = F.normalize((filters - filters.mean((2, 3), keepdim=True)).flatten(1)).view_as(filters)
            fake = at_least_fp32(fake)
            responses = F.conv2d(fake, filters.to(fake)).abs()
            squares = responses[:, :, : height * self.scale, : width * self.scale]
            squares = squares.reshape(len(fake), self.filters, height, self.scale, width, self.scale)
            phases = squares.mean((2, 4)) + _FAINT
            relative: Tensor = phases / phases.mean((2, 3), keepdim=True)
            return relative.mean(0).sub(1).square().mean()


def _without_slopes(filters: Tensor) -> Tensor:
    """Remove the response to linear gradients, across and down, from filters whose weights add up to zero."""
    ramp = torch.linspace(-1, 1, filters.shape[-1])
    for slope in (ramp.expand_as(filters), ramp[:, None].expand_as(filters)):
        share = (filters * slope).sum((2, 3), keepdim=True) / slope.square().sum((2, 3), keepdim=True)
        filters = filters - share * slope
    return filters


def _draw_offset(stride: int, generator: Generator) -> list[int]:
    """Row and column below ``stride``."""
    return torch.randint(stride, (2,), generator=generator).tolist() if stride > 1 else [0, 0]


def _projections(fake: Tensor, real: Tensor, directions: Tensor, stride: int) -> list[Tensor]:
    """Projections [N, directions, patches] of both batches' patches."""
    return [F.conv2d(batch, directions, stride=stride).flatten(2) for batch in (fake, real)]


def _sorted_difference(fake: Tensor, real: Tensor) -> Tensor:
    """Differences of equal quantiles along the last axis."""
    return fake.sort(-1).values - real.sort(-1).values


def _check_equal(fake: Tensor, real: Tensor) -> None:
    if fake.shape != real.shape:
        raise UsageError(f"fake and real: shapes differ ({tuple(fake.shape)}, {tuple(real.shape)}); pass equal shapes")
