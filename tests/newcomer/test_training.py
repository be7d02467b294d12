"""Defects 6 and 16: training refuses at once, tells its time, and resumes with what was corrected."""

import re

import pytest
import torch
from safetensors.torch import save_file

from engine.archs.esrgan import RRDBNet
from engine.training.preset import preset_text

pytestmark = pytest.mark.slow

TRAIN = "engine train photo.png --out m.safetensors --config tiny.toml --device cpu --precision fp32"


@pytest.fixture
def studio(machine):
    """Machine with a photograph, two small networks, and a preset of one iteration for every part."""
    text = re.sub(r"(?m)^iterations = \[.*?\]", f"iterations = {[1] * 10}", preset_text("quick"))
    for old, new in {
        "iterations = 400": "iterations = 1", "batch = 4": "batch = 1", "crop = 128 ": "crop = 32 ",
        "reconstructions = 8": "reconstructions = 1", "samples = 8": "samples = 1",
        "discriminator_channels = 32": "discriminator_channels = 8", "checkpoint_every = 100": "checkpoint_every = 1",
    }.items():  # fmt: skip
        assert old in text
        text = text.replace(old, new)
    (machine.folder / "tiny.toml").write_text(text)
    (machine.folder / "vgg.toml").write_text(text.replace("perceptual = 0.0", "perceptual = 1.0"))
    machine.photo("photo.png", 288, 72)  # a panorama: training costs little at its height
    for name, channels in (("first", 8), ("second", 12)):
        torch.manual_seed(5)
        save_file(RRDBNet(channels=channels, blocks=1, growth=4).state_dict(), machine.folder / f"{name}.safetensors")
    return machine


@pytest.mark.parametrize(
    ("words", "code", "problem"),
    [
        ("--start nothing", 4, "nothing: no such weights; use realsr, x4plus, scratch"),
        ("--start first.safetensors --memory 10MB", 3, "an iteration takes about"),
        ("--start first.safetensors --vgg photo.png", 4, "photo.png: "),
    ],
    ids=["start", "memory", "vgg"],
)
def test_6_what_is_wrong_is_found_at_once(studio, words, code, problem):
    before = studio.names()
    command = TRAIN.replace("tiny", "vgg") if "--vgg" in words else TRAIN
    done = studio(f"{command} {words}", code)
    (line,) = [text for text in done.err.splitlines() if text.startswith("engine: ")]
    assert problem in line
    assert done.cpu < 30
    assert studio.names() == before


def test_16_a_forecast_comes_first_and_a_corrected_start_resumes(studio):
    """To the third scale: tests/training trains to the end."""
    first = studio(f"{TRAIN} --start first.safetensors", 130, interrupt="^scale 1 of")
    lines = first.err.splitlines()
    forecast = next(i for i, line in enumerate(lines) if line.startswith("forecast: step 1 about"))
    assert forecast < next(i for i, line in enumerate(lines) if line.startswith("scale "))
    assert " in all about " in lines[forecast]
    resumed = studio(f"{TRAIN} --start second.safetensors --resume", 130, interrupt="^scale 2 of")
    assert "scale 0 of" not in resumed.err
    assert re.search("(?m)^scale 2 of", resumed.err)
