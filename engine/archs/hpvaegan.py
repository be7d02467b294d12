"""Step 1's generator: HP-VAE-GAN (Gur et al., NeurIPS 2020) with vertical coordinates (OUR-GAN, section 3.2).

Holds the networks of a render, the sizes of their scales and how an image is drawn from noise. The networks of training
are in ``engine.training.structure.networks``, the file format is in ``engine.model.structure_file``.

Sizes are (height, width). Images inside the networks are in [-1, 1].
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.errors import UsageError

Padding = Literal["zeros", "reflect", "replicate", "circular"]
Size = tuple[int, int]

NoiseSource = Callable[[int, tuple[int, int, int]], Tensor]
"""(scale, (channels, height, width)) -> standard normal numbers of that shape."""

BASE_WIDTH = 256
"""Columns of the last scale by default."""

LEAST_WIDTH = 32
"""Columns of the first scale by default."""

SLOPE = 0.2
"""Negative slope of every leaky ReLU."""

_EPS = 1e-5

_SHIFT = 0.25
"""Pixels by which an image that repeats moves at each enlargement, to and fro.

Interpolation is sharp where pixels of both sizes coincide, and blurs between. Without a shift all scales would coincide at
the sides, which would show as a sharp line.
"""


@dataclass(frozen=True, slots=True)
class Config:
    """Shape of the networks. The defaults are the paper's: G_0, three patch-VAEs and six patch-GANs.

    Raises UsageError for a last VAE scale or a padding that does not exist.
    """

    last: int = 9
    """M, the number of the last scale."""

    last_vae: int = 3
    """L, the number of the last scale that is a patch-VAE: 0 to M."""

    coordinates: bool = True
    """Whether every convolution sees the vertical coordinate."""

    padding: Padding = "zeros"
    """Border of every convolution; "circular" for a photograph that repeats, whose images repeat, too."""

    channels: int = 64
    """Channels of the hidden feature maps."""

    latent: int = 128
    """Channels of the latent map."""

    layers: int = 5
    """Layers between a block's first and last convolution."""

    def __post_init__(self) -> None:
        if not 0 <= self.last_vae <= self.last:
            raise UsageError(f"last VAE scale L = {self.last_vae}: outside 0 to M; choose one of 0 to {self.last}")
        if self.padding not in get_args(Padding):
            raise UsageError(f"padding {self.padding!r}: unknown; choose one of {', '.join(get_args(Padding))}")


def scale_sizes(
    photo: Size, last: int = 9, base_width: int = BASE_WIDTH, least_width: int = LEAST_WIDTH
) -> tuple[Size, ...]:
    """Sizes of the scales 0 to ``last`` for a photograph of size ``photo``.

    The arithmetic is the reference implementation's to the last bit: r**9 * 256 is 32.00000000000002 in double precision,
    so its ceiling is 33, and likewise 65 and 129.
    """
    aspect = photo[0] / photo[1]
    factor = math.pow(least_width / base_width, 1 / last) if last else 1.0
    widths = [math.ceil(math.pow(factor, last - m) * base_width) for m in range(last + 1)]
    return tuple((max(1, int(width * aspect)), width) for width in widths)


def vertical_coordinates(height: int) -> Tensor:
    """Coordinates [height] from -1 (top row) to 1 (bottom row); 0 for a single row."""
    return torch.linspace(-1, 1, height) if height > 1 else torch.zeros(1)


def mirrored_coordinates(height: int) -> Tensor:
    """Coordinates [height] that repeat: from -1 down to 1 in the middle and back, so rows at both ends are alike."""
    return 1 - 2 * (2 * (torch.arange(height) + 0.5) / height - 1).abs()


