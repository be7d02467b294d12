"""Degradations against independent definitions; statistics of the random ones over many seeds."""

import io
import math
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from engine.errors import UsageError
from engine.training.sr import degradations
from engine.training.sr.degradations import bicubic, blur, bsrgan, compress, draw_operations, halve, jpeg, noise, shrink


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def ramp(height, width, axis):
    """Pixel centres along one axis, in units of the image's side."""
    centres = (torch.arange((height, width)[axis - 2]) + 0.5) / (height, width)[axis - 2]
    shape = (1, 1, -1, 1) if axis == 2 else (1, 1, 1, -1)
    return centres.view(shape).expand(1, 3, height, width).contiguous()


# Bicubic


def keys_cubic(x):
    """Keys 1981, a = -1/2."""
    x = abs(x)
    if x <= 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x <= 2 else 0.0


def shrunk_row(row, scale):
    """``imresize`` by definition: a widened cubic around each new pixel's centre, borders mirrored with the edge."""
    size = len(row)
    result = []
    for i in range(size // scale):
        centre = (i + 0.5) * scale - 0.5
        at = range(math.floor(centre - 2 * scale), math.ceil(centre + 2 * scale) + 1)
        weights = np.array([keys_cubic((centre - j) / scale) for j in at])
        values = np.array([row[min(j % (2 * size), 2 * size - 1 - j % (2 * size))] for j in at])
        result.append((weights * values).sum() / weights.sum())
    return result


def test_bicubic_is_imresize():
    for scale, size in ((1, (5, 6)), (2, (12, 18)), (3, (9, 15)), (4, (16, 24)), (4, (4, 8)), (8, (16, 8))):
        hr = 0.3 + 0.4 * torch.rand(2, 3, *size, dtype=torch.float64)  # away from 0 and 1, so that nothing is clamped
        expected = np.apply_along_axis(shrunk_row, 2, hr.numpy(), scale)
        expected = np.apply_along_axis(shrunk_row, 3, expected, scale)
        assert expected.shape == (2, 3, size[0] // scale, size[1] // scale)
        np.testing.assert_allclose(bicubic(hr, scale).numpy(), expected, atol=1e-12)
        np.testing.assert_allclose(bicubic(hr.float(), scale).numpy(), expected, atol=1e-6)


def test_bicubic_is_pillow_inside():
    """Pillow's antialiased cubic differs at the borders only."""
    hr = 0.3 + 0.4 * torch.rand(1, 3, 48, 60)
    picture = Image.fromarray(hr[0, 0].numpy(), "F")
    for scale in (2, 3, 4):
        expected = torch.from_numpy(np.array(picture.resize((60 // scale, 48 // scale), Image.Resampling.BICUBIC)))
        torch.testing.assert_close(bicubic(hr, scale)[0, 0, 2:-2, 2:-2], expected[2:-2, 2:-2], atol=1e-5, rtol=0)


def test_bicubic_stays_in_range():
    edge = torch.zeros(1, 3, 32, 32)
    edge[..., 16:] = 1
    small = bicubic(edge, 4)
    assert small.min() == 0
    assert small.max() == 1
    assert (shrunk_row(edge[0, 0, 0].tolist(), 4) > np.float64(1)).any()  # it overshoots without the clamp


# Operations of the blind degradation


def test_order_of_operations():
    generator, count = seeded(), 3000
    draws = [draw_operations(4, generator) for _ in range(count)]
    halved = sum(operations[0] == "halve" for operations in draws)
    orders = [operations[operations[0] == "halve" : -1] for operations in draws]
    kinds = Counter(tuple(sorted(order)) for order in orders)
    assert kinds.keys() == {
        ("blur", "blur", "fit", "noise", "shrink"),
        ("blur", "blur", "fit", "jpeg", "noise", "shrink"),
    }
    # Four standard errors of a proportion in 3000.
    assert halved / count == pytest.approx(0.25, abs=0.032)
    assert kinds["blur", "blur", "fit", "jpeg", "noise", "shrink"] / count == pytest.approx(0.9, abs=0.022)
    assert all(operations[-1] == "jpeg" for operations in draws)
    assert all(order.index("shrink") < order.index("fit") for order in orders)
    six = [order for order in orders if "jpeg" in order]
    first, last = Counter(order[0] for order in six), Counter(order[-1] for order in six)
    for name in ("blur", "shrink", "noise", "jpeg", "fit"):
        # The first of "shrink" and "fit" is aloutcomes "shrink".
        assert first[name] / len(six) == pytest.approx({"blur": 2, "shrink": 2, "fit": 0}.get(name, 1) / 6, abs=0.04)
        assert last[name] / len(six) == pytest.approx({"blur": 2, "shrink": 0, "fit": 2}.get(name, 1) / 6, abs=0.04)


def test_only_scale_four_is_halved():
    generator = seeded()
    assert not any("halve" in draw_operations(scale, generator) for scale in (2, 3, 8) for _ in range(30))


def test_noise_kinds_and_levels():
    generator, levels, kinds = seeded(), [], Counter()
    for _ in range(300):
        grain = (noise(torch.full((1, 3, 48, 48), 0.5), generator) - 0.5).flatten(2)[0] * 255
        deviations, links = grain.std(1), torch.corrcoef(grain)
        if torch.equal(grain[0], grain[1]) and torch.equal(grain[0], grain[2]):
            kinds["grey"] += 1
            levels.append(deviations.mean().item())
        elif (links - torch.eye(3)).abs().max() < 0.1 and deviations.max() < 1.1 * deviations.min():
            kinds["colour"] += 1
            levels.append(deviations.mean().item())
        else:
            kinds["correlated"] += 1
            assert links.min() > -0.1  # the covariance has absolute values
            assert deviations.max() < 25 * 1.1
    # Four standard errors of a proportion in 300.
    assert kinds["grey"] / 300 == pytest.approx(0.4, abs=0.12)
    assert kinds["colour"] / 300 == pytest.approx(0.4, abs=0.12)
    assert kinds["correlated"] / 300 == pytest.approx(0.2, abs=0.1)
    # Levels are the integers 2 to 25; a standard deviation is measured to a few percent.
    assert min(levels) == pytest.approx(2, rel=0.1)
    assert max(levels) == pytest.approx(25, rel=0.1)
    assert np.mean(levels) == pytest.approx((2 + 25) / 2, abs=2)


def test_noise_is_clamped():
    assert noise(torch.ones(1, 3, 8, 8), seeded()).max() == 1
    assert noise(torch.zeros(1, 3, 8, 8), seeded()).min() == 0


def moments(response):
    """Covariance matrix of a kernel's impulse response."""
    weights = response / response.sum()
    at = torch.arange(weights.shape[0], dtype=torch.float64) - weights.shape[0] // 2
    y, x = at[:, None].expand_as(weights), at[None].expand_as(weights)
    return torch.tensor([[(weights * a * b).sum() for a in (x, y)] for b in (x, y)])


def test_blur_kernels():
    """Impulse responses have sum 1, are centred, and their widths and shapes follow the stated distribution."""
    scale, generator, isotropic, widths, angles, sizes = 4, seeded(), [], [], [], set()
    spot = torch.zeros(1, 3, 51, 51)
    spot[..., 25, 25] = 1
    for _ in range(300):
        response = blur(spot, scale, generator)[0, 0].double()
        assert response.sum().item() == pytest.approx(1, abs=1e-4)
        torch.testing.assert_close(response, response.flip(0, 1), atol=1e-6, rtol=0)
        filled = (response > 0).any(0).nonzero().flatten()
        sizes.add(int(filled[-1] - filled[0] + 1))
        values, vectors = torch.linalg.eigh(moments(response))
        if values[1] - values[0] < 1e-4:
            isotropic.append(values[1].item())
        else:
            angles.append(math.atan2(vectors[1, 1], vectors[0, 1]) % math.pi)
        widths.append(values[1].item())
    assert len(isotropic) / 300 == pytest.approx(0.5, abs=0.12)
    assert max(widths) < 4 + scale  # the largest variance: 8, and (2 + 0.2 * 4)^2 = 7.84
    assert min(max(widths), max(isotropic)) > 5
    assert min(widths) < 0.2
    assert np.histogram(angles, 4, (0, math.pi))[0].min() > len(angles) / 10
    assert max(sizes) == 25
    assert all(size % 2 for size in sizes)


def test_kernel_sizes():
    """Sizes are read off kernels that are cut off abruptly."""
    spot = torch.zeros(1, 3, 51, 51)
    spot[..., 25, 25] = 1
    sizes = set()
    for seed in range(300):
        row = blur(spot, 20, seeded(seed))[0, 0, 25]  # variances up to 36
        size = int((row > 0).sum())
        if row[25 - size // 2] > 0.02 * row[25]:
            sizes.add(size)
    assert sizes == set(range(7, 26, 2))


def test_blur_mirrors_borders(picture):
    """A blur equals a convolution of the reflected image with the blur's own impulse response."""
    spot = torch.zeros(1, 3, 51, 51)
    spot[..., 25, 25] = 1
    rough = picture(30, 34)[None]
    for seed in range(5):
        kernel = blur(spot, 4, seeded(seed))[:, :1, 13:38, 13:38]
        expected = F.conv2d(F.pad(rough, (12, 12, 12, 12), mode="reflect").transpose(0, 1), kernel).transpose(0, 1)
        torch.testing.assert_close(blur(rough, 4, seeded(seed)), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("scale", [2, 4])
def test_shrink_keeps_positions(scale):
    """A ramp stays a ramp over the same distance: the value of a pixel is the position of its centre."""
    for axis in (2, 3):
        picture, widths = ramp(80, 96, axis), []
        for seed in range(60):
            small = shrink(picture, scale, seeded(seed))
            height, width = small.shape[2:]
            assert 80 // (2 * scale) <= height <= 80
            assert 96 // (2 * scale) <= width <= 96
            widths.append(width)
            expected = ramp(height, width, axis)
            rim = math.ceil(12 * width / 96) + 1  # reach of the mirrored border
            inner = (slice(None), slice(None), slice(rim, height - rim), slice(rim, width - rim))
            if small[inner].numel():
                torch.testing.assert_close(small[inner], expected[inner], atol=2e-3, rtol=0)
        assert widths.count(96 // scale) / 60 == pytest.approx(0.25, abs=0.22)
        assert min(widths) < 96 / (2 * scale) * 1.3
        assert max(widths) > 96 / 1.5


def test_halving():
    for seed in range(20):
        half = halve(ramp(40, 48, 3), seeded(seed))
        assert half.shape == (1, 3, 20, 24)
        torch.testing.assert_close(half[..., 4:-4], ramp(20, 24, 3)[..., 4:-4], atol=1e-5, rtol=0)
    picture = torch.rand(1, 3, 8, 8, generator=seeded(1))
    outcomes = Counter(str(halve(picture, seeded(seed)).mul(1000).round().tolist()) for seed in range(200))
    # Four methods give three images: at one half, bilinear and area are both the mean of four pixels.
    assert len(outcomes) == 3
    assert outcomes[str(bicubic(picture, 2).mul(1000).round().tolist())] / 200 == pytest.approx(0.5, abs=0.14)


def test_area_resize_weighs_covered_pixels():
    """Each pixel is split into as many parts as the new size has pixels; the parts then divide evenly."""
    picture = torch.rand(1, 3, 12, 20)
    for size in ((6, 10), (5, 7), (12, 20), (1, 1), (17, 33)):
        parts = picture.double().repeat_interleave(size[0], 2).repeat_interleave(size[1], 3)
        expected = F.avg_pool2d(parts, (12, 20)).float()
        torch.testing.assert_close(degradations._resize(picture, size, "area"), expected, atol=1e-6, rtol=0)


def test_jpeg_matches_pillow(picture):
    """Another encoder of the same standard, quality and subsampling loses the same."""
    rough = picture(64, 88)[None]
    pixels = (rough[0] * 255).round().byte().permute(1, 2, 0).numpy()
    for quality in (30, 60, 95):
        ours = compress(rough, quality)
        assert torch.equal(ours, (ours * 255).round() / 255)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling="4:2:0")
        theirs = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)[None] / 255
        assert (ours - theirs).abs().mean() < 0.1 * (rough - theirs).abs().mean()


def test_jpeg_quality_orders_errors(picture):
    rough = picture(64, 64)[:1].expand(1, 3, -1, -1)  # grey, because chroma loses half its resolution at any quality
    errors = [(compress(rough, quality) - rough).abs().mean().item() for quality in (30, 50, 70, 95)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1.5 * errors[-1]


def test_jpeg_qualities(picture):
    rough = picture(24, 24)[None]

    def pixels(x):
        return x.numpy().tobytes()

    quality_of = {pixels(compress(rough, quality)): quality for quality in range(1, 101)}
    qualities = {quality_of[pixels(jpeg(rough, seeded(seed)))] for seed in range(300)}
    assert min(qualities) in (30, 31, 32)
    assert max(qualities) in (93, 94, 95)
    assert len(qualities) > 55


# The blind degradation


def test_blind_output_is_8_bit(picture):
    for scale, size in ((2, (32, 48)), (4, (96, 64)), (4, (8, 8)), (4, (4, 8)), (3, (33, 30)), (1, (16, 16))):
        hr = picture(*size)[None]
        for seed in range(15):
            lr = bsrgan(hr, scale, seeded(seed))
            assert lr.shape == (1, 3, size[0] // scale, size[1] // scale)
            assert lr.dtype == torch.float32
            assert torch.equal(lr, (lr * 255).round().clamp(0, 255) / 255)


def test_blind_follows_seed(picture):
    hr = torch.stack([picture(48, 48, seed=1)] * 3)
    before = torch.random.get_rng_state()
    first = bsrgan(hr, 4, seeded(5))
    assert torch.equal(first, bsrgan(hr, 4, seeded(5)))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first[:1], bsrgan(hr[:1], 4, seeded(5)))
    assert not torch.equal(first[0], first[1])  # each image of a batch has its own draws
    assert not torch.equal(first[1], first[2])
    generator = seeded(5)
    bsrgan(hr, 4, generator)
    assert not torch.equal(first, bsrgan(hr, 4, generator))


def test_last_operation_is_jpeg():
    """Chroma noise alternates from pixel to pixel unless a JPEG halves its resolution afterwards."""
    signs = (-1.0) ** (torch.arange(32)[:, None] + torch.arange(32)[None])

    def alternating(pictures):
        """Power of red minus blue that alternates in both directions, relative to that of the brightness."""
        colour, light = pictures[:, 0] - pictures[:, 2], pictures.mean(1)
        return (F.avg_pool2d(colour * signs, 2).square().sum() / F.avg_pool2d(light * signs, 2).square().sum()).item()

    grey = torch.full((1, 3, 128, 128), 0.5)
    raw = torch.cat([noise(grey[..., :32, :32], seeded(seed)) for seed in range(60)])
    blind = torch.cat([bsrgan(grey, 4, seeded(seed)) for seed in range(60)])
    assert alternating(raw) > 1
    assert alternating(blind) < alternating(raw) / 10


@pytest.mark.parametrize("axis", [2, 3])
def test_blind_keeps_positions(axis):
    """The middle of a ramp is one half after any blur; a shift by half a pixel changes it by 0.016."""
    hr = ramp(128, 128, axis)
    blind = torch.cat([bsrgan(hr, 4, seeded(seed)) for seed in range(60)])
    middle = blind.narrow(axis, 15, 2).mean((1, 2, 3))
    assert middle.mean().item() == pytest.approx(0.5, abs=0.004)
    assert (middle - 0.5).abs().max() < 0.03


def test_blind_damage_varies(picture):
    hr = picture(96, 96, seed=2)[None]
    blind = torch.cat([bsrgan(hr, 4, seeded(seed)) for seed in range(40)])
    errors = (blind - bicubic(hr, 4)).abs().mean((1, 2, 3))
    assert errors.min() > 0.01
    assert errors.max() > 1.5 * errors.min()


REFUSALS = (
    ((1, 3, 30, 32), 4, "crops of 32x30: the sides are no multiples of the scale (4)"),
    ((1, 3, 32, 2), 4, "crops of 2x32:"),
    ((1, 3, 0, 8), 4, "crops of 8x0:"),
    ((1, 3, 32, 32), 0, "the scale (0)"),
    ((1, 1, 32, 32), 4, "shape (1, 1, 32, 32) is no batch of RGB images"),
    ((3, 32, 32), 4, "shape (3, 32, 32)"),
    ((0, 3, 32, 32), 4, "shape (0, 3, 32, 32)"),
)


def test_refusals_are_one_line():
    for shape, scale, message in REFUSALS:
        for reduce in (lambda hr, scale: bicubic(hr, scale), lambda hr, scale: bsrgan(hr, scale, seeded())):
            with pytest.raises(UsageError) as error:
                reduce(torch.zeros(shape), scale)
            assert message in str(error.value), (shape, scale)
            assert "\n" not in str(error.value)
