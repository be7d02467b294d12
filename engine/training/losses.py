"""What a super-resolution network is trained with beside the pixel difference.

Three kinds: the distance between two distributions of patches (texture without correspondence), the distance between
VGG19's features, and the adversarial losses, which see only scores. Under autocast VGG19 itself runs in half precision;
all differences are taken in fp32, for they are small and what they are taken of is large.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.checkpoints import read_checkpoint
from engine.errors import InputError, UsageError

Adversarial = Literal["ragan", "vanilla", "hinge"]


class SlicedWasserstein(nn.Module):
    """How far the patches of two batches are apart as distributions; where a patch lies does not matter.

    The patches (patch x patch x 3 values) are projected on random directions of length one, and along each the
    1-Wasserstein distance of the two sets of numbers is the mean difference of their sorted values (Rabin et al. 2012;
    as a texture loss Heitz et al. 2021; of patches Elnekave and Weiss 2022, "GPDM"). The mean over the directions and over
    `scales` scales, each half as large as the one before, in units of the pixels' values. A projection of all patches is
    one convolution.

    `per_image` compares the first image of one batch with the first of the other, and so on, instead of all
    patches of the batches: a landscape's texture depends on where one looks. `remove_mean` takes each patch's mean
    colour away first and leaves texture alone.

    `phases` compares, in each call, the patches at every `phases`-th row and column alone, from a place drawn anew. Together
    the patches of a regular grid may have the distribution of a photograph's; at one phase they do not. A network that
    enlarges 4 times and has no texture to give makes such a grid, of 4 pixels.
    """

    def __init__(
        self,
        patch: int = 7,
        projections: int = 64,
        scales: int = 2,
        *,
        per_image: bool = False,
        remove_mean: bool = False,
        phases: int = 1,
    ) -> None:
        super().__init__()
        least = 2 if remove_mean else 1  # a single pixel less its mean is nothing
        limits = {"patch": least, "projections": 1, "scales": 1, "phases": 1}
        for (name, limit), value in zip(limits.items(), (patch, projections, scales, phases), strict=True):
            if value < limit:
                raise UsageError(f"{name} = {value}: at least {limit} is needed")
        self.patch, self.projections, self.scales = patch, projections, scales
        self.per_image, self.remove_mean, self.phases = per_image, remove_mean, phases

    def forward(self, fake: Tensor, real: Tensor, generator: torch.Generator) -> Tensor:
        """(N, 3, H, W) and (N', 3, H', W') in [0, 1] -> scalar, fp32; fp64 of fp64.

        The directions and the phase are drawn anew for every call and scale, from `generator`, on the CPU. Raises UsageError for
        pictures that are smaller than a patch at the last scale, and for unequal batches if compared image by image.
        """
        self._check(fake, real)
        with torch.autocast(fake.device.type, enabled=False):
            fake = _at_least_fp32(fake)
            real = real.to(fake)
            distances = []
            for scale in range(self.scales):
                if scale:
                    fake, real = F.avg_pool2d(fake, 2), F.avg_pool2d(real, 2)
                filters = self._draw_directions(generator).to(fake)
                stride = max(1, self.phases >> scale)
                phase = torch.randint(stride, (2,), generator=generator).tolist() if stride > 1 else (0, 0)
                projected = (self._project(self._from(phase, batch), filters, stride) for batch in (fake, real))
                distances.append(_wasserstein(*projected))
            return torch.stack(distances).mean()

    def _check(self, fake: Tensor, real: Tensor) -> None:
        least = self.patch << (self.scales - 1)
        for name, batch in (("fake", fake), ("real", real)):
            if batch.ndim != 4 or batch.shape[1] != 3 or not len(batch):
                raise UsageError(f"{name} has the shape {tuple(batch.shape)}; a batch of RGB pictures is (N, 3, H, W)")
            height, width = batch.shape[2:]
            if min(height, width) < least:
                raise UsageError(
                    f"{name} is {height} x {width} pixels; patches of {self.patch} at {self.scales} scales need at "
                    f"least {least} x {least}: take larger crops or fewer scales"
                )
        if self.per_image and len(fake) != len(real):
            raise UsageError(f"{len(fake)} pictures cannot be compared one by one with {len(real)}")

    def _draw_directions(self, generator: torch.Generator) -> Tensor:
        filters = torch.randn(self.projections, 3, self.patch, self.patch, generator=generator)
        if self.remove_mean:  # of the direction: to project a patch without its mean is the same
            filters = filters - filters.mean((2, 3), keepdim=True)
        return F.normalize(filters.flatten(1)).view_as(filters)

    def _from(self, phase: Sequence[int], batch: Tensor) -> Tensor:
        """The batch from this row and column on, as far as there is room for a patch."""
        y, x = (min(at, size - self.patch) for at, size in zip(phase, batch.shape[2:], strict=True))
        return batch[:, :, y:, x:]

    def _project(self, batch: Tensor, filters: Tensor, stride: int) -> Tensor:
        """[groups, projections, patches]: each picture is a group, or all are one."""
        projected = F.conv2d(batch, filters, stride=stride)
        return projected.flatten(2) if self.per_image else projected.transpose(0, 1).flatten(1)[None]


def _wasserstein(fake: Tensor, real: Tensor) -> Tensor:
    """The mean 1-Wasserstein distance along the last axis of [G, P, n] and [G, P, m].

    Sorted values are quantiles at the levels (i + 1/2) / n. Where n and m differ, the real ones are interpolated at the
    levels of the fakes', so that every fake value has a gradient.
    """
    fake, real = fake.sort(-1).values, real.sort(-1).values
    if fake.shape[-1] != real.shape[-1]:
        real = F.interpolate(real, fake.shape[-1], mode="linear", align_corners=False)
    return (fake - real).abs().mean()


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# VGG19 without its classifier (Simonyan and Zisserman 2015, configuration E): the width of each convolution, 0 for a
# pooling. Every convolution is followed by a ReLU, so position N of torchvision's `features` is layer N here.
VGG19_LAYOUT = (64, 64, 0, 128, 128, 0, 256, 256, 256, 256, 0, 512, 512, 512, 512, 0, 512, 512, 512, 512)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Which convolutions' outputs are compared, before their ReLU, and with what weight.
PERCEPTUAL_LAYERS = {
    "esrgan": {34: 1.0},  # conv5_4 (Wang et al. 2018)
    "swinir": {2: 0.1, 7: 0.1, 16: 1.0, 25: 1.0, 34: 1.0},  # conv1_2, 2_2, 3_4, 4_4, 5_4 (BSRGAN's and SwinIR's code)
}


class VGG19Perceptual(nn.Module):
    """The mean absolute difference of VGG19's features, frozen; ESRGAN's choice of layers or SwinIR's.

    `weights` is torchvision's file of VGG19 (ImageNet), or its `features` alone, as .pth or .safetensors. Raises
    InputError if it cannot be read or is of another network.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, weights: Path, layers: Literal["esrgan", "swinir"]) -> None:
        super().__init__()
        if layers not in PERCEPTUAL_LAYERS:
            raise UsageError(f"no choice of layers is called {layers!r}; there are {', '.join(PERCEPTUAL_LAYERS)}")
        self.layers = PERCEPTUAL_LAYERS[layers]
        state = _read_vgg19(weights)
        with torch.device("meta"):
            self.features = _vgg19_features()
        self.features.load_state_dict({key.removeprefix("features."): state[key] for key in state}, assign=True)
        self.features.float()
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)
        self.requires_grad_(False)

    def forward(self, fake: Tensor, real: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1], twice, H and W at least 16 -> scalar, fp32; `real` gets no gradient."""
        if fake.shape != real.shape or min(fake.shape[-2:]) < 16:
            raise UsageError(
                f"fake is {tuple(fake.shape)} and real {tuple(real.shape)}; VGG19 compares equal shapes (N, 3, H, W) of at "
                "least 16 x 16 pixels"
            )
        with torch.no_grad():
            wanted = self._features(real)
        pairs = zip(self.layers.values(), self._features(fake), wanted, strict=True)
        return torch.stack([weight * F.l1_loss(ours.float(), theirs.float()) for weight, ours, theirs in pairs]).sum()

    def _features(self, x: Tensor) -> list[Tensor]:
        x = (x - self.mean) / self.std
        found = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.layers:
                found.append(x)
        return found


def find_vgg19(path: Path | None) -> Path | None:
    """A file with VGG19's weights: `path` if given, else torchvision's in torch.hub's folder, else None.

    Raises InputError if the file is missing, damaged or of another network.
    """
    if path is None:
        path = next(iter(sorted(Path(torch.hub.get_dir(), "checkpoints").glob("vgg19-*.pth"))), None)
    if path is not None:
        _read_vgg19(path)
    return path


def _vgg19_features() -> nn.Sequential:
    layers: list[nn.Module] = []
    inputs = 3
    for width in VGG19_LAYOUT:
        layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()] if width else [nn.MaxPool2d(2)]
        inputs = width or inputs
    return nn.Sequential(*layers[:-1])  # nothing is asked of what follows conv5_4


def _read_vgg19(path: Path) -> dict[str, Tensor]:
    """The tensors of the convolutions, named and shaped as torchvision's; a classifier is left behind."""
    state = read_checkpoint(path)
    with torch.device("meta"):
        shapes = {f"features.{key}": value.shape for key, value in _vgg19_features().state_dict().items()}
    for key, shape in shapes.items():
        if key not in state:
            raise InputError(f"{path}: not VGG19: it has no {key}; torchvision's vgg19-dcbb9e9d.pth is wanted")
        if state[key].shape != shape:
            raise InputError(
                f"{path}: not VGG19: {key} has the shape {tuple(state[key].shape)}, not {tuple(shape)}; torchvision's "
                "vgg19-dcbb9e9d.pth is wanted"
            )
    if alien := next((key for key in state if key.startswith("features.") and key not in shapes), None):
        raise InputError(f"{path}: not VGG19, which has no {alien}; torchvision's vgg19-dcbb9e9d.pth is wanted")
    return {key: state[key] for key in shapes}


