"""Fixtures of training tests: photographs of a few pixels, networks of a few weights, recipes of a few iterations."""

import dataclasses
import re
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from engine.archs.esrgan import RRDBNet
from engine.archs.hpvaegan import Config
from engine.model.structure_file import write_structure
from engine.training.preset import preset_text, read_preset
from engine.training.run.events import IterationDone
from engine.training.structure.recipe import StructureRecipe
from engine.training.structure.request import StructureRequest
from support.random_vgg import random_vgg
from support.small import photograph

SMALL_NETWORKS = Config(last=2, last_vae=1, channels=8, latent=6, layers=1)
"""Three scales of step 1: two patch-VAEs and a patch-GAN."""
SMALL_WIDTHS = {"base_width": 32, "least_width": 12}

_TINY = {"iterations": 3, "crop": 32, "gan_from": 9, "checkpoint_every": 1, "held_out": 0.25}


def tiny_preset(**changes):
    """Text of the preset quick, changed to a training of a second; ``changes``: other values of a step's training."""
    head, table, body = preset_text("quick").partition("[sr]")
    for name, value in (_TINY | changes).items():
        body, number = re.subn(rf"^{name} = \S+", f"{name} = {value}", body, flags=re.MULTILINE)
        assert number == 1, name
    return head + table + body


def stop_after(iteration, phase=0, error=KeyboardInterrupt):
    """Callback that raises ``error`` after an iteration."""

    def on_event(event):
        if isinstance(event, IterationDone) and (event.phase, event.iteration) == (phase, iteration):
            raise error

    return on_event


@pytest.fixture
def photo(tmp_path):
    """64x48: blue above green with a bright spot."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 40, (48, 64, 3)).astype(np.uint8)
    pixels[:24, :, 2] += 180
    pixels[24:, :, 1] += 120
    pixels[10:18, 20:34] = 250
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def large_photo(tmp_path):
    """160x120, larger than the small structure's 32x24 enlarged by step 2."""
    return photograph(tmp_path / "large.png", 120, 160)


@pytest.fixture
def structure_request():
    """Factory of requests for small networks that train in a second; keywords change the recipe or the request."""
    recipe = read_preset("paper-esrgan").structure.replace(
        iterations=(6, 4, 5), batch=1, last_vae=1, ema=0.9, checkpoint_every=100
    )
    names = {field.name for field in dataclasses.fields(StructureRecipe)}

    def make(**changes):
        values = {name: changes.pop(name) for name in names & changes.keys()}
        options = {"networks": SMALL_NETWORKS, "precision": "fp32", **SMALL_WIDTHS} | changes
        return StructureRequest(recipe=recipe.replace(**values), **options)

    return make


@pytest.fixture
def narrow_structure(monkeypatch):
    """Step 1 of the commands is small and ends at 32 pixels, so that steps end at 128, 512 and 2048."""
    small = partial(StructureRequest, networks=SMALL_NETWORKS, **SMALL_WIDTHS)
    for module in ("engine.training.train", "engine.cli.train"):
        monkeypatch.setattr(f"{module}.StructureRequest", small)
    for module in ("engine.training.train", "engine.training.sr.train", "engine.cli.train"):
        monkeypatch.setattr(f"{module}.BASE_WIDTH", 32)


@pytest.fixture
def recipe():
    """The quick preset at a size that trains in a second: all losses but the perceptual one, all kinds of rows."""
    return read_preset("quick").sr.replace(
        iterations=6, batch=4, crop=32, chain=0.75, reconstructions=2, samples=1, gan_from=2, milestones=(4,),
        discriminator_channels=8, checkpoint_every=2, held_out=0.25, learning_rate=1e-3, ema=0.5, store="fp32",
    )  # fmt: skip


@pytest.fixture
def with_features(recipe):
    """The recipe with the losses of VGG's features and of phases."""
    return recipe.replace(feature_texture=0.1, checkerboard=1.0, discriminator="projected", gan="hinge")


@pytest.fixture
def start_file(tmp_path):
    """An RRDBNet of two small blocks, as a checkpoint of the community."""
    torch.manual_seed(5)
    path = tmp_path / "start.safetensors"
    save_file(RRDBNet(channels=8, blocks=2, growth=4).state_dict(), path)
    return path


@pytest.fixture
def structure_file(tmp_path, small_structure):
    """Step 1 with an output of 32x24 pixels."""
    path = tmp_path / "structure.safetensors"
    write_structure(small_structure, path)
    return path


@pytest.fixture(scope="session")
def vgg_file(tmp_path_factory):
    """VGG-16 with random weights."""
    path = tmp_path_factory.mktemp("vgg") / "vgg16.safetensors"
    save_file({name: value.half() for name, value in random_vgg("VGG-16").items()}, path)
    return path
