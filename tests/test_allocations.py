"""Memory that ends at every large allocation: one line, no half-written file, and the same command then ends as if undisturbed.

Each command runs once for each n, and its n-th allocation of 64 KiB or more fails: that one alone, or all from there on. The
failures are real to Python, NumPy, PyTorch, Zarr and libvips alike (support/faults.c).
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.stores import attributes, files, pixels, render
from support.training import tiny_preset

from engine.archs.esrgan import RRDBNet
from engine.model.bundle import load
from engine.plan.request import Request

SUPPORT = Path(__file__).parent / "support"
LARGE = 64 << 10
LEVELS = 3
OPTIONS = "--size 192x144 --stages 2 --tile 16 --overlap 4 --precision fp32 --executor"
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
    """Option of the command that finishes the work."""


CASES = {
    "render": Case(f"render {{model}} --out o.zarr {OPTIONS} bands", "o.zarr", "--resume"),
    "resume": Case(f"render {{model}} --out begun.zarr {OPTIONS} tiles --resume", "begun.zarr"),
    "picture": Case(f"render {{model}} --out o.png {OPTIONS} bands", "o.png", "--resume"),
    "tif": Case("export s.zarr x.tif", "x.tif"),
    "png": Case("export s.zarr x.png", "x.png"),
    "check": Case("check s.zarr --repair", "s.zarr"),
    "build": Case("model build --sr start.safetensors --out m.safetensors", "m.safetensors"),
    "train": Case(TRAIN, "w.safetensors", "--resume"),
}  # fmt: skip

ABORTS = (-6,)
"""Ends by a signal that Python cannot prevent: GLib, below libvips, and Rust call abort()."""


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    """The library that fails allocations."""
    path = tmp_path_factory.mktemp("shim") / "faults.so"
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", path, SUPPORT / "faults.c", "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return path


@pytest.fixture(scope="module")
def template(tmp_path_factory, model_file):
    """Folder with the inputs of all cases."""
    folder = tmp_path_factory.mktemp("allocations") / "template"
    folder.mkdir()
    request = Request(size=(192, 144), stages=2, tile=16, overlap="4", precision="fp32")
    model = load(model_file)
    render(model, replace(request, executor="bands"), folder / "s.zarr")
    render(model, replace(request, executor="tiles"), folder / "begun.zarr", writes=1)
    save_file(RRDBNet(channels=8, blocks=1, growth=4).state_dict(), folder / "start.safetensors")
    noise = torch.randint(0, 256, (96, 128, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(noise.numpy()).save(folder / "photo.png")
    (folder / "tiny.toml").write_text(tiny_preset())
    return folder


def runs(shim, case, template, work, model, *, step, is_lasting):
    """Results of all runs, the undisturbed one first."""
    words = case.words.format(model=model)
    spec = {
        "words": words.split(),
        "again": f"{words} {case.again}".split(),
        "template": str(template),
        "work": str(work),
        "bytes": LARGE,
        "step": step,
        "is_lasting": is_lasting,
    }
    environment = {
        **os.environ, "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SUPPORT.parent.parent),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, SUPPORT / "allocations.py", json.dumps(spec)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def contents(path):
    """What matters of an output: all of a file, the pixels of a store, and the tensors of a training."""
    if not path.exists():
        return None
    if path.name == "w.safetensors":
        return {key: value.numpy().tobytes() for key, value in load_file(path).items()}
    if path.is_dir():  # pixels, as Blosc stores a chunk uncompressed where it finds no memory
        return sorted(files(path)), attributes(path), [pixels(path, level).tobytes() for level in range(LEVELS)]
    return path.read_bytes()


def check_failure(case, result, failed, expected):
    """The state after a failure: one line, and no output that looks finished and is not."""
    number, lines = result["number"], result["err"].splitlines()
    assert result["code"] in (1, *ABORTS), result
    if result["code"] == 1:
        assert "Traceback" not in result["err"], result
        (error,) = [line for line in lines if line.startswith("engine: ")]
        assert "out of memory" in error or "libvips could not write it" in error, result  # libpng names no cause
    out = failed / case.out
    if out.is_dir():
        assert not attributes(out)["complete"] or contents(out) == expected, number
    else:
        assert contents(out) in (None, expected), number
    if result["code"] == 1:
        assert not [path.name for path in failed.rglob("*.part")], number
    if (saved := failed / "w.safetensors.checkpoint").exists():
        assert torch.load(saved, weights_only=True)["format"] == 1, number


def check(shim, name, template, work, model, *, step, is_lasting=False):
    case = CASES[name]
    undisturbed, *disturbed = runs(shim, case, template, work, model, step=step, is_lasting=is_lasting)
    assert undisturbed["code"] == 0, undisturbed
    expected = contents(work / "0" / "files" / case.out)
    assert expected is not None
    failures = 0
    for result in disturbed:
        folder = work / str(result["number"])
        if result["code"]:
            failures += 1
            check_failure(case, result, folder / "failed", expected)
            assert result["again"] == 0, result
        assert contents(folder / "files" / case.out) == expected, result
    assert failures


@pytest.mark.parametrize(
    "name", [name if name == "check" else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_some_large_allocations_fail(shim, name, template, tmp_path, model_file):
    check(shim, name, template, tmp_path, model_file, step=2)


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("is_lasting", [False, True], ids=["once", "from there on"])
@pytest.mark.parametrize("name", CASES)
def test_every_large_allocation_fails(shim, name, template, tmp_path, model_file, is_lasting):
    check(shim, name, template, tmp_path, model_file, step=0.02 if name == "train" else 0, is_lasting=is_lasting)
