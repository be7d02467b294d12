"""Texture losses against closed forms and independent definitions; gradients by finite differences."""

import math

import numpy as np
import pytest
import torch

from engine.errors import UsageError
from engine.training.losses.texture import Checkerboard, FeatureWasserstein, FineTexture, SlicedWasserstein


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(sigma, *shape, seed=0, dtype=torch.float32):
    return 0.5 + sigma * torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def mean_absolute_sum(values):
    """Expected |sum of the components| of a random direction in ``values`` dimensions."""
    logs = math.lgamma(values / 2) - math.lgamma((values + 1) / 2)
    return math.sqrt(values / math.pi) * math.exp(logs)


# SlicedWasserstein


def test_distance_of_equal_images():
    x = torch.rand(3, 3, 20, 24)
    assert SlicedWasserstein()(x, x.clone(), seeded()) == 0
    assert SlicedWasserstein(phases=4)(x, x.clone(), seeded()) == 0
    assert SlicedWasserstein(patch=1, scales=1)(x, x.flip(3), seeded()) < 1e-6  # the place of a pixel does not matter
    assert SlicedWasserstein()(x, x.flip(0), seeded()) > 1e-3  # its image does


def test_distance_of_two_constants():
    """All patches are equal: the distance along a direction is the difference times the sum of its components."""
    a, b = torch.full((1, 3, 8, 8), 0.7), torch.full((1, 3, 8, 8), 0.4)
    for scales in (1, 2):
        loss = SlicedWasserstein(patch=4, projections=20_000, scales=scales)
        assert loss(a, b, seeded()).item() == pytest.approx(0.3 * mean_absolute_sum(48), rel=0.02)


def test_distance_of_white_noise():
    """A projection is normal with the noise's sigma, E |normal| is sqrt(2 / pi), and halving the size halves sigma."""
    a, b = noise(0.10, 4, 3, 96, 96, seed=1), noise(0.04, 4, 3, 96, 96, seed=2)
    expected = (0.10 - 0.04) * math.sqrt(2 / math.pi)
    one = SlicedWasserstein(scales=1)(a, b, seeded())
    two = SlicedWasserstein(scales=2)(a, b, seeded())
    assert one.item() == pytest.approx(expected, rel=0.03)
    assert two.item() == pytest.approx(expected * (1 + 1 / 2) / 2, rel=0.03)


def test_phases_see_a_grid():
    """All patches of a grid together are those of its shifts; the patches at one phase are not."""
    pattern = torch.rand(1, 3, 4, 4, generator=seeded())
    shifts = [pattern.roll((y, x), (2, 3)) for y in range(4) for x in range(4)]
    grid, real = (torch.cat(tiles).tile(1, 1, 8, 8)[:, :, :30, :30] for tiles in ([pattern] * 16, shifts))
    assert SlicedWasserstein(scales=1)(grid, real, seeded()) < 1e-6
    assert SlicedWasserstein(scales=1, phases=4)(grid, real, seeded()) > 0.05
    assert SlicedWasserstein(scales=1, phases=4)(real, real, seeded()) == 0


def test_phases_leave_room_for_a_patch():
    for size in (7, 9, 14):
        x = torch.rand(2, 3, size, size)
        assert SlicedWasserstein(scales=1, phases=4)(x, x.flip(0), seeded()) > 0


def test_against_unfolded_patches():
    """The same directions on patches that are cut out one by one."""
    fake, real = torch.rand(2, 3, 9, 11), torch.rand(2, 3, 9, 11)
    loss = SlicedWasserstein(patch=3, projections=5, scales=1)(fake, real, seeded(4))
    directions = torch.randn(5, 3, 3, 3, generator=seeded(4)).flatten(1).double().numpy()
    directions /= np.sqrt((directions**2).sum(1, keepdims=True))

    def patches(x):
        x = x.double().numpy()
        return [[x[n, :, i : i + 3, j : j + 3].ravel() for i in range(7) for j in range(9)] for n in range(2)]

    def distance(a, b):
        a, b = np.sort(np.array(a) @ directions.T, axis=0), np.sort(np.array(b) @ directions.T, axis=0)
        return np.abs(a - b).mean()

    a, b = patches(fake), patches(real)
    expected = (distance(a[0], b[0]) + distance(a[1], b[1])) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_heights():
    """An image upside down has the same single pixels at other heights."""
    dark_above = torch.linspace(0, 1, 24)[None, None, :, None].expand(1, 3, 24, 20)
    upside_down = dark_above.flip(2)
    plain, high = (SlicedWasserstein(patch=1, scales=1, heights=heights) for heights in (0.0, 1.0))
    assert plain(upside_down, dark_above, seeded()) < 1e-6
    assert high(upside_down, dark_above, seeded()) > 0.1
    assert high(dark_above.flip(3), dark_above, seeded()) == 0


