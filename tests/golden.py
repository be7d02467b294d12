"""Golden digests that a refactoring must keep, made by the command line alone.

python tests/golden.py make golden.json     # before the change
python tests/golden.py check golden.json    # after it: exits with 1 and names each digest that differs

The digests cover two plans, two stores (bands; tiles whose inner tiles spill to disk), one built model and the
checkpoints of two trainings that were stopped after a few iterations. Rounding differs between processors, so the file
of digests belongs to one machine and is not committed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models" / "picosdeeuropa.safetensors"
PHOTO = ROOT / "benchmarks" / "photos" / "picosdeeuropa-crop.jpg"

NOT_PIXELS = ("seam_error", "overlap")
"""Keys that a plan held once and holds no more: they decide no pixel (docs/decisions/0022)."""


def main() -> None:
    """Make the digests, or compare them with a file of digests."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("make", "check"))
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        digests = {name: make(Path(folder)) for name, make in GOLDEN.items()}
    if arguments.action == "make":
        arguments.file.write_text(json.dumps(digests, indent=2) + "\n")
        return
    before = json.loads(arguments.file.read_text())
    differing = [name for name in GOLDEN if digests[name] != before.get(name)]
    for name in GOLDEN:
        sys.stdout.write(f"{name}: {'DIFFERS' if name in differing else 'equal'}\n")
    sys.exit(1 if differing else 0)


def engine(*arguments: object, **popen: Any) -> subprocess.Popen[str]:
    """Start a command of this checkout's engine."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-m", "engine", *map(str, arguments)]
    return subprocess.Popen(command, text=True, env=environment, cwd=ROOT, **popen)


def run(*arguments: object) -> str:
    """Stdout of a command, which must succeed."""
    process = engine(*arguments, stdout=subprocess.PIPE)
    said, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"engine {' '.join(map(str, arguments))}: exit code {process.returncode}")
    return said


def plan_of(folder: Path, *arguments: object) -> str:
    """Digest of the plan's JSON."""
    told = run("plan", MODEL, "--json", "--device", "cpu", "--out", folder / "none.zarr", *arguments)
    return digest_of_plan(json.loads(told)["plan"])


def digest_of_plan(plan: dict[str, Any]) -> str:
    for part in (plan, *plan["stages"]):
        for key in NOT_PIXELS:
            part.pop(key, None)
    return digest_of(json.dumps(plan, sort_keys=True).encode())


def store_of(folder: Path, name: str, *arguments: object) -> str:
    """Digest of every shard of a rendered store, and of its plan."""
    out = folder / name
    run("render", MODEL, "--out", out, "--precision", "fp32", "--device", "cpu", *arguments)
    sha = hashlib.sha256()
    for path in sorted(p for p in out.rglob("*") if p.is_file() and "c" in p.relative_to(out).parts):
        sha.update(str(path.relative_to(out)).encode() + path.read_bytes())
    attributes = json.loads((out / "zarr.json").read_text())["attributes"]["ourgan"]
    return f"{sha.hexdigest()} {digest_of_plan(attributes['plan'])}"


def built_model(folder: Path) -> str:
    """Digests of a model file's tensors and of its manifest (the order of a file's metadata is random)."""
    out = folder / "built.safetensors"
    run("model", "build", "--structure", MODEL, "--sr", MODEL, "--sr", "realsr", "--sigma", 0.02, "--out", out)
    with safe_open(out, "pt") as file:
        metadata = json.dumps(json.loads(file.metadata()["ourgan"]), sort_keys=True)
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    return f"{digest_of_tensors(tensors)} {digest_of(metadata.encode())}"


def structure_checkpoint(folder: Path) -> str:
    """Digest of the tensors of step 1's checkpoint, stopped within a patch-GAN scale."""
    config = folder / "structure.toml"
    text = run("train", "preset", "quick").replace("checkpoint_every = 100", "checkpoint_every = 3")
    config.write_text(text)
    out = folder / "structure.safetensors"
    training = ("train", "structure", PHOTO, "--out", out, "--config", config, "--precision", "fp32")
    numbers = (2, 2, 2, 2, 10000, 2, 2, 2, 2, 2)
    return stopped(
        out,
        (*training, "--iterations", *numbers, "--device", "cpu"),
        lambda line: (line["phase"], line["iteration"]) == (4, 3),
    )


def sr_checkpoint(folder: Path) -> str:
    """Digest of the tensors of a fine-tuning's checkpoint, stopped after its discriminator has begun."""
    config = folder / "sr.toml"
    text = run("train", "preset", "quick").replace("checkpoint_every = 50", "checkpoint_every = 4")
    config.write_text(text.replace("gan_from = 50", "gan_from = 2").replace("crop = 128", "crop = 64"))
    out = folder / "step2.safetensors"
    training = ("train", "sr", PHOTO, "--out", out, "--config", config, "--precision", "fp32", "--device", "cpu")
    start = ("--start", "scratch", "--architecture", "rrdbnet", "--channels", 16, "--blocks", 1, "--size", 512)
    return stopped(out, (*training, *start, "--iterations", 10000), lambda line: line["iteration"] == 4)


def stopped(out: Path, arguments: tuple[object, ...], enough: Callable[[dict[str, Any]], bool]) -> str:
    """Kill a training as soon as the log tells of the checkpoint that is looked for; digest of that checkpoint."""
    log, checkpoint = (out.with_name(out.name + suffix) for suffix in (".log.jsonl", ".checkpoint"))
    process = engine(*arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            lines = [json.loads(t) for t in log.read_text().splitlines() if t.endswith("}")] if log.exists() else []
            if any(line["event"] == "CheckpointSaved" and enough(line) for line in lines):
                process.send_signal(signal.SIGSTOP)
                break
            time.sleep(0.01)
        else:
            raise SystemExit(f"engine {' '.join(map(str, arguments))}: ended before its checkpoint")
        return digest_of_tensors(torch.load(checkpoint, map_location="cpu", weights_only=True)["state"])
    finally:
        process.kill()
        process.wait()


def digest_of_tensors(state: Any) -> str:
    """Digest of every tensor below, whatever the names of the dictionaries around them, in order."""
    return digest_of(b"".join(sorted(_tensors(state))))


def _tensors(value: Any) -> list[bytes]:
    if isinstance(value, torch.Tensor):
        return [hashlib.sha256(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).digest()]
    if isinstance(value, dict):
        return [digest for part in value.values() for digest in _tensors(part)]
    if isinstance(value, list | tuple):
        return [digest for part in value for digest in _tensors(part)]
    return []


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


GOLDEN: dict[str, Callable[[Path], str]] = {
    "plan: bands": lambda folder: plan_of(folder, "--size", "16384x8640", "--precision", "fp32", "--memory", "2GiB"),
    "plan: tiles": lambda folder: plan_of(
        folder, "--size", "4096x3072", "--executor", "tiles", "--precision", "fp32", "--memory", "3GiB", "--blend", 16
    ),
    "store: bands": lambda folder: store_of(folder, "bands.zarr", "--size", "1536x1200", "--seed", 3),
    "store: tiles that spill": lambda folder: store_of(
        folder, "tiles.zarr", "--size", "4864x3072", "--stages", 3, "--executor", "tiles", "--tile", 128, "--overlap", 6,
    ),
    "model": built_model,
    "checkpoint: step 1": structure_checkpoint,
    "checkpoint: super-resolution": sr_checkpoint,
}  # fmt: skip


if __name__ == "__main__":
    main()
