"""Photographs of a few pixels, networks of a few weights, a recipe of a few iterations."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support.random_vgg import random_vgg

from engine.archs.esrgan import RRDBNet
from engine.archs.hpvaegan import Config
from engine.model.structure_file import write_structure
from engine.training.preset import read_preset


@pytest.fixture
def photo(tmp_path):
    """Blue above green with a bright spot, 64x48."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 40, (48, 64, 3)).astype(np.uint8)
    pixels[:24, :, 2] += 180
    pixels[24:, :, 1] += 120
    pixels[10:18, 20:34] = 250
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def large_photo(tmp_path, picture):
    """160x120: larger than what a super-resolution step makes of the small structure's 32x24."""
    pixels = picture(120, 160).mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    path = tmp_path / "large.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def options():
    """Three scales (two VAE, one GAN) that train in a second."""
    config = Config(last=2, last_vae=1, channels=8, latent=6, layers=1)
    sizes = {"base_width": 32, "least_width": 12}
    return {"config": config, **sizes, "precision": "fp32", "iterations": (6, 4, 5), "ema": 0.9}


@pytest.fixture
def recipe():
    """The quick preset at a size that trains in a second; all losses but the perceptual one, and all kinds of rows."""
    return read_preset("quick").sr.replace(
        iterations=6, batch=4, crop=32, chain=0.75, reconstructions=2, samples=1, gan_from=2, milestones=(4,),
        discriminator_channels=8, checkpoint_every=2, held_out=0.25, learning_rate=1e-3, ema=0.5, store="fp32",
    )  # fmt: skip


@pytest.fixture
def start_file(tmp_path):
    """An RRDBNet of two small blocks, as a checkpoint of the community."""
    torch.manual_seed(5)
    path = tmp_path / "start.safetensors"
    save_file(RRDBNet(channels=8, blocks=2, growth=4).state_dict(), path)
    return path


@pytest.fixture
def structure_file(tmp_path, small_structure):
    """Step 1 that makes 32x24 pixels."""
    path = tmp_path / "structure.safetensors"
    write_structure(small_structure, path)
    return path


@pytest.fixture(scope="session")
def vgg_file(tmp_path_factory):
    """VGG-16 with random weights."""
    path = tmp_path_factory.mktemp("vgg") / "vgg16.safetensors"
    save_file({name: value.half() for name, value in random_vgg("VGG-16").items()}, path)
    return path


@pytest.fixture
def with_features(recipe):
    """The recipe with both losses that look through VGG, and the one that looks at phases."""
    return recipe.replace(feature_texture=0.1, checkerboard=1.0, discriminator="projected", gan="hinge")