def test_distance_gradient():
    loss = SlicedWasserstein(patch=3, projections=4)
    fake = noise(0.2, 2, 3, 9, 8, seed=1, dtype=torch.float64).requires_grad_()
    real = noise(0.1, 2, 3, 9, 8, seed=2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: loss(x, real, seeded()), (fake,), eps=1e-7)


def test_directions_in_groups():
    """The distance and its gradient do not depend on the number of directions at a time."""
    real = torch.rand(2, 3, 24, 20, dtype=torch.float64)
    results = []
    for at_a_time in (None, 64, 16, 1):
        fake = torch.rand(2, 3, 24, 20, dtype=torch.float64, generator=seeded(1), requires_grad=True)
        loss = FineTexture(at_a_time=at_a_time)
        with torch.no_grad():
            without_gradient = loss(fake, real, seeded(2))
        distance = loss(fake, real, seeded(2))
        assert without_gradient.item() == pytest.approx(distance.item(), rel=1e-12)
        (3 * distance).backward()
        results.append((distance.detach(), fake.grad))
    (usual, gradient), *others = results
    assert gradient.abs().mean() > 0
    for distance, slope in others:
        torch.testing.assert_close(distance, usual, rtol=1e-12, atol=0)
        torch.testing.assert_close(slope, gradient, rtol=1e-9, atol=1e-15)


def test_directions_in_groups_save_memory():
    """All 64 directions would save 64 values per pixel, twice, for the backward pass; one at a time, the gradient alone."""
    saved = []
    fake = torch.rand(1, 3, 40, 40, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        FineTexture(scales=1, at_a_time=1)(fake, torch.rand(1, 3, 40, 40), seeded())
    assert max(saved) <= 64 * 40 * 40 // 16


def test_directions_are_drawn_from_the_generator():
    a, b = torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16)
    loss, generator = SlicedWasserstein(), seeded(3)
    before = torch.random.get_rng_state()
    first, second = loss(a, b, generator), loss(a, b, generator)
    assert first != second
    assert loss(a, b, seeded(3)) == first
    assert torch.equal(torch.random.get_rng_state(), before)


def test_distance_is_fp32_under_autocast():
    a, b = torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16)
    plain = SlicedWasserstein()(a, b, seeded())
    with torch.autocast("cpu", torch.bfloat16):
        assert SlicedWasserstein()(a, b, seeded()) == plain
        assert SlicedWasserstein()(a.bfloat16(), b, seeded()).dtype == torch.float32


def test_distance_refusals_are_one_line():
    image = (1, 3, 16, 16)
    refusals = [
        (SlicedWasserstein, {}, (1, 3, 14, 13), (1, 3, 14, 13), "images of 14 x 13 pixels.*need 14 x 14"),
        (SlicedWasserstein, {"scales": 3}, (1, 3, 32, 27), (1, 3, 32, 27), "images of 32 x 27 pixels.*need 28 x 28"),
        (SlicedWasserstein, {}, (2, 3, 16, 16), (3, 3, 16, 16), "shapes differ"),
        (SlicedWasserstein, {}, (1, 1, 16, 16), image, r"fake: not a batch of RGB images \(shape \(1, 1, 16, 16\)\)"),
        (SlicedWasserstein, {}, image, (3, 16, 16), r"real: not a batch of RGB images \(shape \(3, 16, 16\)\)"),
        (SlicedWasserstein, {}, (0, 3, 16, 16), image, r"fake: not a batch of RGB images \(shape \(0, 3, 16, 16\)\)"),
        (SlicedWasserstein, {"patch": 0}, image, image, "patch = 0: too small"),
        (SlicedWasserstein, {"scales": 0}, image, image, "scales = 0"),
        (SlicedWasserstein, {"projections": 0}, image, image, "projections = 0"),
        (FineTexture, {"at_a_time": 0}, image, image, "at_a_time = 0: no divisor of the 64"),
        (FineTexture, {"at_a_time": 48}, image, image, "at_a_time = 48: no divisor of the 64"),
    ]
    for loss, options, fake, real, message in refusals:
        with pytest.raises(UsageError, match=message) as error:
            loss(**options)(torch.zeros(fake), torch.zeros(real), seeded())
        assert "\n" not in str(error.value), message


# Checkerboard


def enlarged(factor, *shape, sigma=0.1):
    """White noise, each value enlarged to a square."""
    return noise(sigma, *shape).repeat_interleave(factor, 2).repeat_interleave(factor, 3)


