"""Step 1, the structure: HP-VAE-GAN with vertical coordinate convolution (Gur et al. 2020; OUR-GAN, sec. 3.2).

Knows the networks, the table of scale sizes, how one picture is drawn from noise, and how a trained structure is
kept in a file. Does not know losses, optimisers or photographs (engine.training), nor where noise comes from.

Sizes are (height, width) throughout; pictures inside the networks are in [-1, 1].
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, cast, get_args

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from engine.errors import ModelError, UsageError
from engine.io.tensors import write_tensors

Padding = Literal["zeros", "reflect", "replicate"]
Size = tuple[int, int]
Noise = Callable[[int, tuple[int, int, int]], Tensor]

BASE_WIDTH = 256
LEAST_WIDTH = 32
METADATA_KEY = "manifest"
_SLOPE = 0.2
_EPS = 1e-5


@dataclass(frozen=True, slots=True)
class Config:
    """What the networks look like; the defaults are the paper's (G_0, three patch-VAEs, six patch-GANs)."""

    last: int = 9
    last_vae: int = 3
    coordinates: bool = True
    padding: Padding = "zeros"
    channels: int = 64
    latent: int = 128
    layers: int = 5

    def __post_init__(self) -> None:
        if not 0 <= self.last_vae <= self.last:
            raise UsageError(f"the last VAE scale L = {self.last_vae} must lie in 0..M = 0..{self.last}")
        if self.padding not in get_args(Padding):
            raise UsageError(f"padding {self.padding!r} is unknown: choose one of {', '.join(get_args(Padding))}")


def scale_sizes(
    photo: Size, last: int = 9, base_width: int = BASE_WIDTH, least_width: int = LEAST_WIDTH
) -> tuple[Size, ...]:
    """The sizes of scales 0..last for a photograph of this size.

    The reference's arithmetic is kept to the last bit: r**9 * 256 is 32.00000000000002 in doubles, so its ceiling is
    33, and likewise 65 and 129.
    """
    aspect = photo[0] / photo[1]
    factor = math.pow(least_width / base_width, 1 / last) if last else 1.0
    widths = [math.ceil(math.pow(factor, last - m) * base_width) for m in range(last + 1)]
    return tuple((max(1, int(width * aspect)), width) for width in widths)


def vertical_coordinates(height: int) -> Tensor:
    """y from -1 (top row) to 1 (bottom row); a single row sits in the middle."""
    return torch.linspace(-1, 1, height) if height > 1 else torch.zeros(1)


class VerticalCoordConv2d(nn.Conv2d):
    """A 3x3 convolution of the same size that also sees how high in the picture it is.

    The coordinate is a channel more, padded as the others are, so with zero padding it reads 0 (mid-picture) outside the
    border, as in the usual CoordConv code. It is the same in all columns, so its share of the sum is made for one of them
    and added: 65 channels take a library of blocks of 16 a sixth longer than 64.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, coordinates: bool = True, padding: Padding = "zeros"
    ) -> None:
        super().__init__(in_channels + coordinates, out_channels, 3)
        self.coordinates = coordinates
        self.border: Padding = padding

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.weight)

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """`forward` with this value of `self.weight`, which under spectral normalisation changes with every look at it."""
        if not self.coordinates:
            return self._padded(x, weight, self.bias)
        height, width = x.shape[2:]
        y = vertical_coordinates(height).to(x).view(1, 1, height, 1)
        # As few columns as there are kinds: those at the left and right border differ where there are zeros beyond.
        share = self._padded(y.expand(1, 1, height, min(width, 3)), weight[:, -1:], self.bias)
        if self.border != "zeros":
            share = share[..., :1]
        elif width > 3:
            share = torch.cat([share[..., :1], share[..., 1:2].expand(-1, -1, -1, width - 2), share[..., 2:]], 3)
        return self._padded(x, weight[:, :-1], None) + share

    def _padded(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.border == "zeros":
            return F.conv2d(x, weight, bias, padding=1)
        return F.conv2d(cast(Tensor, _Padded.apply(x, self._mode(x))), weight, bias)  # type: ignore[no-untyped-call]

    def _mode(self, x: Tensor) -> str:
        """One row or column has nothing to mirror."""
        return "replicate" if min(x.shape[2:]) == 1 else self.border

    def input_gradient(self, gradient: Tensor, weight: Tensor) -> Tensor:
        """The gradient by the input, of that by the output: an expression of ``weight`` that can be differentiated."""
        turned = weight[:, : weight.shape[1] - self.coordinates].flip(2, 3).transpose(0, 1)
        if self.border == "zeros":
            return F.conv2d(gradient, turned, padding=1)
        return _folded(F.conv2d(gradient, turned, padding=2), self._mode(gradient))


class _Padded(torch.autograd.Function):
    """A pixel more on every side. PyTorch's own keeps its input for the gradient, of which it only wants the shape, and under
    autocast copies in float32: a third more memory for training a block.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, mode: str) -> Tensor:  # noqa: ANN401 (as PyTorch has it)
        ctx.mode = mode
        with torch.autocast(x.device.type, enabled=False):
            return F.pad(x, (1, 1, 1, 1), mode=mode)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        return _folded(gradient, ctx.mode), None


