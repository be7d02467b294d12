"""How a crop of the photograph becomes the small picture that a network learns to enlarge.

`bicubic` is the clean way of ESRGAN, `bsrgan` the blind one of SwinIR: blur, resizing, noise and JPEG in random order.
Pictures are float tensors (N, 3, H, W) in [0, 1], borders are mirrored, and every random choice comes from the caller's
generator. Knows nothing of networks.
"""

import math
from collections.abc import Callable

import numpy as np
import pyvips
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from engine.errors import UsageError

HALVE_FIRST = 0.25
ANISOTROPIC = 0.5
RESIZE = 0.75
JPEG = 0.9
NOISE_LEVELS = (2, 25)  # standard deviations, in levels of 255
QUALITIES = (30, 95)
KERNEL_SIZES = (7, 25)
LEAST_SIGMA = 0.1  # a Gaussian this narrow is one pixel already; zero would divide by zero


def bicubic(hr: Tensor, scale: int) -> Tensor:
    """(N, 3, H, W) -> (N, 3, H / scale, W / scale), as MATLAB's imresize shrinks: Keys' cubic, a = -1/2, antialiased.

    The kernel is `scale` times as wide as for enlarging, borders are mirrored with the edge twice, and the result is
    clamped to [0, 1], as that of an 8-bit picture is; gradients pass. Raises UsageError if a side is no multiple of
    `scale`.
    """
    _check(hr, scale)
    return _bicubic(hr, scale)


def bsrgan(hr: Tensor, scale: int, generator: Generator) -> Tensor:
    """(N, 3, H, W) -> (N, 3, H / scale, W / scale): BSRGAN's degradation (Zhang et al. 2021), new for each picture.

    For `scale` 4 a picture is halved first in one case of four. Then come, in random order, two blurs, a random
    resizing, one to the final size (never before the other), Gaussian noise and, nine times of ten, JPEG; a last
    JPEG always, so the values are 8-bit. BSRGAN's simulation of a camera, which needs a model of one, is left out, as
    in its code by default. It runs on the CPU, so that a seed means the same on every device.
    Raises UsageError if a side is no multiple of `scale`.
    """
    _check(hr, scale)
    pictures = hr.detach().to("cpu", torch.float32)
    return torch.cat([_bsrgan(picture[None], scale, generator) for picture in pictures]).to(hr)


