"""Degradations: photograph crops become the low-resolution images that a network learns to enlarge.

``bicubic`` is ESRGAN's clean reduction. ``bsrgan`` is SwinIR's blind one: blur, resizing, noise and JPEG in random order.
Images are float tensors [N, 3, H, W] in [0, 1], borders are mirrored, and every random choice comes from the caller's
generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pyvips
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from engine.errors import UsageError

HALVE_FIRST = 0.25
"""Probability of a first halving, for a scale of 4."""

ANISOTROPIC = 0.5
"""Probability of an anisotropic blur."""

RESIZE = 0.75
"""Probability that ``shrink`` resizes instead of decimating."""

JPEG = 0.9
"""Probability of a JPEG before the last one."""

NOISE_LEVELS = (2, 25)
"""Smallest and largest standard deviation of the noise, in grey levels of 255."""

QUALITIES = (30, 95)
"""Lowest and highest JPEG quality."""

KERNEL_SIZES = (7, 25)
"""Smallest and largest side of a blur kernel, in pixels."""

MIN_SIGMA = 0.1
"""Standard deviation in pixels below which a Gaussian is a single pixel; zero would divide by zero."""


def bicubic(hr: Tensor, scale: int) -> Tensor:
    """Reduce images as MATLAB's ``imresize`` does: Keys' cubic with a = -1/2, antialiased.

    The kernel is ``scale`` times as wide as for enlarging. Borders are mirrored with the edge pixel repeated. The result is
    clamped to [0, 1], as an 8-bit image is. Gradients pass.

    Args:
        hr: [N, 3, H, W] in [0, 1].
        scale: integer reduction factor.

    Returns:
        [N, 3, H / scale, W / scale] in [0, 1].

    Raises:
        UsageError: a side is no multiple of ``scale``, or the shape is not that of a batch of RGB images.
    """
    _check(hr, scale)
    return _bicubic(hr, scale)


def bsrgan(hr: Tensor, scale: int, generator: Generator) -> Tensor:
    """Degrade each image by BSRGAN's random pipeline (Zhang et al., ICCV 2021).

    For ``scale`` 4 one image in four is halved first. Two blurs, a random resizing, a resizing to the final size, Gaussian
    noise and (nine times out of ten) JPEG follow in random order; the final size never precedes the random one. A last
    JPEG makes the values 8-bit. The camera simulation of BSRGAN needs a sensor model and is left out, as in its code by
    default. Everything runs on the CPU, so that a seed gives the same images on every device.

    Args:
        hr: [N, 3, H, W] in [0, 1].
        scale: integer reduction factor.
        generator: CPU generator of every choice.

    Returns:
        [N, 3, H / scale, W / scale] in [0, 1], with the dtype and device of ``hr``.

    Raises:
        UsageError: a side is no multiple of ``scale``, or the shape is not that of a batch of RGB images.
    """
    _check(hr, scale)
    pictures = hr.detach().to("cpu", torch.float32)
    return torch.cat([_bsrgan(picture[None], scale, generator) for picture in pictures]).to(hr)


def _bsrgan(picture: Tensor, scale: int, generator: Generator) -> Tensor:
    size = (picture.shape[2] // scale, picture.shape[3] // scale)
    names = draw_operations(scale, generator)
    remaining = scale // 2 if "halve" in names else scale
    operations: dict[str, Callable[[Tensor], Tensor]] = {
        "halve": lambda x: halve(x, generator),
        "blur": lambda x: blur(x, remaining, generator),
        "shrink": lambda x: shrink(x, remaining, generator),
        "fit": lambda x: _resize(x, size, _random_mode(generator)),
        "noise": lambda x: noise(x, generator),
        "jpeg": lambda x: jpeg(x, generator),
    }
    for name in names:
        picture = operations[name](picture)
    return picture


def draw_operations(scale: int, generator: Generator) -> list[str]:
    """Names of the operations in order; each operation draws its own parameters when it runs."""
    start = ["halve"] if scale == 4 and _chance(generator, HALVE_FIRST) else []
    names = ["blur", "blur", "shrink", "fit", "noise", "jpeg"]
    order = [names[i] for i in torch.randperm(len(names), generator=generator).tolist()]
    first, second = sorted((order.index("shrink"), order.index("fit")))
    order[first], order[second] = "shrink", "fit"
    if not _chance(generator, JPEG):
        order.remove("jpeg")
    return [*start, *order, "jpeg"]


def halve(picture: Tensor, generator: Generator) -> Tensor:
    """Reduce [1, 3, H, W] to [1, 3, H / 2, W / 2] by one of four resizing methods."""
    if _chance(generator, 0.5):
        return _bicubic(picture, 2)
    return _resize(picture, (picture.shape[2] // 2, picture.shape[3] // 2), _random_mode(generator))


def blur(picture: Tensor, scale: int, generator: Generator) -> Tensor:
    """Blur by a Gaussian of 7, 9, ... or 25 pixels, isotropic or (half of the time) rotated and stretched."""
    size = 2 * _between(generator, (KERNEL_SIZES[0] // 2, KERNEL_SIZES[1] // 2)) + 1
    if _chance(generator, ANISOTROPIC):
        variances = ((4 + scale) * _uniform(generator), (4 + scale) * _uniform(generator))
        kernel = _gaussian(size, variances, angle=math.pi * _uniform(generator))
    else:
        variance = ((2 + 0.2 * scale) * _uniform(generator)) ** 2
        kernel = _gaussian(size, (variance, variance))
    return _filter(picture, kernel)


def shrink(picture: Tensor, scale: int, generator: Generator) -> Tensor:
    """Resize to 1 / U(1, 2 * scale) of the size (three times out of four), or blur and keep every ``scale``-th pixel."""
    if _chance(generator, RESIZE):
        factor = 1 + (2 * scale - 1) * _uniform(generator)
        size = (max(1, int(picture.shape[2] / factor)), max(1, int(picture.shape[3] / factor)))
        return _resize(picture, size, _random_mode(generator))
    sigma = 0.1 + (0.6 * scale - 0.1) * _uniform(generator)
    # Shifted by half a block, so that each remaining pixel is the centre of its block.
    kernel = _gaussian(KERNEL_SIZES[1], (sigma**2, sigma**2), centre=(scale - 1) / 2)
    return _filter(picture, kernel, stride=scale)


def noise(picture: Tensor, generator: Generator) -> Tensor:
    """Add Gaussian noise: independent channels (40 %), equal channels (40 %) or correlated channels (20 %).

    The standard deviation of the first two is 2, 3, ... or 25 grey levels. The third has the covariance L^2 |U' D U| with U
    the orthonormal basis of a random matrix and D random in (0, 1). L is always the largest level, as in BSRGAN's code.
    """
    shape = (1, 3, picture.shape[2], picture.shape[3])
    kind = _uniform(generator)
    if kind < 0.8:
        sigma = _between(generator, NOISE_LEVELS) / 255
        shape = shape if kind < 0.4 else (1, 1, *shape[2:])
        return (picture + sigma * torch.randn(shape, generator=generator)).clamp(0, 1)
    basis = torch.linalg.svd(torch.rand(3, 3, generator=generator, dtype=torch.float64)).U
    spread = torch.rand(3, generator=generator, dtype=torch.float64)
    # Absolute values of a 3 x 3 covariance are a covariance again: no principal minor decreases.
    values, vectors = torch.linalg.eigh((basis.T @ torch.diag(spread) @ basis).abs())
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T * (NOISE_LEVELS[1] / 255)
    correlated = torch.einsum("ij,njhw->nihw", root.float(), torch.randn(shape, generator=generator))
    return (picture + correlated).clamp(0, 1)


def jpeg(picture: Tensor, generator: Generator) -> Tensor:
    """Compress as JPEG of a quality from 30 to 95, and decode."""
    return compress(picture, _between(generator, QUALITIES))


def compress(picture: Tensor, quality: int) -> Tensor:
    """Compress [1, 3, H, W] as JPEG with 4:2:0 chroma, and decode to multiples of 1 / 255."""
    pixels = picture[0].mul(255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    height, width, bands = pixels.shape
    image = pyvips.Image.new_from_memory(pixels.tobytes(), width, height, bands, "uchar").copy(interpretation="srgb")
    data = image.jpegsave_buffer(Q=quality, subsample_mode="on")
    decoded = np.array(pyvips.Image.new_from_buffer(data, "").numpy())
    return torch.from_numpy(decoded).permute(2, 0, 1)[None].float() / 255


def _bicubic(picture: Tensor, scale: int) -> Tensor:
    """Antialiased cubic reduction as one strided convolution along each axis.

    ``F.interpolate(mode="bicubic", antialias=True)`` is the same kernel but renormalises it at the borders instead of
    mirroring: border pixels differ by up to 0.06, inner ones by 2e-7. ``imresize`` and the published networks mirror.
    """
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
    """Resize as OpenCV does (``INTER_LINEAR``, ``INTER_CUBIC`` with a = -3/4, ``INTER_AREA``), clamped.

    The first two do not antialias.
    """
    if mode == "area":
        return _area_weights(picture.shape[2], size[0]) @ picture @ _area_weights(picture.shape[3], size[1]).T
    return F.interpolate(picture, size, mode=mode, align_corners=False).clamp(0, 1)


def _area_weights(size: int, new: int) -> Tensor:
    """Share of every old pixel in each new one, [new, size]."""
    ratio = size / new
    start = torch.arange(new, dtype=torch.float64)[:, None] * ratio
    pixel = torch.arange(size, dtype=torch.float64)[None]
    covered = torch.minimum(pixel + 1, start + ratio) - torch.maximum(pixel, start)
    return (covered.clamp(min=0) / ratio).float()


def _gaussian(size: int, variances: tuple[float, float], angle: float = 0.0, centre: float = 0.0) -> Tensor:
    """Gaussian kernel [size, size] of sum 1.

    Args:
        size: side in pixels.
        variances: along an axis rotated by ``angle``, and across it, in squared pixels.
        angle: in radians.
        centre: offset from the middle pixel on both axes, in pixels.
    """
    at = torch.arange(size, dtype=torch.float64) - size // 2 - centre
    y, x = at[:, None], at[None]
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    first, second = (max(variance, MIN_SIGMA**2) for variance in variances)
    # A narrow Gaussian centred between pixels underflows on all of them; softmax divides by the largest first.
    exponent = -(along**2 / first + across**2 / second) / 2
    return exponent.flatten().softmax(0).view(size, size).float()


def _filter(picture: Tensor, kernel: Tensor, stride: int = 1) -> Tensor:
    """Correlation with [k, k], borders mirrored without repeating the edge."""
    margin = kernel.shape[0] // 2
    for axis in (2, 3):
        picture = _mirror(picture, axis, margin, edge=0)
    bands = picture.shape[1]
    return F.conv2d(picture, kernel.expand(bands, 1, -1, -1), stride=stride, groups=bands).clamp(0, 1)


def _mirror(picture: Tensor, axis: int, margin: int, *, edge: int) -> Tensor:
    """Add ``margin`` mirrored pixels on both sides, with the edge repeated (1) or not (0).

    The margin may exceed the image, which ``F.pad`` does not allow.
    """
    size = picture.shape[axis]
    period = max(2 * (size - 1 + edge), 1)
    index = torch.arange(-margin, size + margin) % period
    return picture.index_select(axis, torch.minimum(index, period - edge - index).to(picture.device))


def _check(hr: Tensor, scale: int) -> None:
    if hr.ndim != 4 or hr.shape[1] != 3 or not len(hr):
        raise UsageError(f"crops: shape {tuple(hr.shape)} is no batch of RGB images; pass (N, 3, H, W)")
    height, width = hr.shape[2:]
    if scale < 1 or height < scale or width < scale or height % scale or width % scale:
        raise UsageError(
            f"crops of {width}x{height}: the sides are no multiples of the scale ({scale}); choose other crops"
        )


def _uniform(generator: Generator) -> float:
    """Random number in [0, 1)."""
    return float(torch.rand((), generator=generator, dtype=torch.float64))


def _chance(generator: Generator, probability: float) -> bool:
    return _uniform(generator) < probability


def _between(generator: Generator, limits: tuple[int, int]) -> int:
    """Random integer, both limits included."""
    return int(torch.randint(limits[0], limits[1] + 1, (), generator=generator))


def _random_mode(generator: Generator) -> str:
    return ("bilinear", "bicubic", "area")[_between(generator, (0, 2))]
