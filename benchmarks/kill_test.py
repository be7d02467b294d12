"""Compare a render that was killed (kill -9) 20 times and resumed with an undisturbed one, byte for byte.

    python benchmarks/kill_test.py [--kills 20] [--seed 0] [--executor tiles|bands]

Renders once undisturbed. Then renders again with --resume and kills the process: twice during the start, twice during
the creation of the store, once after the last shard, once after the store is marked complete, and otherwise at random
numbers of shards spread over the image. A render that ends before its kill fails the test. Finally resumes to the end,
compares all files and appends a row to results/kill_test.csv.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from harness import add_row, small_model
from safetensors.torch import load_file, save_file

from engine.model.build import build

ENGINE = Path(sys.executable).parent / "engine"
OPTIONS = ("--size", "4096x2304", "--tile", "64", "--overlap", "8")
POLL = 0.0005


@dataclass(frozen=True)
class Moment:
    """Moment of a kill."""

    kind: str
    """``start``, ``making`` (the store), ``shards``, ``last`` (shard) or ``complete``."""

    value: float
    """Number of shards to wait for."""

    pause: float
    """Seconds between reaching that number and the kill."""


class Render:
    """``engine render --resume`` in its own process, and its files on disk so far."""

    def __init__(self, model: Path, store: Path, executor: str) -> None:
        self.store = store
        self.before = (self.entries, self.shards, self.complete)
        self.start = time.perf_counter()
        command = [ENGINE, "render", model, *OPTIONS, "--executor", executor, "--out", store, "--resume"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    @property
    def lived(self) -> float:
        return time.perf_counter() - self.start

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    @property
    def entries(self) -> list[str]:
        return sorted(p.name for p in self.store.parent.iterdir())

    @property
    def shards(self) -> int:
        return len([p for p in self.store.glob("0/c/0/*/*") if p.suffix == ""])

    @property
    def complete(self) -> bool:
        metadata = self.store / "zarr.json"
        return metadata.is_file() and '"complete": true' in metadata.read_text()

    def wait(self) -> None:
        _, errors = self.process.communicate()
        if self.process.returncode != 0:
            raise SystemExit(f"render failed with {self.process.returncode}: {errors.decode().strip()}")

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()
        if self.process.returncode != -9:
            raise SystemExit("the render ended before its kill, so nothing was tested; make the image larger")

    def reached(self, moment: Moment, starting: float, total: int) -> bool:
        """Whether the moment has come. Each run must make progress, or only starts would be killed."""
        entries, shards, complete = self.before
        match moment.kind:
            case "making" if self.store.name not in entries:
                return self.entries != entries
            case "shards" | "last" if shards < total:
                return self.shards >= min(total, max(moment.value, shards + 1))
            case "complete" if not complete:
                return self.complete
        return moment.kind == "start" or self.lived >= starting


def moments(kills: int, chance: random.Random, total: int) -> list[Moment]:
    """Moments in the order of a render; those of shards are drawn one from each equal part of the image."""
    first = [Moment("making", 0.0, chance.uniform(0, 0.02)) for _ in range(2)]
    first += [Moment("start", 0.0, chance.uniform(0.1, 2.0)) for _ in range(2)]
    last = [Moment("last", total, chance.uniform(0, 0.01)), Moment("complete", 0.0, 0.0)]
    count = max(0, kills - len(first) - len(last))
    middle = [
        Moment("shards", int(total * (k + chance.random()) / count), chance.uniform(0, 0.1)) for k in range(count)
    ]
    return [*first, *middle, *last][:kills]


def noisy_model(folder: Path) -> Path:
    """Small model whose output varies from pixel to pixel; equal bytes of a flat picture would prove little."""
    small_model(folder, 1)
    state = load_file(folder / "small.safetensors")
    state["conv_last.weight"] *= 8
    save_file(state, folder / "noisy.safetensors")
    model = build(folder / "structure.safetensors", [str(folder / "noisy.safetensors")] * 2, sigma=[0.2, 0.2])
    model.save(folder / "model.safetensors")
    return folder / "model.safetensors"


def undisturbed(model: Path, store: Path, executor: str) -> tuple[float, float]:
    """Render once; return the seconds until the first file, and until the end."""
    render = Render(model, store, executor)
    while render.running and not render.entries:
        time.sleep(POLL)
    starting = render.lived
    render.wait()
    return starting, render.lived


def kill_at(moment: Moment, model: Path, store: Path, executor: str, starting: float, total: int) -> str:
    """Start a render, kill it at the moment, and describe its files."""
    render = Render(model, store, executor)
    while render.running and not render.reached(moment, starting, total):
        time.sleep(POLL)
    end = time.perf_counter() + moment.pause
    while time.perf_counter() < end:
        pass
    lived = render.lived
    render.kill()
    unfinished = len(list(store.parent.rglob("*.partial")))
    others = ", ".join(name for name in render.entries if name != store.name)
    state = "complete" if render.complete else others
    return f"{moment.kind:9} {lived:6.2f} s  {render.before[1]:4} -> {render.shards:4}  {unfinished:10}  {state}"


def files(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def main(kills: int, seed: int, executor: str) -> None:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = name
        model = noisy_model(folder)
        # The first plan on a machine measures the networks; all killed starts should be alike.
        subprocess.run(
            [ENGINE, "plan", model, *OPTIONS, "--executor", executor],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        stores = [folder / k / "out.zarr" for k in "ab"]
        for store in stores:
            store.parent.mkdir()
        starting, whole = undisturbed(model, stores[0], executor)
        expected = files(stores[0].parent)
        total = len([name for name in expected if name.startswith("out.zarr/0/c/0/") and expected[name] is not None])
        size = sum(len(content) for content in expected.values() if content) / 1e6
        print(f"undisturbed: {whole:.1f} s, of which {starting:.1f} s to start; {total} shards, {size:.1f} MB")
        print("kill  moment      after   shards     partial files  beside the store")
        for number, moment in enumerate(moments(kills, random.Random(seed), total), 1):
            print(f"{number:4}  {kill_at(moment, model, stores[1], executor, starting, total)}", flush=True)
        Render(model, stores[1], executor).wait()
        resumed = files(stores[1].parent)
        different = sorted(name for name in resumed.keys() | expected.keys() if resumed.get(name) != expected.get(name))
        print(
            f"{len(expected)} files and folders: {f'{len(different)} differ, {different[:5]}' if different else 'all equal'}"
        )
    seconds = round(time.perf_counter() - start, 1)
    add_row(
        "kill_test", {"executor": executor, "kills": kills, "shards": total, "equal": not different, "seconds": seconds}
    )
    if different:
        raise SystemExit(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Kill a render (kill -9) at random moments, resume it and compare its bytes."
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--executor", choices=("tiles", "bands"), default="tiles")
    arguments = parser.parse_args()
    main(arguments.kills, arguments.seed, arguments.executor)