def _folded(gradient: Tensor, mode: str) -> Tensor:
    """The gradient by what was padded, of that by the padded."""
    fold = getattr(torch.ops.aten, f"{'reflection' if mode == 'reflect' else 'replication'}_pad2d_backward")
    return cast(Tensor, fold(gradient, gradient[:, :, 1:-1, 1:-1], (1, 1, 1, 1)))


class SpatialNorm(nn.Module):
    """Batch normalisation that is always in training mode at batch 1: statistics of this one picture, no memory.

    Every sample of a batch is normalised alone, so a picture never depends on its batch mates.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] * x.shape[3] == 1:
            # The variance of one pixel is zero: only the bias is left (and torch refuses to normalise it).
            return x * 0 + self.bias.to(x).view(1, -1, 1, 1)
        # batch_norm on each sample keeps channels_last, which instance_norm copies away.
        parts = [
            F.batch_norm(s, None, None, self.weight, self.bias, training=True, eps=_EPS) for s in torch.split(x, 1)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class NormalisedConv(nn.Module):
    """Convolution, normalisation, leaky ReLU: the layer of every generator."""

    def __init__(self, in_channels: int, out_channels: int, coordinates: bool, padding: Padding) -> None:
        super().__init__()
        self.conv = VerticalCoordConv2d(in_channels, out_channels, coordinates=coordinates, padding=padding)
        self.norm = SpatialNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.norm(self.conv(x)), _SLOPE)


class SpectralConv(nn.Module):
    """Spectrally normalised convolution, leaky ReLU: the layer of the encoder and the discriminator."""

    def __init__(self, in_channels: int, out_channels: int, coordinates: bool, padding: Padding) -> None:
        super().__init__()
        conv = VerticalCoordConv2d(in_channels, out_channels, coordinates=coordinates, padding=padding)
        self.conv = cast(VerticalCoordConv2d, spectral_norm(conv))

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.conv(x), _SLOPE)


class GeneratorBlock(nn.Module):
    """G_m: a residual for the upscaled picture; with `in_channels` = latent it is the decoder G_0."""

    def __init__(self, config: Config, in_channels: int = 3) -> None:
        super().__init__()
        width, rest = config.channels, (config.coordinates, config.padding)
        self.head = NormalisedConv(in_channels, width, *rest)
        self.body = nn.Sequential(*(NormalisedConv(width, width, *rest) for _ in range(config.layers)))
        self.tail = VerticalCoordConv2d(width, 3, coordinates=config.coordinates, padding=config.padding)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.tail(self.body(self.head(x))))


class Decoder(GeneratorBlock):
    """G_0: from the latent map to the smallest picture."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, config.latent)


class Encoder(nn.Module):
    """E: the smallest photograph to mean and log-variance maps of its own size; needed in training only."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, rest = config.channels, (config.coordinates, config.padding)
        self.body = nn.Sequential(*(SpectralConv(c, width, *rest) for c in (3, width, width)))
        self.mean = VerticalCoordConv2d(width, config.latent, coordinates=config.coordinates, padding=config.padding)
        self.log_variance = VerticalCoordConv2d(
            width, config.latent, coordinates=config.coordinates, padding=config.padding
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x)
        return self.mean(features), self.log_variance(features)


class Discriminator(nn.Module):
    """D_m: a map of scores, one for each 15x15 patch; needed in training only."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, rest = config.channels, (config.coordinates, config.padding)
        inputs = (3, *(width,) * config.layers)
        self.body = nn.Sequential(*(SpectralConv(c, width, *rest) for c in inputs))
        self.tail = VerticalCoordConv2d(width, 1, coordinates=config.coordinates, padding=config.padding)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.tail(self.body(x)))

    def input_gradient(self, x: Tensor) -> Tensor:
        """The gradient of the sum of the scores by ``x``, which can be differentiated by the weights once more.

        Between the kinks of the leaky ReLUs a score is linear, so it is a chain of convolutions. Autograd's double backward
        yields the same, but takes the weights' gradients by convolutions whose channels are the batch, 7 times as slow.
        """
        convolutions = [cast(SpectralConv, layer).conv for layer in self.body]
        weights, before = [conv.weight for conv in convolutions], []
        with torch.no_grad():
            for conv, weight in zip(convolutions, weights, strict=True):
                before.append(conv.convolve(x, weight))
                x = F.leaky_relu(before[-1], _SLOPE)
        ones = torch.ones_like(x[:, :1])
        gradient = self.tail.input_gradient(ones, self.tail.weight)
        for conv, weight, value in zip(reversed(convolutions), reversed(weights), reversed(before), strict=True):
            slope = torch.ops.aten.leaky_relu_backward(gradient, value, _SLOPE, False)
            gradient = conv.input_gradient(slope, weight)
        return gradient


