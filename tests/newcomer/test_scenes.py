"""Defects of rendering the model that comes with the engine, and the README typed as it stands, from an installed wheel.

Defect 15, the time left: a render of seconds prints one line or none, so tests/cli/test_progress.py tests the estimate alone.
"""

import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from support.wheel import ROOT

README = (ROOT / "README.md").read_text()

pytestmark = pytest.mark.slow


def section(title):
    """Text of a section of the README."""
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def reduced(picture):
    """A picture as grey values of 64x48."""
    grey = Image.fromarray(picture.astype(np.uint8)).convert("L")
    return np.asarray(grey.resize((64, 48), Image.Resampling.BOX)).astype(float).ravel()


def test_7_one_seed_is_one_scene_at_every_size(machine):
    sizes = ("320x240", "640x480", "1024x768")
    for size in sizes:
        done = machine(f"engine render --size {size} --seed 7 --out {size}.png")
        assert done.out.splitlines()[-1] == f"look at it: {size}.png"
    scenes = [reduced(machine.pixels(f"{size}.png")) for size in sizes]
    assert np.corrcoef(scenes).min() > 0.95
    machine("engine render --size 320x240 --seed 8 --out other.png")
    assert np.corrcoef(scenes[0], reduced(machine.pixels("other.png")))[0, 1] < 0.95


def test_7_a_contact_sheet_shows_seeds(machine):
    machine("engine render --preview 3 --out sheet.png")
    height, width, _ = machine.pixels("sheet.png").shape
    assert width > 256
    assert machine.names() == ["sheet.png"]


def test_8_the_snippet_of_python(machine):
    """At a smaller size, with the model that comes with the engine."""
    snippet = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    for old, new in (('"model.safetensors"', '"DEFAULT"'), ("4096x3072", "320x240"), ("512, 256", "256, 128")):
        assert old in snippet
        snippet = snippet.replace(old, new)
    model = "from engine.model.bundle import DEFAULT\n"
    (machine.folder / "snippet.py").write_text(
        model + snippet.replace('"DEFAULT"', "DEFAULT") + "print(corner.shape)\n"
    )
    done = machine("python snippet.py")
    assert done.out.splitlines()[-2:] == ["(320, 240)", "(128, 256, 3)"]
    assert machine.pixels("out.png").shape == (240, 320, 3)


def test_13_the_last_line_says_how_to_look(machine):
    lines = machine("engine render --size 320x240 --out a.zarr").out.splitlines()
    start, command = lines[-1].split(": ", 1)
    assert start == "look at it"
    machine(command)
    assert machine.names() == ["a.jpg", "a.zarr"]
    told = machine("engine info a.zarr").out
    assert "320x240" in told
    assert "seed" in told


def test_14_theory_of_the_shipped_model(machine):
    (model,) = (machine.venv / "lib").rglob("picosdeeuropa.safetensors")
    assert "parameters" in machine(f"engine plan {model} --theory").out


def test_17_a_region_equals_the_crop_to_rounding(machine):
    machine("engine render --size 320x240 --seed 7 --out whole.png")
    machine("engine render --size 320x240 --seed 7 --roi 100,80,64,48 --out part.png")
    crop = machine.pixels("whole.png")[80:128, 100:164]
    assert np.abs(crop - machine.pixels("part.png")).max() <= 1


def quick_start(machine):
    """Type the lines of the quick start; 4096x3072 is rendered in 1024x768, which has its shape, and 3 seeds of 20.

    ``engine view`` serves until Ctrl-C, so it has tests of its own.
    """
    lines = re.findall(r"(?m)^    \$ (engine (?!view ).*?)(?: +#.*)?$", section("Quick start"))
    assert len(lines) >= 3
    for line in lines:
        assert machine(line.replace("4096x3072", "1024x768").replace("--preview 20", "--preview 3")).out


def test_the_quick_start_on_a_new_machine(new_machine):
    quick_start(new_machine)
    assert {"peaks.png", "peaks.tif", "peaks.zarr"} <= set(new_machine.names())


@pytest.mark.long
def test_the_quick_start_beside_a_busy_process(machine):
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            quick_start(machine)
        finally:
            busy.kill()