class VerticalCoordConv2d(nn.Conv2d):
    """3x3 convolution [N, C, H, W] -> [N, outputs, H, W] that also sees each row's vertical coordinate.

    The coordinate is one more input channel, padded as the others are: with zero padding it reads 0 (mid-height) outside
    the border, as in the usual CoordConv code. It is constant along a row, so its share of the sum is computed for one
    column of each kind and added. Libraries compute blocks of 16 channels, so 65 channels would take a sixth longer than 64.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, coordinates: bool = True, padding: Padding = "zeros"
    ) -> None:
        super().__init__(in_channels + coordinates, out_channels, 3)
        self.coordinates = coordinates
        # Without its repetition, a network that was trained to repeat mirrors its borders.
        self.border: Padding = "reflect" if padding == "circular" else padding
        self.wraps = (padding == "circular",) * 2

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.weight)

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """``forward`` with a value of ``self.weight`` read before: spectral normalisation changes it at every read."""
        if not self.coordinates:
            return self._padded_conv(x, weight, self.bias)
        height, width = x.shape[2:]
        y = (mirrored_coordinates if self.wraps[0] else vertical_coordinates)(height).to(x).view(1, 1, height, 1)
        # Three columns at most: with zeros beyond the border, the leftmost and the rightmost column differ from the rest.
        share = self._padded_conv(y.expand(1, 1, height, min(width, 3)), weight[:, -1:], self.bias)
        if self.border != "zeros" or self.wraps[1]:
            share = share[..., :1]
        elif width > 3:
            share = torch.cat([share[..., :1], share[..., 1:2].expand(-1, -1, -1, width - 2), share[..., 2:]], 3)
        return self._padded_conv(x, weight[:, :-1], None) + share

    def pad_mode(self, x: Tensor) -> str:
        """Mode of the padding of ``x``: a single row or column is replicated, because reflection needs a neighbour."""
        return "replicate" if min(x.shape[2:]) == 1 else self.border

    def _padded_conv(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if any(self.wraps):
            return F.conv2d(self._wrapped(x), weight, bias)
        if self.border == "zeros":
            return F.conv2d(x, weight, bias, padding=1)
        return F.conv2d(cast(Tensor, _LeanPad.apply(x, self.pad_mode(x))), weight, bias)  # type: ignore[no-untyped-call]

    def _wrapped(self, x: Tensor) -> Tensor:
        """``x`` padded by one pixel on every side: from the opposite side along axes that wrap, else by the border's rule."""
        rows, columns = map(int, self.wraps)
        x = F.pad(x, (columns, columns, rows, rows), mode="circular")
        if all(self.wraps):
            return x
        rest = (1 - columns, 1 - columns, 1 - rows, 1 - rows)
        return F.pad(x, rest) if self.border == "zeros" else F.pad(x, rest, mode=self.pad_mode(x))


class _LeanPad(torch.autograd.Function):
    """Pad by one pixel on every side and save nothing for the backward pass.

    PyTorch's own padding saves its input, of which the gradient needs the shape alone, and copies it to float32 under
    autocast: a third more memory to train a block.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, mode: str) -> Tensor:  # noqa: ANN401 (PyTorch's signature)
        ctx.mode = mode
        if not torch.amp.is_autocast_available(x.device.type):  # the meta device has shapes alone
            return F.pad(x, (1, 1, 1, 1), mode=mode)
        with torch.autocast(x.device.type, enabled=False):
            return F.pad(x, (1, 1, 1, 1), mode=mode)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        return pad_backward(gradient, ctx.mode), None


def pad_backward(gradient: Tensor, mode: str) -> Tensor:
    """Gradient w.r.t. the unpadded input, given the gradient w.r.t. the padded one."""
    backward = getattr(torch.ops.aten, f"{'reflection' if mode == 'reflect' else 'replication'}_pad2d_backward")
    return cast(Tensor, backward(gradient, gradient[:, :, 1:-1, 1:-1], (1, 1, 1, 1)))


class SpatialNorm(nn.Module):
    """Batch normalisation of each image alone: always its own statistics, no running ones.

    An image therefore never depends on the others of its batch.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] * x.shape[3] == 1:
            # The variance of one pixel is zero, which PyTorch refuses: only the bias remains.
            return x * 0 + self.bias.to(x).view(1, -1, 1, 1)
        # batch_norm of each sample keeps channels-last memory; instance_norm would copy it to planes.
        samples = [
            F.batch_norm(s, None, None, self.weight, self.bias, training=True, eps=_EPS) for s in torch.split(x, 1)
        ]
        return samples[0] if len(samples) == 1 else torch.cat(samples)


class NormalisedConv(nn.Module):
    """Convolution, normalisation and leaky ReLU: a layer of a generator block."""

    def __init__(self, in_channels: int, out_channels: int, coordinates: bool, padding: Padding) -> None:
        super().__init__()
        self.conv = VerticalCoordConv2d(in_channels, out_channels, coordinates=coordinates, padding=padding)
        self.norm = SpatialNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.norm(self.conv(x)), SLOPE)


class GeneratorBlock(nn.Module):
    """G_m: [N, in_channels, H, W] -> residual [N, 3, H, W] of the enlarged image."""

    def __init__(self, config: Config, in_channels: int = 3) -> None:
        super().__init__()
        width, options = config.channels, (config.coordinates, config.padding)
        self.head = NormalisedConv(in_channels, width, *options)
        self.body = nn.Sequential(*(NormalisedConv(width, width, *options) for _ in range(config.layers)))
        self.tail = VerticalCoordConv2d(width, 3, coordinates=config.coordinates, padding=config.padding)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.tail(self.body(self.head(x))))


