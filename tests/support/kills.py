"""``kill -9`` at random moments: what is left is whole or unfinished, and the same command then ends as if undisturbed."""

import os
import random
import shutil
import signal
import time
from dataclasses import dataclass

import torch
from safetensors.torch import save_file

from engine.archs.esrgan import RRDBNet
from support.commands import finish, start
from support.damage import DAMAGE, flip
from support.faults import contents
from support.small import photograph
from support.stores import attributes
from support.training import tiny_preset

SIZE = "--size 512x384 --stages 2 --tile 8 --overlap 4 --precision fp32"
LARGE = "--size 2048x1536 --stages 2 --overlap 4 --precision fp32 --executor bands"
POLL = 0.01
START = 0.15
"""Share of the kills from the start of Python on, at any time; the others meet a forked command, as a rule after its first
change of a file."""
STARTING = 3.0
"""Seconds of the first kind."""


@dataclass(frozen=True)
class Case:
    """A command that is killed."""

    words: str
    """Command line in a working folder of links to the material; {model} is the model's path."""
    out: str
    """The output."""
    again: str = ""
    """Command after the last kill, in addition to the same one."""
    is_damaged: bool = False
    """Whether the output is a finished store, which is damaged before the command."""

    @property
    def ending(self):
        """Commands after the last kill."""
        return [words for words in (self.words, self.again) if words]


def _render(options):
    return f"render {{model}} {SIZE} {options} --resume"


CASES = {
    "render, bands": Case(_render("--executor bands --out o.zarr"), "o.zarr"),
    "render, tiles": Case(_render("--executor tiles --out o.zarr"), "o.zarr"),
    "render, batched": Case(_render("--executor batched --out o.zarr"), "o.zarr"),
    "render to a PNG": Case(_render("--executor bands --out o.png"), "o.png"),
    "export, TIFF": Case("export large.zarr o.tif --overwrite", "o.tif"),
    "export, PNG": Case("export large.zarr o.png --overwrite", "o.png"),
    "model build": Case("model build --sr large.safetensors --out o.safetensors --overwrite", "o.safetensors"),
    "check --repair": Case(
        "check o.zarr --repair", "o.zarr", _render("--executor bands --out o.zarr"), is_damaged=True
    ),
    "train": Case(
        "train sr photo.png --out w.safetensors --start start.safetensors --config tiny.toml --device cpu "
        "--precision fp32 --resume", "w.safetensors",
    ),
}  # fmt: skip


