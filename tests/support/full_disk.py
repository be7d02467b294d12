"""A full disk at every change of the files of a command: cases, and how each end is judged.

Each command runs once for each n, and its n-th change of a file below the working folder (a write, a rename, a new file or
folder, an fsync) fails with ENOSPC: that one alone, or all from there on, as on a disk that stays full. The failures are real
to Python, PyTorch, safetensors and libvips alike, as a library in front of the C library returns them (faults.c).
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from engine.archs.esrgan import RRDBNet
from engine.model.bundle import load
from engine.plan.request import Request
from support.small import photograph
from support.stores import attributes, files, render
from support.training import tiny_preset

SUPPORT = Path(__file__).parent
OPTIONS = "--size 64x48 --stages 2 --tile 8 --overlap 4 --precision fp32 --executor bands"
REQUEST = Request(size=(64, 48), stages=2, tile=8, overlap="4", precision="fp32", executor="bands")
TRAIN = (
    "train sr photo.png --out w.safetensors --config tiny.toml --start start.safetensors --device cpu --precision fp32"
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
    "upscale": Case("upscale pictures --model start.safetensors --precision fp32 --out large", "large",
                    "upscale pictures --model start.safetensors --precision fp32 --out large --resume", prepare="pictures"),
    "export-tif": Case("export out.zarr x.tif", "x.tif", prepare="store"),
    "export-png": Case("export out.zarr x.png", "x.png", prepare="store"),
    "export-over": Case("export out.zarr old.png --overwrite", "old.png", prepare="store"),
    "build": Case("model build --sr start.safetensors --out m.safetensors", "m.safetensors", prepare="start"),
    "build-over": Case("model build --sr start.safetensors --out old.safetensors --overwrite", "old.safetensors", prepare="start"),
    "train": Case(TRAIN, "w.safetensors", f"{TRAIN} --resume", prepare="training"),
}  # fmt: skip


def is_possible():
    """Whether this machine can build and load the library."""
    return sys.platform == "linux" and shutil.which("cc") is not None


def build_shim(folder):
    """Build the library that fails changes of files; returns its path."""
    path = folder / "faults.so"
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", path, SUPPORT / "faults.c", "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return path


def _start(folder, model):
    save_file(RRDBNet(channels=8, blocks=1, growth=4).state_dict(), folder / "start.safetensors")
    (folder / "old.safetensors").write_bytes(b"old")


def _store(folder, model):
    render(load(model), REQUEST, folder / "out.zarr")
    Image.new("RGB", (8, 8)).save(folder / "old.png")


def _pictures(folder, model):
    _start(folder, model)
    (folder / "pictures").mkdir()
    for name, width in (("a.png", 16), ("b.jpg", 24)):
        photograph(folder / "pictures" / name, 12, width)


def _training(folder, model):
    _start(folder, model)
    photograph(folder / "photo.png", 96, 128)
    (folder / "tiny.toml").write_text(tiny_preset())


PREPARE = {
    "nothing": lambda folder, model: None,
    "part": lambda folder, model: render(load(model), REQUEST, folder / "out.zarr", writes=1),
    "store": _store,
    "start": _start,
    "pictures": _pictures,
    "training": _training,
}
"""Steps that fill the working folder."""


def every(first=1):
    """Numbers of all changes."""
    return count(first)


def some():
    """Numbers of changes with growing gaps."""
    number = 1
    while True:
        yield number
        number += max(1, number // 5)


def attack(case, model, shim, folder, numbers, *, is_lasting):
    """Run a case once for each number, until it is past the last change.

    Yields:
        Number, whether its fault made the command fail, and the number of changes in that run. A run whose end is wrong
        raises AssertionError.
    """
    template = folder / "template"
    template.mkdir(parents=True)
    PREPARE[case.prepare](template, model)
    before = contents(template, case.out)
    results = _runs(case, model, shim, folder, numbers, is_lasting=is_lasting)
    undisturbed = next(results)
    assert undisturbed["code"] == 0, undisturbed
    expected = contents(folder / "0" / "files", case.out)
    assert expected not in (None, before)
    for result in results:
        work = folder / str(result["number"])
        if result["code"]:
            _check_failure(case, result, work / "failed", before, expected)
            assert result["again"] == 0, (result["number"], result["again_err"])
        assert contents(work / "files", case.out) == expected, result["number"]
        shutil.rmtree(work)
        yield result["number"], bool(result["code"]), result["count"]
    assert result["code"] == 0, "the last run must be long enough to see no fault"


def _runs(case, model, shim, folder, numbers, *, is_lasting):
    """Results of all runs: the undisturbed one first."""
    spec = {
        "words": case.words.format(model=model).split(),
        "again": (case.again or case.words).format(model=model).split(),
        "folder": str(folder),
        "is_lasting": is_lasting,
    }
    environment = {**os.environ, "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SUPPORT.parents[1])}
    command = [sys.executable, SUPPORT / "faults.py", json.dumps(spec)]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        for number in chain([0], numbers):
            server.stdin.write(f"{number}\n")
            server.stdin.flush()
            result = json.loads(server.stdout.readline() or "null")
            assert result, "the server has ended"
            yield result
            if number > result["count"]:
                break
        server.stdin.close()


def contents(folder, name):
    """What matters of an output: all of a file or a picture, all pixels of a store, and the tensors of a training."""
    path = folder / name
    if not path.exists():
        return None
    if name == "w.safetensors":
        return {key: value.numpy().tobytes() for key, value in load_file(path).items()}
    return files(path) if path.is_dir() else path.read_bytes()


def _check_failure(case, result, failed, before, expected):
    """The state after a failure: one line, and an output that is whole, as before, or not there."""
    number, lines = result["number"], result["err"].splitlines()
    assert result["code"] == 1, (number, result)
    assert "Traceback" not in result["err"], (number, result["err"])
    (error,) = [line for line in lines if line.startswith("engine: ")]
    assert "No space left on device" in error, (number, error)
    assert case.out.partition(".")[0] in error or "r.json" in error, (number, error)
    left = contents(failed, case.out)
    if case.prepare == "pictures":
        whole = {name: data for name, data in (left or {}).items() if ".work.zarr" not in str(name)}
        assert whole.items() <= expected.items(), number
    elif isinstance(before, dict) or (failed / case.out).is_dir():
        complete = (failed / case.out).is_dir() and attributes(failed / case.out)["complete"]
        assert not complete or left == expected, number
    else:
        assert left in (before, expected), number
    names = [path.name for path in failed.rglob("*")]
    assert not [name for name in names if name.endswith(".part")], (number, names)
    if case.prepare == "training" and (saved := failed / "w.safetensors.checkpoint").exists():
        assert torch.load(saved, weights_only=True)["format"] == 1, number  # the last good one is whole
