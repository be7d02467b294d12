"""A full disk at every change of the files: one line, no half-written file, and the same command then ends as if undisturbed.

Each command runs once for each n, and its n-th change of a file below the working folder (a write, a rename, a new file or
folder, an fsync) fails with ENOSPC: that one alone, or all from there on, as on a disk that stays full. The failures are real
to Python, PyTorch, safetensors and libvips alike, as a library in front of the C library returns them (support/faults.c).
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.stores import attributes, files, render
from support.training import tiny_preset

from engine.archs.esrgan import RRDBNet
from engine.model.bundle import load
from engine.plan.request import Request

SUPPORT = Path(__file__).parent / "support"
OPTIONS = "--size 64x48 --stages 2 --tile 8 --overlap 4 --precision fp32 --executor bands"
REQUEST = Request(size=(64, 48), stages=2, tile=8, overlap="4", precision="fp32", executor="bands")
TRAIN = (
    "train sr photo.png --out w.safetensors --config tiny.toml --start start.safetensors --device cpu --precision fp32"
)

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("cc"), reason="needs Linux and a C compiler"
)


@dataclass(frozen=True)
class Case:
    """A command, and how its end is judged."""

    words: str
    """Command line; {model} is the model's path."""
    out: str
    """The output."""
    again: str = ""
    """Command that finishes the work after a failure; by default the same one."""
    prepare: str = "nothing"
    """Name of the fixture's step that fills the working folder."""


CASES = {
    "render": Case(f"render {{model}} --out out.zarr {OPTIONS} --report r.json", "out.zarr",
                   f"render {{model}} --out out.zarr {OPTIONS} --report r.json --resume"),
    "resume": Case(f"render {{model}} --out out.zarr {OPTIONS} --resume", "out.zarr", prepare="part"),
    "picture": Case(f"render {{model}} --out out.png {OPTIONS}", "out.png",
                    f"render {{model}} --out out.png {OPTIONS} --resume"),
    "export-tif": Case("export out.zarr x.tif", "x.tif", prepare="store"),
    "export-png": Case("export out.zarr x.png", "x.png", prepare="store"),
    "export-over": Case("export out.zarr old.png --overwrite", "old.png", prepare="store"),
    "build": Case("model build --sr start.safetensors --out m.safetensors", "m.safetensors", prepare="start"),
    "build-over": Case("model build --sr start.safetensors --out old.safetensors --overwrite", "old.safetensors", prepare="start"),
    "train": Case(TRAIN, "w.safetensors", f"{TRAIN} --resume", prepare="training"),
}  # fmt: skip


@pytest.fixture(scope="session")
def shim(tmp_path_factory):
    """The library that fails changes of files."""
    path = tmp_path_factory.mktemp("shim") / "faults.so"
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", path, SUPPORT / "faults.c", "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return path


@pytest.fixture
def prepare(tmp_path, model_file, picture):
    """Function that fills a working folder for a case and returns it."""

    def start(folder):
        save_file(RRDBNet(channels=8, blocks=1, growth=4).state_dict(), folder / "start.safetensors")
        (folder / "old.safetensors").write_bytes(b"old")

    def store(folder):
        render(load(model_file), REQUEST, folder / "out.zarr")
        Image.new("RGB", (8, 8)).save(folder / "old.png")

    def training(folder):
        start(folder)
        pixels = picture(96, 128).mul(255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / "photo.png")
        (folder / "tiny.toml").write_text(tiny_preset())

    steps = {
        "nothing": lambda folder: None,
        "part": lambda folder: render(load(model_file), REQUEST, folder / "out.zarr", writes=1),
        "store": store,
        "start": start,
        "training": training,
    }

    def fill(name):
        folder = tmp_path / "template"
        folder.mkdir()
        steps[name](folder)
        return folder

    return fill


def runs(shim, case, template, work, model, *, is_lasting, is_thorough):
    """Results of all runs: the undisturbed one first."""
    spec = {
        "words": case.words.format(model=model).split(),
        "again": (case.again or case.words).format(model=model).split(),
        "template": str(template),
        "work": str(work),
        "is_lasting": is_lasting,
        "is_thorough": is_thorough,
    }
    environment = {
        **os.environ, "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SUPPORT.parent.parent),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, SUPPORT / "faults.py", json.dumps(spec)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def contents(folder, name):
    """What matters of an output: all of a file or a picture, all pixels of a store, and the tensors of a training."""
    path = folder / name
    if not path.exists():
        return None
    if name == "w.safetensors":
        return {key: value.numpy().tobytes() for key, value in load_file(path).items()}
    return files(path) if path.is_dir() else path.read_bytes()


def check_failure(case, result, failed, before, expected):
    """The state after a failure: one line, and an output that is whole, as before, or not there."""
    number, lines = result["number"], result["err"].splitlines()
    assert result["code"] == 1, (number, result)
    assert "Traceback" not in result["err"], (number, result["err"])
    (error,) = [line for line in lines if line.startswith("engine: ")]
    assert "No space left on device" in error, (number, error)
    assert case.out.partition(".")[0] in error or "r.json" in error, (number, error)
    left = contents(failed, case.out)
    if isinstance(before, dict) or (failed / case.out).is_dir():
        complete = (failed / case.out).is_dir() and attributes(failed / case.out)["complete"]
        assert not complete or left == expected, number
    else:
        assert left in (before, expected), number
    names = [path.name for path in failed.rglob("*")]
    assert not [name for name in names if name.endswith(".part")], (number, names)
    if case.prepare == "training" and (saved := failed / "w.safetensors.checkpoint").exists():
        assert torch.load(saved, weights_only=True)["format"] == 1, number  # the last good one is whole


def check(shim, name, prepare, tmp_path, model, *, is_lasting, is_thorough):
    case = CASES[name]
    template = prepare(case.prepare)
    before = contents(template, case.out)
    undisturbed, *disturbed = runs(
        shim, case, template, tmp_path, model, is_lasting=is_lasting, is_thorough=is_thorough
    )
    assert undisturbed["code"] == 0, undisturbed
    expected = contents(tmp_path / "0" / "files", case.out)
    assert expected not in (None, before)
    failures = 0
    for result in disturbed:
        folder = tmp_path / str(result["number"])
        if result["code"]:
            failures += 1
            check_failure(case, result, folder / "failed", before, expected)
            assert result["again"] == 0, (result["number"], result["again_err"])
        assert contents(folder / "files", case.out) == expected, result["number"]
    assert failures >= 2
    assert disturbed[-1]["code"] == 0  # the last run was long enough to see no fault


@pytest.mark.parametrize(
    ("name", "is_lasting"), [("render", False), ("picture", True), ("export-png", True), ("build-over", True)]
)
def test_full_disk(shim, name, prepare, tmp_path, model_file, is_lasting):
    check(shim, name, prepare, tmp_path, model_file, is_lasting=is_lasting, is_thorough=False)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_full_disk_in_training(shim, prepare, tmp_path, model_file):
    """A longer run for each change, so with growing gaps between them."""
    check(shim, "train", prepare, tmp_path, model_file, is_lasting=True, is_thorough=False)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("is_lasting", [False, True], ids=["once", "full"])
@pytest.mark.parametrize("name", [name for name in CASES if name != "train"])
def test_full_disk_at_every_change(shim, name, prepare, tmp_path, model_file, is_lasting):
    check(shim, name, prepare, tmp_path, model_file, is_lasting=is_lasting, is_thorough=True)
