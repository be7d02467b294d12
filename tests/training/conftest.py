"""A photograph of a few pixels and a network of a few weights."""

import numpy as np
import pytest
from PIL import Image

from engine.archs.hpvaegan import Config


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
def options():
    """Three scales (two VAE, one GAN) that train in a second."""
    config = Config(last=2, last_vae=1, channels=8, latent=6, layers=1)
    return {"config": config, "base_width": 32, "least_width": 12, "precision": "fp32", "iterations": (6, 4, 5)}
