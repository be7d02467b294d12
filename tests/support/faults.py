"""Errors of the system at every call of a command: kinds of calls, cases, and how each end is judged.

Each command runs once for each n, and its n-th call of a kind fails: that one alone, or all from there on, as on a disk that
stays full. The failures are real to Python, NumPy, PyTorch, safetensors, Zarr and libvips alike, as a library in front of the
C library returns them (faults.c).
"""

import errno
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from engine.archs.esrgan import RRDBNet
from engine.model.bundle import load
from engine.plan.request import Request
from support.damage import flip
from support.small import photograph
from support.stores import attributes, files, pixels, render
from support.training import tiny_preset

SIZES = "--size 64x48 --stages 2 --tile 8 --overlap 4 --precision fp32"
OPTIONS = f"{SIZES} --executor bands"
REQUEST = Request(size=(64, 48), stages=2, tile=8, overlap="4", precision="fp32", executor="bands")
TRAIN = (
    "train sr photo.png --out w.safetensors --config tiny.toml --start start.safetensors --device cpu --precision fp32"
)
UPSCALE = "upscale pictures --model start.safetensors --precision fp32 --out large"
CACHE = "cache"
"""Folder of the engine's cache in the working folder."""


LARGE = (16 << 10) + 1
"""Bytes of a large allocation. A thread of Python starts with 16 KiB; where it lacks them, its starter waits for it without
end (CPython 3.11)."""


@dataclass(frozen=True)
class Kind:
    """Calls that fail, and the words for it."""

    call: str
    """Kind of call in faults.c."""
    error: int
    """Error of the system."""
    words: tuple[str, ...]
    """Texts, one of which the message has."""
    least: int = 0
    """Least bytes of an allocation."""
    codes: tuple[int, ...] = (1,)
    """Exit codes of a command that fails; all but 1 are of a library that ends the process, negative: by a signal."""


KINDS = {
    "disk": Kind("change", errno.ENOSPC, ("No space left on device",)),
    "opens": Kind("open", errno.EIO, ("Input/output error",)),
    # safetensors and libvips hide the number of an error, which then is EIO.
    "descriptors": Kind("open", errno.EMFILE, ("Too many open files", "Input/output error")),
    "reads": Kind("read", errno.EIO, ("Input/output error",)),
    # GLib, below libvips, and Rust call abort(), oneDNN runs kernels that it could not make, and the
    # loader ends the process where it lacks memory of a thread: none of this can Python prevent.
    "allocations": Kind("allocation", errno.ENOMEM, ("out of memory",), LARGE, (1, -6, -11, 127)),
}


@dataclass(frozen=True)
class Case:
    """A command, and how its end is judged."""

    words: str
    """Command line in a folder with model.safetensors."""
    out: str
    """The output."""
    again: str = ""
    """Option of the command that finishes the work after a failure."""
    prepare: str = "nothing"
    """Name of the step that fills the working folder."""


CASES = {
    "render": Case(f"render model.safetensors --out out.zarr {OPTIONS} --report r.json", "out.zarr", "--resume"),
    "resume": Case(f"render model.safetensors --out out.zarr {SIZES} --executor tiles --resume", "out.zarr", prepare="part"),
    "picture": Case(f"render model.safetensors --out out.png {OPTIONS} --report r.json", "out.png", "--resume"),
    "upscale": Case(UPSCALE, "large", "--resume", prepare="pictures"),
    "export-tif": Case("export out.zarr x.tif", "x.tif", prepare="store"),
    "export-png": Case("export out.zarr x.png", "x.png", prepare="store"),
    "export-over": Case("export out.zarr old.png --overwrite", "old.png", prepare="store"),
    "check": Case("check out.zarr --repair", "out.zarr", prepare="store"),
    "repair": Case("check out.zarr --repair", "out.zarr", prepare="damaged"),
    "build": Case("model build --sr start.safetensors --out m.safetensors", "m.safetensors", prepare="start"),
    "build-over": Case("model build --sr start.safetensors --out old.safetensors --overwrite", "old.safetensors", prepare="start"),
    "train": Case(TRAIN, "w.safetensors", "--resume", prepare="training"),
}  # fmt: skip