def discriminator_loss(kind: Adversarial, real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """What the discriminator minimises, of scores (any shape) without a sigmoid -> scalar, fp32.

    "ragan": the relativistic average loss (Jolicoeur-Martineau 2019, as in ESRGAN): real ones should score above the mean
    of the fakes, fakes below the mean of the real ones; half the sum. The means run over all scores of the batch.
    "vanilla": binary cross-entropy (Goodfellow et al. 2014), the sum of both. "hinge": Miyato et al. 2018, the sum.
    """
    real, fake = _at_least_fp32(real_scores), _at_least_fp32(fake_scores)
    match kind:
        case "ragan":
            return (_entropy(real - fake.mean(), 1) + _entropy(fake - real.mean(), 0)) / 2
        case "vanilla":
            return _entropy(real, 1) + _entropy(fake, 0)
        case "hinge":
            return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    raise _unknown(kind)


def generator_loss(kind: Adversarial, real_scores: Tensor | None, fake_scores: Tensor) -> Tensor:
    """What the generator minimises, of scores (any shape) without a sigmoid -> scalar, fp32.

    "ragan" wants the fakes above the mean of the real ones and the real ones below the mean of the fakes; the other two
    do not look at `real_scores`, which may be None. "vanilla" is the non-saturating form.
    """
    fake = _at_least_fp32(fake_scores)
    match kind:
        case "ragan":
            if real_scores is None:
                raise UsageError("the relativistic loss compares with the scores of real crops, but there are none")
            real = _at_least_fp32(real_scores)
            return (_entropy(real - fake.mean(), 0) + _entropy(fake - real.mean(), 1)) / 2
        case "vanilla":
            return _entropy(fake, 1)
        case "hinge":
            return -fake.mean()
    raise _unknown(kind)


def _entropy(scores: Tensor, target: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(scores, torch.full_like(scores, target))


def _unknown(kind: str) -> UsageError:
    return UsageError(f"no adversarial loss is called {kind!r}; there are ragan, vanilla, hinge")