def test_white_noise_is_even():
    """Chance alone: a mean of n sizes of normal numbers has the relative variance (pi / 2 - 1) / n. Filters of 3 x 3 do not
    overlap at one phase; the mean over 16 phases, which share pixels, removes some of the variance.
    """
    unevenness = Checkerboard(4)(noise(0.1, 4, 3, 130, 130), seeded())
    chance = (math.pi / 2 - 1) / (4 * 32 * 32)
    assert 0.8 * chance < unevenness.item() < 1.1 * chance


def test_squares_of_one_colour_by_hand():
    """A filter inside a square sees one colour and responds with zero, at four of the phases; at the others it crosses borders.
    Its response to squares of independent colours has the deviation sqrt(sum of b^2); b are the sums of its weights in each
    touched square, colour by colour. The mean size of a normal number is proportional to the deviation.
    """
    unevenness = Checkerboard(4, filters=400)(enlarged(4, 4, 3, 33, 33, sigma=10)[:, :, :130, :130], seeded())
    generator = torch.Generator().manual_seed(7)
    weights = torch.randn(4000, 3, 3, 3, generator=generator)
    weights -= weights.mean((2, 3), keepdim=True)
    sizes = torch.zeros(4000, 4, 4)
    for y in range(4):
        for x in range(4):
            blocks = [part.sum((2, 3)) for rows in _cut(weights, 2, y) for part in _cut(rows, 3, x)]
            sizes[:, y, x] = torch.stack([b.square().sum(1) for b in blocks]).sum(0).sqrt()
    assert sizes[:, :2, :2].abs().max() < 1e-4
    expected = (sizes / sizes.mean((1, 2), keepdim=True) - 1).square().mean()
    assert unevenness.item() == pytest.approx(expected.item(), rel=0.05)


def _cut(weights, dim, phase):
    """Parts of a filter's 3 rows, the first at this phase, in one square of 4 and in the next."""
    inside = min(3, 4 - phase)
    return [part for part in weights.split([inside, 3 - inside], dim) if part.shape[dim]]


def test_strength_and_colour_do_not_matter():
    loss, weave = Checkerboard(4), enlarged(4, 2, 3, 20, 20)
    expected = loss(weave, seeded()).item()
    assert loss(0.5 + 0.5 * (weave - 0.5), seeded()).item() == pytest.approx(expected, rel=0.02)
    assert loss(0.3 + weave, seeded()).item() == pytest.approx(expected, rel=1e-3)
    assert loss(torch.full((2, 3, 20, 20), 0.7), seeded()) < 1e-9
    assert loss(weave.clamp(0.5, 0.5001), seeded()) < 0.1 * expected  # invisible texture


def test_scale_of_one_is_even():
    assert Checkerboard(1)(noise(0.1, 1, 3, 20, 20), seeded()) == 0


def test_checkerboard_gradient():
    fake = noise(0.2, 2, 3, 10, 11, seed=1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: Checkerboard(4, 3)(x, seeded()), (fake,), eps=1e-7)


def test_descent_removes_a_checkerboard():
    weave = enlarged(4, 2, 3, 17, 17).requires_grad_()
    loss, optimiser = Checkerboard(4), torch.optim.Adam([weave], lr=0.01)
    before = loss(weave, seeded()).item()
    for index in range(60):
        optimiser.zero_grad()
        loss(weave, seeded(index)).backward()
        optimiser.step()
    assert loss(weave, seeded(99)).item() < 0.05 * before


def test_checkerboard_is_fp32_under_autocast():
    x, loss = enlarged(4, 1, 3, 8, 8), Checkerboard(4)
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(x, seeded()) == loss(x, seeded(0)) == loss(x.float(), seeded())
        assert loss(x.bfloat16(), seeded()).dtype == torch.float32
    with pytest.raises(UsageError, match="images of 5 x 40 pixels: no square of 4 x 4") as error:
        loss(torch.zeros(1, 3, 5, 40), seeded())
    assert "\n" not in str(error.value)


# FeatureWasserstein


def maps(scale, shape=(2, 6, 40, 40), seed=0, dtype=torch.float32):
    return {"relu1_2": scale * torch.randn(shape, generator=seeded(seed), dtype=dtype)}


def test_feature_distance_of_equal_maps():
    """The place of a vector does not matter, its image does."""
    loss, real = FeatureWasserstein(), maps(1.0, (2, 6, 8, 8))
    assert loss(real, real, seeded()) == 0
    assert loss(real, {"relu1_2": real["relu1_2"].flip(2, 3)}, seeded()) < 1e-10
    assert loss(real, {"relu1_2": real["relu1_2"].flip(0)}, seeded()) > 1e-3