def is_possible():
    """Whether this machine can build and load the library."""
    return sys.platform == "linux" and shutil.which("cc") is not None


def build_shim(folder):
    """Build the library that fails calls; returns its path."""
    path = folder / "faults.so"
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", path, Path(__file__).with_suffix(".c"), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return path


def _part(folder):
    render(load(folder / "model.safetensors"), replace(REQUEST, executor="tiles"), folder / "out.zarr", writes=1)


def _store(folder):
    render(load(folder / "model.safetensors"), REQUEST, folder / "out.zarr")
    Image.new("RGB", (8, 8)).save(folder / "old.png")


def _damaged(folder):
    _store(folder)
    flip(folder / "out.zarr" / "0" / "c" / "0" / "0" / "1", 99)


def _start(folder):
    save_file(RRDBNet(channels=8, blocks=1, growth=4).state_dict(), folder / "start.safetensors")
    (folder / "old.safetensors").write_bytes(b"old")


def _pictures(folder):
    _start(folder)
    (folder / "pictures").mkdir()
    for name, width in (("a.png", 16), ("b.jpg", 24)):
        photograph(folder / "pictures" / name, 12, width)


def _training(folder):
    _start(folder)
    photograph(folder / "photo.png", 48, 64)
    # Two iterations make a checkpoint of the start and one that replaces it.
    (folder / "tiny.toml").write_text(tiny_preset(iterations=2, crop=16, batch=1, discriminator_channels=8))


PREPARE = {
    "nothing": lambda folder: None,
    "part": _part,
    "store": _store,
    "damaged": _damaged,
    "start": _start,
    "pictures": _pictures,
    "training": _training,
}
"""Steps that fill the working folder."""


def numbers(first=1, gap=0.0):
    """Numbers of all calls, or with gaps that grow with the number, by the share ``gap`` of it."""
    while True:
        yield first
        first += max(1, int(first * gap))


