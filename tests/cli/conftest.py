"""Fixtures of the tests of engine train."""

import pytest
from support.training import (  # noqa: F401
    large_photo,
    narrow_structure,
    photo,
    start_file,
    structure_file,
    structure_request,
    vgg_file,
)

from engine.training.preset import preset_text


@pytest.fixture
def config(tmp_path):
    """The quick preset at a size that trains in a second, as a file."""
    text = preset_text("quick")
    for old, new in {
        "iterations = 400": "iterations = 2", "crop = 128 ": "crop = 32 ", "reconstructions = 8": "reconstructions = 1",
        "samples = 8": "samples = 1", "discriminator_channels = 32": "discriminator_channels = 8",
        "gan_from = 50": "gan_from = 0", "checkpoint_every = 50": "checkpoint_every = 1", "held_out = 0.1": "held_out = 0.25",
    }.items():  # fmt: skip
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / "tiny.toml"
    path.write_text(text)
    return path
