"""Validation: quality in numbers, and the sample image."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from engine.training.photo import Picture
from engine.training.sr.chain import SimulatedInput
from engine.training.sr.validation import Validation, fixed_crops


@pytest.fixture
def photo(picture):
    return Picture.of(picture(96, 128).mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def nearest(lr):
    return F.interpolate(lr, scale_factor=4, mode="nearest")


def test_crops_are_held_out(photo):
    crops, held_out = fixed_crops(photo, 94, 4)
    assert held_out
    assert crops.shape == (3, 3, 32, 32)  # 34 columns, rounded down to a multiple of four
    whole = torch.from_numpy(photo.pixels().copy()).permute(2, 0, 1) / 255
    assert torch.equal(crops[0], whole[:, :32, 94:126])
    assert torch.equal(crops[2], whole[:, 64:, 94:126])
    crops, held_out = fixed_crops(photo, 126, 4)
    assert not held_out
    assert crops.shape == (1, 3, 96, 96)


def test_quality_of_truth_and_of_noise(photo):
    crops, held_out = fixed_crops(photo, 96, 4)
    lr = F.avg_pool2d(crops, 4)
    validation = Validation(crops, lr, 0.1, 0, held_out)
    assert validation.quality(lambda _: crops, noise=False).psnr == pytest.approx(100)
    assert validation.quality(lambda _: crops, noise=False).texture == 0
    flat = crops.mean((2, 3), keepdim=True).expand_as(crops)
    expected = float(-10 * (flat - crops).square().mean((1, 2, 3)).log10().mean())
    assert validation.quality(lambda _: flat, noise=False).psnr == pytest.approx(expected, abs=1e-4)
    plain, noisy = (validation.quality(nearest, noise=noise) for noise in (False, True))
    assert noisy.psnr < plain.psnr
    assert validation.quality(nearest, noise=True) == noisy  # the same noise every time
    assert validation.bicubic().texture > 0


def test_noise_channels_without_noise_are_zero(photo):
    crops, held_out = fixed_crops(photo, 96, 4)
    validation = Validation(crops, F.avg_pool2d(crops, 4), 0.0, 2, held_out)
    quiet, noisy = (validation.inputs(noise=noise) for noise in (False, True))
    assert torch.equal(quiet[:, :3], noisy[:, :3])
    assert float(quiet[:, 3:].abs().max()) == 0
    assert noisy[:, 3:].std() == pytest.approx(1, abs=0.1)


def test_texture_distance_prefers_texture_to_blur():
    """Another crop of the same texture beats a blur in texture distance, not in PSNR."""
    grain = Picture.of(np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8))
    crops, held_out = fixed_crops(grain, 96, 4)
    validation = Validation(crops, F.avg_pool2d(crops, 4), 0.0, 0, held_out)
    neighbours = torch.stack([grain.crop(y, 50, 32, 32) for y in (0, 32, 64)]) / 255
    moved = validation.quality(lambda _: neighbours, noise=False)
    assert moved.psnr < validation.bicubic().psnr - 2
    assert moved.texture < 0.5 * validation.bicubic().texture


def test_sample_image_has_column_for_each_kind(photo, tmp_path):
    crops, held_out = fixed_crops(photo, 96, 4)
    one = SimulatedInput(torch.rand(3, 24, 32).half(), torch.rand(3, 24, 32).half(), False)
    for simulated, rows in (([], 3), ([one], 4)):
        validation = Validation(crops, F.avg_pool2d(crops, 4), 0.0, 0, held_out, simulated)
        validation.keep_start(lambda lr: nearest(lr) * 0)
        validation.write(nearest, tmp_path / "row.png")
        with Image.open(tmp_path / "row.png") as image:
            assert image.size == (4 * 32, rows * 32)
            assert image.getpixel((40, 10)) == (0, 0, 0)
            assert image.getpixel((3 * 32, 0)) == tuple((crops[0, :, 0, 0] * 255).round().int().tolist())