class Attack:
    """Runs of a case in forked processes, each with another call that fails."""

    def __init__(self, case, kind, model, server, folder, *, is_lasting):
        self._case, self._kind, self._server, self._folder, self._is_lasting = case, kind, server, folder, is_lasting
        template = folder / "template"
        template.mkdir(parents=True)
        shutil.copy(model, template / "model.safetensors")
        PREPARE[case.prepare](template)
        self._before = contents(template, case.out)

    def run(self, numbers):
        """Run the case once for each number, until it is past the last call.

        Yields:
            Number, exit code, and the number of calls in that run.

        Raises:
            AssertionError: the end of a run is wrong.
            RuntimeError: the command fails without a fault.
        """
        case, template = self._case, self._folder / "template"
        work, code, err, _ = self._start(0)
        if code:
            raise RuntimeError(f"{case.words}: ended with {code} without a fault: {err}")
        self._expected = contents(work, case.out, exact=self._is_exact)
        assert self._expected is not None
        given, left = files(template), files(work)
        self._kept = {name: data for name, data in given.items() if data is not None and left.get(name) == data}
        self._kept = {name: data for name, data in self._kept.items() if not name.startswith(CACHE)}
        if (work / CACHE).exists():  # later runs need not measure
            shutil.copytree(work / CACHE, template / CACHE, dirs_exist_ok=True)
        shutil.rmtree(work)
        start = files(template)
        for number in chain(numbers):
            work, code, err, calls = self._start(number)
            self._check_kept(work, number)
            assert "damaged" not in err or case.prepare == "damaged", (number, err)
            if code:
                self._check_failure(work, number, code, err)
            if not code or files(work) != start:  # from the same files it would end as without a fault
                self._check_end(work, number, code, err)
            shutil.rmtree(work)
            yield number, code, calls
            if number > calls:
                assert code == 0, (number, err)
                return

    @property
    def _is_exact(self):
        # Blosc stores a chunk uncompressed where it finds no memory.
        return self._kind.call != "allocation" or self._case.prepare == "damaged"

    def _start(self, number):
        """Run the case in a copy of the working folder; returns it, exit code, stderr and the number of calls."""
        work = self._folder / str(number)
        shutil.copytree(self._folder / "template", work, symlinks=True)
        return work, *self._command(self._case.words, work, number)

    def _command(self, words, work, number=0):
        kind = self._kind
        fault = {"kind": kind.call, "error": kind.error, "least": kind.least, "number": number}
        process = self._server.start(
            work, words, fault={**fault, "is_lasting": self._is_lasting, "cache": str(work / CACHE)}
        )
        code, err = process.finish()
        return code, err, process.calls

    def _check_end(self, work, number, code, err):
        """The end, as if undisturbed, of a run or of the command that goes on after it."""
        case = self._case
        if code:
            again, again_err, _ = self._command(f"{case.words} {case.again}", work)
            assert again == 0, (number, err, again_err)
            self._check_kept(work, number)
        if (match := re.search(r"warning: (\S+): .* this store cannot be removed", err)) is not None:
            shutil.rmtree(work / match[1], ignore_errors=True)  # later commands remove it
        assert contents(work, case.out, exact=self._is_exact) == self._expected, (number, err)
        names = [path.name for path in work.rglob("*.part") if path.name not in err]
        assert not names, (number, names)

    def _check_kept(self, work, number):
        """Files that an undisturbed run leaves as they are."""
        left = files(work)
        lost = [name for name, data in self._kept.items() if left.get(name) != data]
        assert not lost, (number, lost)

    def _check_failure(self, work, number, code, err):
        """The state after a failure: one line, and an output that is whole, as before, or not there."""
        case, kind = self._case, self._kind
        assert code in kind.codes, (number, code, err)
        left = contents(work, case.out, exact=self._is_exact)
        if case.prepare == "pictures":
            done = {name: data for name, data in (left or {}).items() if ".work.zarr" not in name}
            assert done.items() <= self._expected.items(), number
        elif (work / case.out).is_dir():
            is_complete = attributes(work / case.out)["complete"]
            assert not is_complete or left in (self._before, self._expected), number
        else:
            assert left in (self._before, self._expected), number
        if (saved := work / "w.safetensors.checkpoint").exists():
            assert torch.load(saved, weights_only=True)["format"] == 1, number  # the last good one is whole
        if code != 1:
            return
        assert "Traceback" not in err, (number, err)
        (error,) = [line for line in err.splitlines() if line.startswith("engine: ")]
        if "; --resume tries these again" in error:  # the lines before it say why
            error = err
        assert any(words in error for words in kind.words), (number, error)
        if kind.call == "allocation":
            return
        given = [word for word in case.words.split() if "." in word]
        names = [*given, *(path.name for path in work.rglob("*")), "engine: .: "]
        assert any(name in error for name in names), (number, error)
        if kind.call == "change" or not self._is_lasting:  # a folder that cannot be opened cannot be emptied
            names = [path.name for path in work.rglob("*.part")]
            assert not names, (number, names)


def contents(folder, name, *, exact=True):
    """What matters of an output: all of a file, a picture or a folder of them, a store, and the tensors of a training.

    ``exact``: the bytes of a store's shards, not its pixels.
    """
    path = folder / name
    if not path.exists():
        return None
    if name == "w.safetensors":
        return {key: value.numpy().tobytes() for key, value in load_file(path).items()}
    if not path.is_dir():
        return path.read_bytes()
    stored = files(path)
    if "zarr.json" not in stored:
        return stored
    root = json.loads(stored.pop("zarr.json"))
    root["attributes"]["ourgan"].pop("id", None)  # random while it is unfinished
    if exact:
        return root, stored
    return root, sorted(stored), [pixels(path, int(level.name)).tobytes() for level in sorted(path.glob("[0-9]"))]
