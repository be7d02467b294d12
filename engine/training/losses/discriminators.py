"""Four discriminators of enlarged crops.

Three take images (N, 3, H, W) in [0, 1]; ``Projected`` takes VGG's feature maps. All return scores without a sigmoid, larger
for real images. Weights are initialised by PyTorch's defaults.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from engine.errors import UsageError
from engine.training.losses.vgg import Maps

Name = Literal["vgg", "unet", "patch", "projected"]

SLOPE = 0.2
VGG_STRIDE = 32
"""Five convolutions of stride 2."""
UNET_STRIDE = PATCH_STRIDE = 8
"""Three convolutions of stride 2."""
PROJECTED_LAYERS = {"relu1_2": (64, 0), "relu2_2": (128, 1), "relu3_3": (256, 2), "relu4_3": (512, 3)}
"""Layers of both VGG-16 and VGG-19 that "projected" takes: width and number of halvings."""


def build(name: Name, crop: int, channels: int | None = None) -> nn.Module:
    """A discriminator with fresh weights.

    Args:
        name: architecture.
        crop: side of a crop, pixels.
        channels: narrowest width; None: 64, and 32 for "patch".

    Raises:
        UsageError: unknown name, no channels, or a crop that the network cannot halve often enough.
    """
    if channels is not None and channels < 1:
        raise UsageError(f"channels = {channels}: too small; use at least 1")
    match name:
        case "vgg":
            return VGG(crop, channels or 64)
        case "unet":
            _check_size((crop, crop), UNET_STRIDE)
            return UNet(channels or 64)
        case "patch":
            _check_size((crop, crop), PATCH_STRIDE)
            return Patch(channels or 32)
        case "projected":
            _check_size((crop, crop), 1 << max(halvings for _, halvings in PROJECTED_LAYERS.values()))
            return Projected(channels or 64)
    raise UsageError(f"discriminator = {name!r}: unknown; use one of {', '.join(get_args(Name))}")


class VGG(nn.Module):
    """ESRGAN's discriminator (Wang et al. 2018): one score per image, for crops whose side is a multiple of 32.

    Ten convolutions in pairs of 3 x 3 and 4 x 4 with stride 2, of widths c, 2c, 4c, 8c, 8c. BatchNorm follows all but the
    first. Two linear layers, 100 wide, end the network. BatchNorm needs more than one value per channel: crops of 32 need a
    batch of two.
    (N, 3, crop, crop) -> (N, 1). Raises UsageError for crops of another size.
    """

    def __init__(self, crop: int, channels: int = 64) -> None:
        super().__init__()
        _check_size((crop, crop), VGG_STRIDE)
        self.crop = crop
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1), _leaky()]
        layers += _normalised(channels, channels, kernel=4)
        inputs = channels
        for width in (2 * channels, 4 * channels, 8 * channels, 8 * channels):
            layers += _normalised(inputs, width, kernel=3)
            layers += _normalised(width, width, kernel=4)
            inputs = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(inputs * (crop // VGG_STRIDE) ** 2, 100), _leaky(), nn.Linear(100, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2:] != (self.crop, self.crop):
            raise UsageError(
                f"crops of {x.shape[-2]} x {x.shape[-1]} pixels: the discriminator takes {self.crop} x {self.crop}; "
                f"build one for that size"
            )
        scores: Tensor = self.classifier(self.features(x))
        return scores


class UNet(nn.Module):
    """The U-Net of Real-ESRGAN (Wang et al. 2021) and KAIR: one score per pixel.

    Three convolutions of stride 2 down, three bilinear enlargements up, each added to the feature map of its size on the way
    down; spectral norm (Miyato et al. 2018) on all but the first and the last convolution. (N, 3, H, W) -> (N, 1, H, W).
    Raises UsageError unless H and W are multiples of 8.
    """

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        c = channels
        self.first = nn.Conv2d(3, c, 3, padding=1)
        self.down = nn.ModuleList(_spectral(c << i, c << (i + 1), kernel=4) for i in range(3))
        self.up = nn.ModuleList(_spectral(c << (i + 1), c << i, kernel=3) for i in reversed(range(3)))
        self.head = nn.ModuleList(_spectral(c, c, kernel=3) for _ in range(2))
        self.last = nn.Conv2d(c, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        _check_size(x.shape[-2:], UNET_STRIDE)
        x = F.leaky_relu(self.first(x), SLOPE)
        skips = []
        for down in self.down:
            skips.append(x)
            x = F.leaky_relu(down(x), SLOPE)
        for up in self.up:
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = F.leaky_relu(up(x), SLOPE) + skips.pop()
        for conv in self.head:
            x = F.leaky_relu(conv(x), SLOPE)
        scores: Tensor = self.last(x)
        return scores


class Patch(nn.Module):
    """One score per patch (Isola et al. 2017), with too few weights to memorise a photograph.

    ``layers`` 4 x 4 convolutions of stride 2, of widths c, 2c, 4c, ..., and two 3 x 3 convolutions; spectral norm on all but
    the last, no BatchNorm. The receptive field has a side of 54 pixels with three layers (12 with one, 26 with two), so a
    score depends on texture and not on layout. (N, 3, H, W) -> (N, 1, H / 2^layers, W / 2^layers). Raises UsageError if these
    are no whole numbers.
    """

    def __init__(self, channels: int = 32, layers: int = 3) -> None:
        super().__init__()
        if layers < 1:
            raise UsageError(f"layers = {layers}: too small; use at least 1")
        self.stride = 2**layers
        widths = [channels << i for i in range(layers)]
        convolutions: list[nn.Module] = []
        for inputs, outputs in zip([3, *widths], widths, strict=False):
            convolutions += [_spectral(inputs, outputs, kernel=4, bias=True), _leaky()]
        convolutions += [_spectral(widths[-1], widths[-1], kernel=3, bias=True), _leaky()]
        # No norm on the last one, as in HP-VAE-GAN and Real-ESRGAN: with it the scores of sharp and soft crops would stay
        # within a hundredth of each other.
        self.layers = nn.Sequential(*convolutions, nn.Conv2d(widths[-1], 1, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        _check_size(x.shape[-2:], self.stride)
        scores: Tensor = self.layers(x)
        return scores


class Projected(nn.Module):
    """Scores of frozen feature maps instead of pixels, learned in far fewer iterations.

    After Sauer et al. 2021, "Projected GANs Converge Faster", with VGG's feature maps and without random mixing. Each of four
    maps has its own head: a 1 x 1 convolution to ``channels``, 4 x 4 convolutions of stride 2 down to an eighth of the image,
    and two 3 x 3 convolutions. All but the last have spectral norm. Maps are divided by their standard deviation in the first
    batch, which is stored. Maps of images (N, 3, H, W) -> (N, 4, H / 8, W / 8).
    """

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        deepest = max(halvings for _, halvings in PROJECTED_LAYERS.values())
        self.heads = nn.ModuleDict(
            {layer: _head(width, channels, deepest - halvings) for layer, (width, halvings) in PROJECTED_LAYERS.items()}
        )
        self.register_buffer("deviations", torch.zeros(len(self.heads)))
        self.deviations: Tensor

    def forward(self, maps: Maps) -> Tensor:
        if not self.deviations.any():
            deviations = [maps[layer].detach().float().std() for layer in self.heads]
            self.deviations.copy_(torch.stack(deviations).clamp_min(1e-6))
        scores = [
            head(maps[layer] / deviation.to(maps[layer].dtype))
            for (layer, head), deviation in zip(self.heads.items(), self.deviations, strict=True)
        ]
        return torch.cat(scores, 1)


def _head(inputs: int, channels: int, halvings: int) -> nn.Sequential:
    layers = [_spectral(inputs, channels, kernel=1, bias=True), _leaky()]
    for _ in range(halvings):
        layers += [_spectral(channels, channels, kernel=4, bias=True), _leaky()]
    layers += [_spectral(channels, channels, kernel=3, bias=True), _leaky()]
    return nn.Sequential(*layers, nn.Conv2d(channels, 1, 3, padding=1))


def _leaky() -> nn.Module:
    return nn.LeakyReLU(SLOPE, inplace=True)  # no layer before one needs its own output in the backward pass


def _normalised(inputs: int, outputs: int, kernel: int) -> list[nn.Module]:
    """Convolution, BatchNorm, LeakyReLU; the norm has the bias."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride=kernel - 2, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(outputs), _leaky()]


def _spectral(inputs: int, outputs: int, kernel: int, bias: bool = False) -> nn.Module:
    """Convolution with spectral norm; an even kernel halves the image."""
    stride = 1 if kernel % 2 else 2
    return spectral_norm(nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=(kernel - 1) // 2, bias=bias))


def _check_size(size: Sequence[int], stride: int) -> None:
    height, width = size
    if height < 1 or width < 1 or height % stride or width % stride:
        raise UsageError(f"crops of {height} x {width} pixels: sides must be multiples of {stride}; use another crop")