class Decoder(GeneratorBlock):
    """G_0: the latent map [N, latent, H, W] -> the image of scale 0, before its tanh."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, config.latent)


class BaseGenerator(nn.Module):
    """G_0 and the blocks G_1 to G_M, with the sizes and the noise amplitudes of the trained scales.

    Args:
        config: shape of the networks.
        sizes: (height, width) of each scale, M + 1 of them; UsageError otherwise.
        provenance: JSON values about the training that travel with the network, such as source and licence.
    """

    sigmas: Tensor

    def __init__(self, config: Config, sizes: Sequence[Size], provenance: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        if len(sizes) != config.last + 1:
            raise UsageError(f"{len(sizes)} sizes for {config.last + 1} scales; give one for each scale")
        self.config = config
        self.sizes = tuple((int(h), int(w)) for h, w in sizes)
        self.wraps = (config.padding == "circular",) * 2
        self.provenance = dict(provenance or {})
        self.decoder = Decoder(config)
        self.blocks = nn.ModuleList(GeneratorBlock(config) for _ in range(config.last))
        self.register_buffer("sigmas", torch.ones(config.last + 1))

    @property
    def base_size(self) -> Size:
        """Size of the base image in training: that of the last scale."""
        return self.sizes[-1]

    def base(self, z: Tensor) -> Tensor:
        """Image of scale 0, [N, 3, h, w] in [-1, 1], from a latent map [N, latent, h, w]."""
        return torch.tanh(self.decoder(z).float())

    def refine(self, m: int, image: Tensor, size: Size, noise: Tensor | None = None) -> Tensor:
        """Image of scale ``m`` >= 1 from that of scale m - 1; ``noise`` is scaled by sigma_m already."""
        up = self._enlarged(m, image, size)
        entry = up if noise is None else up + noise
        return torch.tanh(up + self.blocks[m - 1](entry).float())

    def _enlarged(self, m: int, image: Tensor, size: Size) -> Tensor:
        """Bilinear enlargement to scale ``m``: corner on corner, or of the periodic image along axes that wrap."""
        height, width = (n if wraps else m for n, m, wraps in zip(image.shape[2:], size, self.wraps, strict=True))
        image = F.interpolate(image, (height, width), mode="bilinear", align_corners=True)
        for axis, wraps in enumerate(self.wraps, start=2):
            if wraps:
                image = _stretched(image, axis, size[axis - 2], _SHIFT if m % 2 else -_SHIFT)
        return image

    def wrapped(self, wraps: tuple[bool, bool]) -> BaseGenerator:
        """The same generator, with the same weights in memory, whose images repeat along (rows, columns).

        Convolutions and enlargements continue on the opposite side. Along rows, the vertical coordinate rises and falls
        again.
        """
        if wraps == self.wraps:
            return self
        shared = {id(tensor): tensor for tensor in (*self.parameters(), *self.buffers())}
        other = copy.deepcopy(self, shared)
        other.wraps = wraps
        for module in other.modules():
            if isinstance(module, VerticalCoordConv2d):
                module.wraps = wraps
        return other

    def sizes_for(self, size: Size) -> tuple[Size, ...]:
        """Sizes of all scales for a last scale of size ``size``. Raises UsageError for a side below 1."""
        (height, width), (base_height, base_width) = size, self.base_size
        if min(height, width) < 1:
            raise UsageError(f"base image of {width}x{height} pixels: no image; give sides of at least 1")
        inner = (
            (max(1, round(h * height / base_height)), max(1, round(w * width / base_width))) for h, w in self.sizes[:-1]
        )
        return (*inner, (height, width))

    @torch.no_grad()
    def sample(self, noise: NoiseSource, size: Size | None = None, *, last: int | None = None) -> Tensor:
        """Draw one image [3, H, W] in [0, 1], float32. Only one scale is in memory at a time.

        Noise enters at scale 0 and, as in the paper's equation 2, at the scales above L.

        Args:
            noise: source of standard normal numbers.
            size: size of the last scale; ``base_size`` if None.
            last: scale to stop at, whose image is returned; M if None.
        """
        sizes = self.sizes if size is None else self.sizes_for(size)
        last = self.config.last if last is None else last
        like = self.decoder.tail.weight
        z = noise(0, (self.config.latent, *sizes[0])).to(like)[None]
        image = self.base(z.contiguous(memory_format=torch.channels_last))
        for m in range(1, last + 1):
            extra = None
            if m > self.config.last_vae:
                extra = self.sigmas[m] * noise(m, (3, *sizes[m])).to(like)[None]
            image = self.refine(m, image, sizes[m], extra)
        return ((image[0] + 1) / 2).clamp_(0, 1).contiguous()


def _stretched(image: Tensor, axis: int, size: int, shift: float) -> Tensor:
    """Linear interpolation of a periodic image [N, C, H, W] to ``size`` pixels along an axis, moved by ``shift`` pixels."""
    length = image.shape[axis]
    position = (torch.arange(size, dtype=torch.float64) + 0.5) * length / size - 0.5 + shift
    first = position.floor()
    share = (position - first).to(image).view([-1 if axis == n else 1 for n in range(4)])
    index = first.to(torch.int64).to(image.device)
    below, above = (image.index_select(axis, (index + n) % length) for n in (0, 1))
    return torch.lerp(below, above, share.expand_as(below))
