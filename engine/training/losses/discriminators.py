"""What tells enlarged crops from real ones: four discriminators behind one table.

Three take (N, 3, H, W) in [0, 1], "projected" takes VGG's maps of it; all give scores without a sigmoid, larger for what
looks real. Weights begin as PyTorch initialises them. Knows nothing of losses.
"""

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
VGG_STRIDE = 32  # five convolutions of stride 2
UNET_STRIDE = PATCH_STRIDE = 8  # three
# What "projected" looks at: VGG's layers (that VGG-16 and VGG-19 both have), their widths and how often they are halved.
PROJECTED_LAYERS = {"relu1_2": (64, 0), "relu2_2": (128, 1), "relu3_3": (256, 2), "relu4_3": (512, 3)}


def build(name: Name, crop: int, channels: int | None = None) -> nn.Module:
    """The discriminator of this name for crops of `crop` x `crop` pixels; `channels` is its narrowest width.

    Without `channels` it is 64, and 32 for "patch". Raises UsageError for a name that does not exist, no channels, and a
    crop that the network cannot halve as often as it must.
    """
    if channels is not None and channels < 1:
        raise UsageError(f"channels = {channels}: at least 1 is needed")
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
    raise UsageError(f"no discriminator is called {name!r}; there are {', '.join(get_args(Name))}")


class VGG(nn.Module):
    """ESRGAN's discriminator (Wang et al. 2018), for any crop whose sides are a multiple of 32: one score an image.

    Ten convolutions, in pairs of 3 x 3 and 4 x 4 with stride 2, widths c, 2c, 4c, 8c, 8c; BatchNorm after all but the
    first; two linear layers, 100 wide. BatchNorm wants more than one value a channel: crops of 32 need a batch of two.
    (N, 3, crop, crop) -> (N, 1). Raises UsageError for a crop of another size.
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
                f"this discriminator was made for crops of {self.crop} x {self.crop} pixels and got "
                f"{x.shape[-2]} x {x.shape[-1]}; make one for that size"
            )
        scores: Tensor = self.classifier(self.features(x))
        return scores


class UNet(nn.Module):
    """The U-Net of Real-ESRGAN (Wang et al. 2021) and KAIR: a score for every pixel, which has seen its surroundings.

    Three convolutions of stride 2 down, three bilinear enlargements up, each added to the map of its size on the way
    down; spectral norm (Miyato et al. 2018) on all but the first and the last convolution. (N, 3, H, W) -> (N, 1, H, W),
    H and W multiples of 8. Raises UsageError for others.
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
    """A score for every patch (Isola et al. 2017), small enough not to know one photograph by heart.

    `layers` 4 x 4 convolutions of stride 2, widths c, 2c, 4c, ..., and two 3 x 3 convolutions; spectral norm on all but the last,
    no BatchNorm. A score depends on 54 x 54 pixels with three layers (12 with one, 26 with two), so it judges texture and
    not layout. (N, 3, H, W) -> (N, 1, H / 2^layers, W / 2^layers). Raises UsageError if those are no whole numbers.
    """

    def __init__(self, channels: int = 32, layers: int = 3) -> None:
        super().__init__()
        if layers < 1:
            raise UsageError(f"layers = {layers}: a patch discriminator has at least 1")
        self.stride = 2**layers
        widths = [channels << i for i in range(layers)]
        convolutions: list[nn.Module] = []
        for inputs, outputs in zip([3, *widths], widths, strict=False):
            convolutions += [_spectral(inputs, outputs, kernel=4, bias=True), _leaky()]
        convolutions += [_spectral(widths[-1], widths[-1], kernel=3, bias=True), _leaky()]
        # Plain, as in HP-VAE-GAN's and Real-ESRGAN's: with a norm on all of them the scores of sharp and soft crops, which
        # differ by little, stay within a hundredth of each other.
        self.layers = nn.Sequential(*convolutions, nn.Conv2d(widths[-1], 1, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        _check_size(x.shape[-2:], self.stride)
        scores: Tensor = self.layers(x)
        return scores


class Projected(nn.Module):
    """Judges a picture by its frozen feature maps instead of its pixels, which it learns in far fewer iterations.

    After Sauer et al. 2021, "Projected GANs Converge Faster"; with VGG's maps, without their random mixing. Each of four
    maps has a head of its own: a 1 x 1 convolution to `channels`, 4 x 4 convolutions of stride 2 down to an eighth of the
    picture, two 3 x 3 convolutions; spectral norm on all but the last. Maps are divided by their standard deviation over
    the batch of the first call, which is kept. Maps of (N, 3, H, W) -> (N, 4, H / 8, W / 8).
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
            found = [maps[layer].detach().float().std() for layer in self.heads]
            self.deviations.copy_(torch.stack(found).clamp_min(1e-6))
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
    return nn.LeakyReLU(SLOPE, inplace=True)  # no layer in front of one needs its own output to go backwards


def _normalised(inputs: int, outputs: int, kernel: int) -> list[nn.Module]:
    """A convolution, BatchNorm, LeakyReLU; the norm's bias is the convolution's."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride=kernel - 2, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(outputs), _leaky()]


def _spectral(inputs: int, outputs: int, kernel: int, bias: bool = False) -> nn.Module:
    """Its largest singular value (of the flattened kernel) is held at one; an even kernel halves the picture."""
    stride = 1 if kernel % 2 else 2
    return spectral_norm(nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=(kernel - 1) // 2, bias=bias))


def _check_size(size: Sequence[int], stride: int) -> None:
    height, width = size
    if height < 1 or width < 1 or height % stride or width % stride:
        raise UsageError(f"crops of {height} x {width} pixels: both sides must be multiples of {stride}")