def _bsrgan(picture: Tensor, scale: int, generator: Generator) -> Tensor:
    size = (picture.shape[2] // scale, picture.shape[3] // scale)
    recipe = draw_recipe(scale, generator)
    left = scale // 2 if "halve" in recipe else scale
    operations: dict[str, Callable[[Tensor], Tensor]] = {
        "halve": lambda x: halve(x, generator),
        "blur": lambda x: blur(x, left, generator),
        "shrink": lambda x: shrink(x, left, generator),
        "fit": lambda x: _resize(x, size, _any_mode(generator)),
        "noise": lambda x: noise(x, generator),
        "jpeg": lambda x: jpeg(x, generator),
    }
    for name in recipe:
        picture = operations[name](picture)
    return picture


def draw_recipe(scale: int, generator: Generator) -> list[str]:
    """The names of the operations in their order; what each of them does is drawn when its turn comes."""
    start = ["halve"] if scale == 4 and _chance(generator, HALVE_FIRST) else []
    names = ["blur", "blur", "shrink", "fit", "noise", "jpeg"]
    order = [names[i] for i in torch.randperm(len(names), generator=generator).tolist()]
    first, second = sorted((order.index("shrink"), order.index("fit")))
    order[first], order[second] = "shrink", "fit"
    if not _chance(generator, JPEG):
        order.remove("jpeg")
    return [*start, *order, "jpeg"]


def halve(picture: Tensor, generator: Generator) -> Tensor:
    """(1, 3, H, W) -> (1, 3, H / 2, W / 2) by one of four ways of resizing."""
    if _chance(generator, 0.5):
        return _bicubic(picture, 2)
    return _resize(picture, (picture.shape[2] // 2, picture.shape[3] // 2), _any_mode(generator))


def blur(picture: Tensor, scale: int, generator: Generator) -> Tensor:
    """A Gaussian, turned and stretched in half of the cases, of 7, 9, ... or 25 pixels."""
    size = 2 * _between(generator, (KERNEL_SIZES[0] // 2, KERNEL_SIZES[1] // 2)) + 1
    if _chance(generator, ANISOTROPIC):
        variances = ((4 + scale) * _uniform(generator), (4 + scale) * _uniform(generator))
        kernel = _gaussian(size, variances, angle=math.pi * _uniform(generator))
    else:
        variance = ((2 + 0.2 * scale) * _uniform(generator)) ** 2
        kernel = _gaussian(size, (variance, variance))
    return _filter(picture, kernel)


def shrink(picture: Tensor, scale: int, generator: Generator) -> Tensor:
    """Three times of four a resizing to 1 / U(1, 2 scale) of the size, else a Gaussian and every `scale`-th pixel."""
    if _chance(generator, RESIZE):
        factor = 1 + (2 * scale - 1) * _uniform(generator)
        size = (max(1, int(picture.shape[2] / factor)), max(1, int(picture.shape[3] / factor)))
        return _resize(picture, size, _any_mode(generator))
    sigma = 0.1 + (0.6 * scale - 0.1) * _uniform(generator)
    # Moved by half a block, so that each pixel that is kept lies in the middle of those it stands for.
    kernel = _gaussian(KERNEL_SIZES[1], (sigma**2, sigma**2), centre=(scale - 1) / 2)
    return _filter(picture, kernel, stride=scale)


def noise(picture: Tensor, generator: Generator) -> Tensor:
    """Gaussian noise: 40 % independent in the channels, 40 % equal in them, 20 % correlated.

    The first two have a standard deviation of 2, 3, ... or 25 levels of 255. The third has the covariance L^2 |U' D U|, U
    the orthonormal basis of a random matrix, D random in (0, 1), L the strongest level always, as in BSRGAN's code.
    """
    shape = (1, 3, picture.shape[2], picture.shape[3])
    kind = _uniform(generator)
    if kind < 0.8:
        sigma = _between(generator, NOISE_LEVELS) / 255
        shape = shape if kind < 0.4 else (1, 1, *shape[2:])
        return (picture + sigma * torch.randn(shape, generator=generator)).clamp(0, 1)
    basis = torch.linalg.svd(torch.rand(3, 3, generator=generator, dtype=torch.float64)).U
    spread = torch.rand(3, generator=generator, dtype=torch.float64)
    # Of a 3 x 3 covariance the absolute values are one, too: every principal minor stays or grows.
    values, vectors = torch.linalg.eigh((basis.T @ torch.diag(spread) @ basis).abs())
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T * (NOISE_LEVELS[1] / 255)
    correlated = torch.einsum("ij,njhw->nihw", root.float(), torch.randn(shape, generator=generator))
    return (picture + correlated).clamp(0, 1)


def jpeg(picture: Tensor, generator: Generator) -> Tensor:
    """JPEG of a quality from 30 to 95, and back."""
    return compress(picture, _between(generator, QUALITIES))


def compress(picture: Tensor, quality: int) -> Tensor:
    """(1, 3, H, W) written as JPEG, colour at half the resolution, and read again: values are multiples of 1 / 255."""
    pixels = picture[0].mul(255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    height, width, bands = pixels.shape
    image = pyvips.Image.new_from_memory(pixels.tobytes(), width, height, bands, "uchar").copy(interpretation="srgb")
    data = image.jpegsave_buffer(Q=quality, subsample_mode="on")
    decoded = np.array(pyvips.Image.new_from_buffer(data, "").numpy())
    return torch.from_numpy(decoded).permute(2, 0, 1)[None].float() / 255


def _bicubic(picture: Tensor, scale: int) -> Tensor:
    """Every output pixel has the same weights, since its place among the input pixels is the same."""
    taps = 4 * scale - scale % 2  # an odd scale puts the kernel's two zeros on pixels
    distance = (torch.arange(taps, dtype=torch.float64) - (taps - 1) / 2).abs() / scale
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    weights = torch.where(distance <= 1, near, far)
    weights = (weights / weights.sum()).to(picture)
    margin = (taps - scale) // 2
    for axis, kernel in ((2, weights.view(1, 1, -1, 1)), (3, weights.view(1, 1, 1, -1))):
        stride = (scale, 1) if axis == 2 else (1, scale)
        filters = kernel.expand(picture.shape[1], -1, -1, -1)
        picture = F.conv2d(_mirror(picture, axis, margin, edge=1), filters, stride=stride, groups=picture.shape[1])
    return picture.clamp(0, 1)


def _resize(picture: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """As OpenCV's INTER_LINEAR, INTER_CUBIC (a = -3/4; neither antialiased) and INTER_AREA, clamped."""
    if mode == "area":
        return _shares(picture.shape[2], size[0]) @ picture @ _shares(picture.shape[3], size[1]).T
    return F.interpolate(picture, size, mode=mode, align_corners=False).clamp(0, 1)


def _shares(size: int, new: int) -> Tensor:
    """[new, size]: how much of each new pixel every old one covers."""
    ratio = size / new
    start = torch.arange(new, dtype=torch.float64)[:, None] * ratio
    pixel = torch.arange(size, dtype=torch.float64)[None]
    covered = torch.minimum(pixel + 1, start + ratio) - torch.maximum(pixel, start)
    return (covered.clamp(min=0) / ratio).float()


def _gaussian(size: int, variances: tuple[float, float], angle: float = 0.0, centre: float = 0.0) -> Tensor:
    """[size, size], sum one: the variances along an axis turned by `angle` and across it; `centre` px off on both axes."""
    at = torch.arange(size, dtype=torch.float64) - size // 2 - centre
    y, x = at[:, None], at[None]
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    first, second = (max(variance, LEAST_SIGMA**2) for variance in variances)
    # A narrow Gaussian between the pixels would be zero on all of them: softmax divides by the largest first.
    exponent = -(along**2 / first + across**2 / second) / 2
    return exponent.flatten().softmax(0).view(size, size).float()


def _filter(picture: Tensor, kernel: Tensor, stride: int = 1) -> Tensor:
    """Correlation with [k, k], mirrored at the borders without the edge."""
    margin = kernel.shape[0] // 2
    for axis in (2, 3):
        picture = _mirror(picture, axis, margin, edge=0)
    bands = picture.shape[1]
    return F.conv2d(picture, kernel.expand(bands, 1, -1, -1), stride=stride, groups=bands).clamp(0, 1)


def _mirror(picture: Tensor, axis: int, margin: int, *, edge: int) -> Tensor:
    """`margin` pixels more on both sides, the edge repeated (1) or not (0). The margin may exceed the picture."""
    size = picture.shape[axis]
    period = max(2 * (size - 1 + edge), 1)
    index = torch.arange(-margin, size + margin) % period
    return picture.index_select(axis, torch.minimum(index, period - edge - index).to(picture.device))


def _check(hr: Tensor, scale: int) -> None:
    if hr.ndim != 4 or hr.shape[1] != 3 or not len(hr):
        raise UsageError(f"crops have the shape {tuple(hr.shape)}; a batch of RGB pictures is (N, 3, H, W)")
    height, width = hr.shape[2:]
    if scale < 1 or height < scale or width < scale or height % scale or width % scale:
        raise UsageError(f"crops of {height} x {width} pixels: both sides must be multiples of the scale, {scale}")


def _uniform(generator: Generator) -> float:
    """In [0, 1)."""
    return float(torch.rand((), generator=generator, dtype=torch.float64))


def _chance(generator: Generator, probability: float) -> bool:
    return _uniform(generator) < probability


def _between(generator: Generator, limits: tuple[int, int]) -> int:
    """A whole number, both limits included."""
    return int(torch.randint(limits[0], limits[1] + 1, (), generator=generator))


def _any_mode(generator: Generator) -> str:
    return ("bilinear", "bicubic", "area")[_between(generator, (0, 2))]
