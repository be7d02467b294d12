"""Batches: pairs show the same place, the held-out strip never appears, the seed decides everything."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from engine.errors import InputError, UsageError
from engine.training.losses.vgg import VGGFeatures
from engine.training.photo import Picture, to_unit
from engine.training.sr.chain import SimulatedInput
from engine.training.sr.pairs import PhotographPairs, TeacherPairs, add_noise, check_grid

CPU = torch.device("cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def coordinates():
    """An image whose red is the row and whose green is the column; blue is full from column 96."""
    pixels = np.zeros((96, 128, 3), np.uint8)
    pixels[..., 0] = np.arange(96)[:, None]
    pixels[..., 1] = np.arange(128)
    pixels[:, 96:, 2] = 255
    return Picture.of(pixels)


@pytest.fixture
def plain(recipe):
    return recipe.replace(flip=False, rotate=False, sigma=0.0)


def reduced(picture):
    whole = to_unit(picture.crop(0, 0, *picture.size))
    return F.avg_pool2d(whole[None], 4)[0].half()


def simulated(coordinates):
    small = reduced(coordinates)
    return [SimulatedInput(small, small, True), SimulatedInput(small, small, False)]


def test_rows_in_order_show_same_place(coordinates, plain):
    pairs = PhotographPairs(coordinates, simulated(coordinates), plain, 4, 96, CPU)
    assert pairs.aligned
    seen = set()
    for seed in range(8):
        batch = pairs.draw(generator(seed))
        assert (batch.hr.shape, batch.lr.shape) == ((4, 3, 32, 32), (4, 3, 8, 8))
        assert batch.coarse.shape == (3, 3, 8, 8)
        assert batch.pairs == 1
        seen.add(batch.matched)
        exact = F.avg_pool2d(batch.hr, 4)
        assert (batch.lr - exact)[: batch.matched, :, 1:-1, 1:-1].abs().max() < 2e-3
    assert len(seen) > 1


def test_held_out_strip_is_never_seen(coordinates, plain):
    pairs = PhotographPairs(coordinates, simulated(coordinates)[:1], plain, 4, 96, CPU)
    columns = set()
    for seed in range(30):
        batch = pairs.draw(generator(seed))
        assert batch.hr[:, 2].max() == 0
        assert batch.lr[: batch.matched, 2].max() == 0
        columns |= set((batch.hr[:, 1] * 255).round().int().flatten().tolist())
    assert max(columns) == 95


def test_free_sample_meets_similar_colours(plain):
    """Three materials in columns; a sample of each meets its own material, wherever that lies."""
    rng = np.random.default_rng(0)
    materials = np.array([(200, 60, 40), (60, 200, 40), (40, 60, 200)])
    pixels = materials.repeat(64, 0)[None].repeat(96, 0) + rng.integers(-30, 30, (96, 192, 3))
    photo = Picture.of(pixels.astype(np.uint8))
    recipe = plain.replace(chain=1.0, samples=1, reconstructions=0)
    for colour in materials:
        picture = torch.tensor(colour / 255).half()[:, None, None].expand(3, 24, 48)
        pairs = PhotographPairs(photo, [SimulatedInput(picture, picture, False)], recipe, 4, 192, CPU)
        batch = pairs.draw(generator(1))
        assert batch.matched == 0
        assert ((batch.hr.mean((2, 3)) * 255 - torch.tensor(colour)).abs().amax(1) < 8).all()


def test_free_sample_meets_similar_texture(plain, vgg_file):
    """Horizontal stripes on the left, vertical stripes on the right, of the same two greys."""
    stripes = np.where(np.arange(96) // 8 % 2, 180, 60).astype(np.uint8)
    across, down = np.broadcast_to(stripes[:, None], (96, 96)), np.broadcast_to(stripes, (96, 96))
    photo = Picture.of(np.concatenate([across, down], 1)[..., None].repeat(3, 2))
    recipe = plain.replace(chain=1.0, samples=1, reconstructions=0)
    for texture, axis in ((across, 2), (down, 3)):
        picture = reduced(Picture.of(texture[..., None].repeat(3, 2)))
        chain = [SimulatedInput(picture, picture, False)]

        def share(vgg, chain=chain, axis=axis):
            pairs = PhotographPairs(photo, chain, recipe, 4, 192, CPU, vgg)
            steps = [pairs.draw(generator(seed)).hr for seed in range(6)]
            along, other = (torch.stack([hr.diff(dim=d).abs().mean() for hr in steps]) for d in (axis, 5 - axis))
            return float((along / (along + other)).mean())

        assert share(None) < 0.7
        assert share(VGGFeatures(vgg_file, ("relu1_2", "relu2_2", "relu3_3"))) > 0.9


def test_other_size_matches_relative_place(coordinates, plain):
    small = F.interpolate(reduced(coordinates)[None].float(), (48, 64), mode="bilinear")[0].half()
    chain = [SimulatedInput(small, small, True)]
    pairs = PhotographPairs(coordinates, chain, plain.replace(chain=1.0), 4, 128, CPU)
    assert not pairs.aligned
    for seed in range(5):
        batch = pairs.draw(generator(seed))
        difference = batch.hr.mean((2, 3)) - batch.lr.mean((2, 3))
        # The simulated crop covers 8 of 64 columns, the photograph's 32 of 128: at most 12 of the latter apart.
        assert (difference[:, :2].abs() * 255).max() <= 12


def test_augmentation_applies_to_all_parts(coordinates, plain):
    pairs = PhotographPairs(coordinates, simulated(coordinates)[:1], plain.replace(flip=True, rotate=True), 4, 96, CPU)
    across, down = set(), set()
    for seed in range(20):
        batch = pairs.draw(generator(seed))
        assert (batch.lr - F.avg_pool2d(batch.hr, 4))[:, :, 1:-1, 1:-1].abs().max() < 2e-3
        across |= set(torch.sign(batch.hr[:, 1, 0, -1] - batch.hr[:, 1, 0, 0]).tolist())
        down |= set(torch.sign(batch.hr[:, 0, -1, 0] - batch.hr[:, 0, 0, 0]).tolist())
    assert across == {-1, 0, 1} == down


def test_batches_follow_seed(coordinates, recipe):
    pairs = PhotographPairs(coordinates, simulated(coordinates), recipe.replace(degradation="bsrgan"), 4, 96, CPU)
    one, same, other = (pairs.draw(generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(one.lr, same.lr)
    assert torch.equal(one.hr, same.hr)
    assert not torch.equal(one.hr, other.hr)


def test_input_noise_strength(recipe):
    lr = torch.full((64, 3, 32, 32), 0.5)
    fixed = (add_noise(lr, recipe.replace(noise="fixed", sigma=0.1), 0, generator()) - lr).std((1, 2, 3))
    assert (fixed - 0.1).abs().max() < 0.01
    uniform = (add_noise(lr, recipe.replace(noise="uniform", sigma=0.1), 0, generator()) - lr).std((1, 2, 3))
    assert uniform.min() < 0.01
    assert 0.09 < uniform.max() < 0.11
    assert uniform.mean() == pytest.approx(0.05, abs=0.015)
    assert add_noise(lr, recipe.replace(sigma=0.0), 0, generator()) is lr


def test_noise_channels_are_normal(recipe):
    lr = torch.full((8, 3, 32, 32), 0.5)
    noisy = add_noise(lr, recipe.replace(sigma=0.0), 4, generator())
    assert noisy.shape == (8, 7, 32, 32)
    assert torch.equal(noisy[:, :3], lr)
    assert noisy[:, 3:].std() == pytest.approx(1, abs=0.02)
    assert noisy[:, 3:].flatten(0, 1).flatten(1).corrcoef().fill_diagonal_(0).abs().max() < 0.15


def test_teacher_gives_target(coordinates, plain):
    def enlarge(lr):
        return F.interpolate(lr, scale_factor=4, mode="nearest")

    tall = Picture.of(np.full((40, 32, 3), 255, np.uint8))
    pairs = TeacherPairs([(coordinates, 96), (tall, 32)], enlarge, plain, 4, CPU)
    white = 0
    for seed in range(20):
        batch = pairs.draw(generator(seed))
        assert torch.equal(batch.hr, enlarge(batch.lr))
        assert (batch.pairs, batch.matched, len(batch.coarse)) == (4, 4, 0)
        white += int((batch.lr.mean((1, 2, 3)) > 0.99).sum())
    assert white / 80 == pytest.approx(40 * 32 / (40 * 32 + 96 * 96), abs=0.1)


def test_refusals(coordinates, plain):
    with pytest.raises(InputError, match="24x96 pixels to train on, smaller than a crop of 32x32"):
        PhotographPairs(coordinates, [], plain, 4, 24, CPU)
    small = reduced(coordinates)[:, :7]
    with pytest.raises(InputError, match="a simulated input: 24x7"):
        PhotographPairs(coordinates, [SimulatedInput(small, small, True)], plain, 4, 96, CPU)
    with pytest.raises(UsageError, match="multiple of 32"):
        check_grid(48, 4, 8)