def test_feature_distance_in_deviations():
    """A shift of all vectors by t deviations: its square along a direction d of length one is (t sum d)^2, on average t^2."""
    loss, weights = FeatureWasserstein(20_000), torch.tensor([1.0, 4.0, 9.0])[:, None, None]
    real = {"relu1_2": weights * torch.randn(1, 3, 16, 16, generator=seeded())}
    deviation = real["relu1_2"].std((0, 2, 3)) + 0.1 * real["relu1_2"].std()
    fake = {"relu1_2": real["relu1_2"] + 0.5 * deviation[:, None, None]}
    assert loss(fake, real, seeded()).item() == pytest.approx(0.25, rel=0.03)
    thousand = ({name: 1000 * value for name, value in one.items()} for one in (fake, real))
    assert loss(*thousand, seeded()).item() == pytest.approx(0.25, rel=0.03)


def test_layers_have_equal_weight():
    loss, fake, real = FeatureWasserstein(), maps(1.0, seed=1), maps(0.5, seed=2)
    twice = [one | {"relu2_2": 100 * one["relu1_2"]} for one in (fake, real)]
    assert loss(*twice, seeded()).item() == pytest.approx(loss(fake, real, seeded()).item(), rel=0.1)


def test_constant_component_is_finite():
    fake, real = maps(1.0, seed=1), maps(0.0)
    assert FeatureWasserstein()(real, real, seeded()) == 0
    real["relu1_2"][:, 0] = fake["relu1_2"][:, 0]
    assert FeatureWasserstein()(fake, real, seeded()).isfinite()


def test_feature_distance_gradient():
    fake, real = (maps(s, (2, 3, 5, 4), seed, torch.float64)["relu1_2"] for s, seed in ((1.0, 1), (0.6, 2)))
    loss = FeatureWasserstein(4)
    fake.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss({"relu1_2": x}, {"relu1_2": real}, seeded()), (fake,), eps=1e-7)


def test_heights_of_feature_vectors():
    """Maps upside down have the same vectors at other heights."""
    loss = FeatureWasserstein(20_000)
    real = maps(1.0, (1, 3, 16, 12))["relu1_2"] + torch.linspace(0, 9, 16)[:, None]
    real, over = ({"relu1_2": x} for x in (real, real.flip(2)))
    heights = torch.linspace(-1, 1, 64)
    assert loss(over, real, seeded()) < 1e-10
    assert loss(over, real, seeded(), heights=heights) > 0.05
    assert loss(over, real, seeded(), heights=torch.zeros(64)) < 1e-10
    assert loss(real, real, seeded(), heights=heights) == 0


def test_half_precision_maps():
    fake, real = maps(1.0, seed=1), maps(1.0, seed=2)
    half = [{name: value.bfloat16() for name, value in one.items()} for one in (fake, real)]
    with torch.autocast("cpu", torch.bfloat16):
        distance = FeatureWasserstein()(*half, seeded())
    assert distance.dtype == torch.float32
    assert distance.item() == pytest.approx(FeatureWasserstein()(fake, real, seeded()).item(), rel=0.05)
    with pytest.raises(UsageError, match="shapes differ"):
        FeatureWasserstein()(fake, maps(1.0, (2, 6, 8, 8)), seeded())


# FineTexture


def test_fine_texture_ignores_colour_slope_and_strength():
    detail, plain = FineTexture(), SlicedWasserstein(3, scales=3)
    real = noise(0.2, 2, 3, 64, 64)
    slope = torch.linspace(-0.2, 0.2, 64)
    other = real + torch.tensor([0.1, 0.0, -0.1])[:, None, None] + slope + slope[:, None]
    assert detail(other, real, seeded()) < 1e-3 < plain(other, real, seeded())
    rough = noise(0.4, 2, 3, 64, 64, seed=1)
    strong = detail(rough, real, seeded()).item()
    assert strong == pytest.approx(1.0, abs=0.1)  # responses twice as large as the real ones
    faint = detail(0.5 + (rough - 0.5) / 5, 0.5 + (real - 0.5) / 5, seeded()).item()
    assert faint == pytest.approx(strong, rel=0.05)
    assert detail(real, real, seeded()) == 0


def test_fine_texture_sees_missing_detail():
    """Without its fine texture an image has nearly the same patches, but not the same detail."""
    coarse = torch.nn.functional.interpolate(noise(0.2, 1, 3, 8, 8), scale_factor=16, mode="bilinear")
    real = coarse + noise(0.01, 1, 3, 128, 128) - 0.5
    assert SlicedWasserstein(3, scales=1)(coarse, real, seeded()) < 0.02
    assert FineTexture(scales=1)(coarse, real, seeded()) > 0.5
