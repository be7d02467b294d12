"""kill -9 at random moments: weights of a killed and resumed training are compared with those of an undisturbed one.

    python benchmarks/kill_training.py PHOTO --vgg FILE [--start FILE] [--structure FILE] [--iterations 40] [--kills 3]

Fine-tunes step 2 by the preset quick-vgg with a checkpoint every 10 iterations: once undisturbed, and once with --resume,
killed at a random iteration in each of as many equal parts of the run as there are kills. Compares every tensor and appends
a row to results/kill_training.csv.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import add_row
from safetensors.torch import load_file

from engine.training.preset import preset_text, read_file, read_preset

ENGINE = Path(sys.executable).parent / "engine"
EVERY = 10
POLL = 0.02
SPREAD = 6.0
"""Largest delay of a kill after an iteration in the log, which has every tenth one; seconds."""


class Training:
    """A process of ``engine train sr --resume``, followed by its log."""

    def __init__(self, words, out):
        self._log = out.with_name(out.name + ".log.jsonl")
        command = [ENGINE, "train", "sr", *words, "--out", out, "--device", "cpu", "--resume"]
        self.process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def iteration(self):
        """Last iteration in the log; -1 before the first checkpoint."""
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        events = [json.loads(line) for line in lines if line.endswith("}")]
        return max((event["iteration"] for event in events if "iteration" in event), default=-1)

    def kill_after(self, iteration, seconds):
        while self.iteration() < iteration:
            if self.process.poll() is not None:
                raise SystemExit(f"the run ended before its kill: {self.process.stderr.read().decode()[-500:]}")
            time.sleep(POLL)
        time.sleep(seconds)
        self.process.kill()
        self.process.communicate()
        return self.iteration()

    def end(self):
        _, errors = self.process.communicate()
        if self.process.returncode:
            raise SystemExit(errors.decode()[-1000:])


def recipe(folder, iterations):
    """The preset with fewer iterations, in all its tables."""
    values = {"iterations": iterations, "milestones": [iterations // 2], "checkpoint_every": EVERY}
    head, text = preset_text("quick-vgg").split("[sr]")
    for name, value in values.items():
        text = re.sub(rf"(?m)^{name} = (\d+|\[.*\])", f"{name} = {value}", text)
    path = folder / "recipe.toml"
    path.write_text(head + "[sr]" + text)
    shorter = read_preset("quick-vgg").step(2).replace(**values | {"milestones": tuple(values["milestones"])})
    assert read_file(path).step(2) == shorter
    return path


def main():
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("photo", type=Path)
    words.add_argument("--vgg", type=Path, required=True)
    words.add_argument("--start", default="realsr")
    words.add_argument("--structure", type=Path)
    for name, value in (("iterations", 40), ("kills", 3), ("seed", 0)):
        words.add_argument(f"--{name}", type=int, default=value)
    options = words.parse_args()
    random.seed(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [options.photo, "--step", 2, "--start", options.start, "--vgg", options.vgg]
        command += ["--structure", options.structure] if options.structure else []
        command += ["--config", recipe(folder, options.iterations)]
        whole, cut = folder / "whole.safetensors", folder / "cut.safetensors"
        Training(command, whole).end()
        killed = []
        for k in range(options.kills):
            first, end = ((options.iterations - EVERY) * n // options.kills for n in (k, k + 1))
            killed.append(Training(command, cut).kill_after(random.randrange(first, end), SPREAD * random.random()))
            print(f"killed after iteration {killed[-1]}", flush=True)
        Training(command, cut).end()
        a, b = load_file(whole), load_file(cut)
        equal = a.keys() == b.keys() and all(a[key].equal(b[key]) for key in a)
    row = {"preset": "quick-vgg", "iterations": options.iterations, "checkpoint_every": EVERY, "kills": options.kills}
    row |= {"killed_after": " ".join(map(str, killed)), "tensors": len(a), "equal": equal}
    print(", ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    add_row("kill_training", row)
    raise SystemExit(0 if equal else 1)


if __name__ == "__main__":
    main()