class Kills:
    """Killed commands, with what they read and what they end with when nobody kills them."""

    def __init__(self, folder, model_file, server):
        self.folder, self.model, self.server = folder, model_file, server
        self._undisturbed = {}
        material = folder / "material"
        material.mkdir(parents=True)
        torch.manual_seed(0)
        photograph(material / "photo.png", 120, 160)
        (material / "tiny.toml").write_text(tiny_preset(iterations=12, checkpoint_every=2))
        for name, channels, blocks in (("start", 8, 2), ("large", 64, 6)):
            save_file(RRDBNet(channels, blocks, channels // 2).state_dict(), material / f"{name}.safetensors")

    def attack(self, name, seeds):
        """Kill a command at random moments, several times for some seeds, and let it end.

        Yields:
            Seed, number of kills that met a running process, and what is wrong, or "".
        """
        case = CASES[name]
        expected, times = self._reference(name)
        for seed in seeds:
            folder = self._folder(f"{name}-{seed}")
            hits, problem = self._kill(case, seed, folder, expected, times)
            yield seed, hits, problem or self._end(case, folder, expected)
            shutil.rmtree(folder)

    def _end(self, case, folder, expected):
        """Let the command end; returns what is wrong, or ""."""
        for words in () if _is_finished(case, folder) else case.ending:
            code, error = self.server.start(folder, words.format(model=self.model)).finish()
            if code:
                return f"{words}: ended with {code}: {error[-500:]}"
        if contents(folder, case.out) != expected:
            return "the output differs from that of an undisturbed run"
        return _leftovers(folder)

    def _reference(self, name):
        """Output of an undisturbed run, and the seconds until its first change of a file and until its end."""
        if name not in self._undisturbed:
            case = CASES[name]
            if "large.zarr" in case.words and not (self.folder / "material" / "large.zarr").exists():
                self._run(f"render {{model}} {LARGE} --out large.zarr", self.folder / "material")
            folder = self._folder(f"{name}-undisturbed")
            if case.is_damaged:
                whole = self.folder / "material" / "whole"
                if not whole.exists():
                    whole.mkdir()
                    self._run(case.again, whole)
                expected = contents(whole, case.out)
                self._damage(folder, random.Random(0))
            for _ in range(2):  # the first one measures the machine
                shutil.rmtree(folder)
                folder = self._folder(f"{name}-undisturbed")
                if case.is_damaged:
                    self._damage(folder, random.Random(0))
                times = self._run(case.words, folder)
            if not case.is_damaged:
                expected = contents(folder, case.out)
            self._undisturbed[name] = expected, times
        return self._undisturbed[name]

    def _folder(self, name):
        """A working folder with links to the material."""
        folder = self.folder / name
        folder.mkdir()
        for path in (self.folder / "material").iterdir():
            (folder / path.name).symlink_to(path)
        return folder

    def _run(self, words, folder):
        begin, before = time.monotonic(), _state(folder)
        process = self.server.start(folder, words.format(model=self.model))
        while _state(folder) == before and process.poll() is None:
            time.sleep(POLL)
        first = time.monotonic() - begin
        code, error = process.finish()
        assert code == 0, error
        return first, time.monotonic() - begin

    def _damage(self, folder, rng):
        shutil.copytree(self.folder / "material" / "whole" / "o.zarr", folder / "o.zarr")
        shards = sorted(path for path in (folder / "o.zarr").rglob("c/*/*/*") if path.is_file())
        for shard in rng.sample(shards, 20):
            kind = rng.choice([*DAMAGE, "flipped"])
            if kind == "flipped":
                flip(shard, rng.randrange(8 * shard.stat().st_size))
            elif kind != "a link":  # 20 of them would need 20 names
                DAMAGE[kind](shard)

    def _kill(self, case, seed, folder, expected, times):
        """Kill the command up to three times; returns the number of hits and what is wrong, or ""."""
        rng = random.Random(seed)
        if case.is_damaged:
            self._damage(folder, rng)
        first, end = times
        hits = 0
        for _ in range(rng.randint(1, 3)):
            words = case.words.format(model=self.model)
            if rng.random() < START:
                process = start(folder, words)
                time.sleep(rng.uniform(0, STARTING))
                process.kill()
                code, error = finish(process)
            else:
                # What repairs removes files at its very end; most of its work is before its first change.
                waits = not case.is_damaged
                pause = rng.uniform(0, 0.8 * (end - first) if waits else end)
                code, error = self._kill_forked(words, folder, pause, waits=waits)
            if code not in (-9, 0):
                return hits, f"ended with {code}: {error[-500:]}"
            hits += code == -9
            if problem := _unfinished(case, folder, expected):
                return hits, problem
            if _is_finished(case, folder):
                break
        return hits, ""

    def _kill_forked(self, words, folder, pause, *, waits):
        """Kill a command after a pause, ``waits``: from its first change of a file on; returns exit code and errors."""
        before = _state(folder)
        process = self.server.start(folder, words)
        while waits and _state(folder) == before and process.poll() is None:
            time.sleep(POLL)
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        return process.finish()


def _state(folder):
    """What changes with every new, renamed or written file below the folder."""
    return [
        (root, os.stat(root).st_mtime_ns, len(names), [os.lstat(os.path.join(root, n)).st_size for n in files[:9]])
        for root, names, files in os.walk(folder)
        if os.path.exists(root)
    ]


def _is_finished(case, folder):
    """Whether the output, a single file, has its name: then the command is done, and refuses to run again."""
    return (folder / case.out).is_file()


def _unfinished(case, folder, expected):
    """What is wrong with the output right after a kill, or ""."""
    path = folder / case.out
    if path.is_dir():
        if (path / "zarr.json").exists() and attributes(path)["complete"] and not case.is_damaged:
            return "" if contents(folder, case.out) == expected else "complete, and wrong"
        return ""
    return "" if contents(folder, case.out) in (None, expected) else "a file under the final name that is not whole"


def _leftovers(folder):
    """Temporary files that are still there after the command has ended well, or ""."""
    names = [path.name for path in folder.iterdir() if path.name.endswith((".part", ".old", ".scratch"))]
    return f"left {names}" if names else ""