class BaseGenerator(nn.Module):
    """The whole generator: G_0 and the blocks G_1..G_M, with the sizes and noise amplitudes of the trained scales."""

    sigmas: Tensor

    def __init__(self, config: Config, sizes: Sequence[Size], facts: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        if len(sizes) != config.last + 1:
            raise UsageError(f"{len(sizes)} sizes for {config.last + 1} scales: give one for each scale")
        self.config = config
        self.sizes = tuple((int(h), int(w)) for h, w in sizes)
        self.facts = dict(facts or {})
        self.decoder = Decoder(config)
        self.blocks = nn.ModuleList(GeneratorBlock(config) for _ in range(config.last))
        self.register_buffer("sigmas", torch.ones(config.last + 1))

    @property
    def base_size(self) -> Size:
        """The size at which the structure was trained, (height, width)."""
        return self.sizes[-1]

    def base(self, z: Tensor) -> Tensor:
        """The picture of scale 0 from a latent map [N, latent, h, w]."""
        return torch.tanh(self.decoder(z).float())

    def refine(self, m: int, picture: Tensor, size: Size, noise: Tensor | None = None) -> Tensor:
        """The picture of scale m >= 1 from that of scale m - 1; `noise` is already scaled by sigma_m."""
        up = F.interpolate(picture, size, mode="bilinear", align_corners=True)
        entry = up if noise is None else up + noise
        return torch.tanh(up + self.blocks[m - 1](entry).float())

    def sizes_for(self, size: Size) -> tuple[Size, ...]:
        """The sizes of all scales when the last one has this size."""
        (height, width), (base_height, base_width) = size, self.base_size
        if min(height, width) < 1:
            raise UsageError(f"a structure of {width}x{height} pixels cannot be drawn: both sides must be at least 1")
        inner = (
            (max(1, round(h * height / base_height)), max(1, round(w * width / base_width))) for h, w in self.sizes[:-1]
        )
        return (*inner, (height, width))

    @torch.no_grad()
    def sample(self, noise: Noise, size: Size | None = None, *, last: int | None = None) -> Tensor:
        """Draw one picture [3, H, W] in [0, 1], fp32. One scale at a time is alive.

        `noise(m, (channels, h, w))` returns standard normal values. Noise enters at m = 0 and, as in the paper's
        equation 2, at m > L. `last` stops at a lower scale, whose picture is returned as it is.
        """
        sizes = self.sizes if size is None else self.sizes_for(size)
        last = self.config.last if last is None else last
        like = self.decoder.tail.weight
        z = noise(0, (self.config.latent, *sizes[0])).to(like)[None]
        picture = self.base(z.contiguous(memory_format=torch.channels_last))
        for m in range(1, last + 1):
            extra = None
            if m > self.config.last_vae:
                extra = self.sigmas[m] * noise(m, (3, *sizes[m])).to(like)[None]
            picture = self.refine(m, picture, sizes[m], extra)
        return ((picture[0] + 1) / 2).clamp_(0, 1).contiguous()

    def metadata(self) -> dict[str, Any]:
        """Everything about the structure that its tensors do not say; plain JSON values."""
        return {
            **self.facts,
            "kind": "structure",
            "architecture": "hpvaegan",
            "M": self.config.last,
            "L": self.config.last_vae,
            "coordinates": self.config.coordinates,
            "padding": self.config.padding,
            "sizes": [list(size) for size in self.sizes],
        }

    def state(self, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
        """The tensors as they are kept in a file: contiguous, in `dtype`; the noise amplitudes stay fp32."""
        state = {
            name: tensor.detach().to("cpu", torch.float32 if name == "sigmas" else dtype).contiguous()
            for name, tensor in self.state_dict().items()
        }
        _check_finite(state)
        return state

    def to_file(self, path: Path, dtype: torch.dtype = torch.float16) -> None:
        """Write one safetensors file, whole or not at all."""
        write_tensors(path, self.state(dtype), {METADATA_KEY: json.dumps(self.metadata(), sort_keys=True)})

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Self:
        """Rebuild a structure from its tensors (any float type; kept as fp32) and its metadata."""
        config = _config(state, metadata)
        facts = {key: value for key, value in metadata.items() if key not in _STRUCTURAL}
        with torch.device("meta"):
            structure = cls(config, _sizes(metadata, config), facts)
        _check_state(state, structure.state_dict())
        structure.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
        return structure.requires_grad_(False)

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Read a file that `to_file` wrote."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = json.loads((file.metadata() or {}).get(METADATA_KEY, "null"))
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelError(f"{path}: cannot be read as a safetensors file: {error}") from None
        if not isinstance(metadata, dict):
            raise ModelError(f"{path}: has no {METADATA_KEY!r} in its metadata: not a structure of this engine")
        try:
            return cls.from_state(state, metadata)
        except ModelError as error:
            raise ModelError(f"{path}: {error}") from None


_STRUCTURAL = ("kind", "architecture", "M", "L", "coordinates", "padding", "sizes")


def _config(state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Config:
    """Widths, depths and coordinates from the shapes; L and the padding from the metadata, where M must agree."""
    found = (metadata.get("kind"), metadata.get("architecture"))
    if found != ("structure", "hpvaegan"):
        raise ModelError(f"kind and architecture are {found}, expected ('structure', 'hpvaegan')")
    head, tail = (_conv_shape(state, f"decoder.{name}.weight") for name in ("head.conv", "tail"))
    coordinates = tail[1] - head[0]
    if coordinates not in (0, 1):
        raise ModelError(f"decoder.tail.weight takes {tail[1]} channels, expected {head[0]} or {head[0] + 1}")
    last = _count(state, r"blocks\.(\d+)\.")
    told = {"M": last, "coordinates": bool(coordinates)}
    for key, value in told.items():
        if metadata.get(key) != value:
            raise ModelError(f"metadata says {key} = {metadata.get(key)!r}, the tensors say {value!r}")
    last_vae, padding = metadata.get("L"), metadata.get("padding")
    if type(last_vae) is not int or not isinstance(padding, str):
        raise ModelError(f"metadata says L = {last_vae!r} and padding = {padding!r}, expected a number and a name")
    try:
        return Config(
            last=last,
            last_vae=last_vae,
            coordinates=bool(coordinates),
            padding=cast(Padding, padding),
            channels=head[0],
            latent=head[1] - coordinates,
            layers=_count(state, r"decoder\.body\.(\d+)\."),
        )
    except UsageError as error:
        raise ModelError(str(error)) from None


def _conv_shape(state: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    if name not in state:
        raise ModelError(f"tensor {name} is missing")
    shape = tuple(state[name].shape)
    if len(shape) != 4:
        raise ModelError(f"tensor {name} has shape {shape}, expected four dimensions")
    return shape


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many numbered modules the names know; gaps show up later as missing tensors."""
    return 1 + max((int(found[1]) for name in state if (found := re.match(pattern, name))), default=-1)


def _sizes(metadata: Mapping[str, Any], config: Config) -> tuple[Size, ...]:
    sizes = metadata.get("sizes")
    good = (
        isinstance(sizes, list)
        and len(sizes) == config.last + 1
        and all(isinstance(s, list) and len(s) == 2 and all(type(v) is int and v > 0 for v in s) for s in sizes)
    )
    if not good:
        raise ModelError(f"metadata 'sizes' is {sizes!r}, expected {config.last + 1} pairs [height, width]")
    return tuple((h, w) for h, w in cast(list[list[int]], sizes))


def _check_state(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    if missing := sorted(expected.keys() - state.keys()):
        raise ModelError(f"tensor {missing[0]} is missing ({len(missing)} in all)")
    if unknown := sorted(state.keys() - expected.keys()):
        raise ModelError(f"tensor {unknown[0]} is unknown ({len(unknown)} in all)")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise ModelError(f"tensor {name} has shape {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}")
        if not tensor.is_floating_point():
            raise ModelError(f"tensor {name} has type {tensor.dtype}, expected a float type")
    _check_finite(state)


def _check_finite(state: Mapping[str, Tensor]) -> None:
    for name, tensor in state.items():
        if not bool(tensor.isfinite().all()):
            raise ModelError(f"tensor {name} holds NaN or infinity")
