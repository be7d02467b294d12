"""This engine on a CPU beside the field's runtimes: the same weights, picture and threads, in turns.

    python benchmarks/bench_peers.py [--sizes 512x256 1024x256 ...] [--repeats 3] [--threads N] [--busy] [--peers NAME ...]

Peers: plain PyTorch (whole picture, and RealESRGANer's tiles of 512 with 10 pixels), ONNX Runtime, OpenVINO (fp32 and bf16), ncnn
(tiles of 200), and this engine in bands (fp32 and bf16). Each is a process with an environment of its own, which this script
installs below build/peers. All are started and warmed up, then run one after another, again and again: medians of the repeats.
``ceiling`` is a single 3x3 convolution of a dense block (96 channels to 32) at the size of a band, in the same turns.

--busy  runs beside one process that takes a core.

Network: RRDBNet 64x23 with the weights of RealSR-DF2K. Errors are against the whole picture in fp32, in levels of 255. Sizes
are those of the input. ``frame`` extrapolates a 4096x2160 input by its pixels. Appends to results/peers.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from bench_bands import FRAME, photo
from harness import ROOT, add_row
from safetensors.numpy import save_file

from engine import archs
from engine.container import cpu_count
from engine.model.checkpoints import read_checkpoint
from engine.model.packaged import find_packaged

FOLDER = ROOT / "build" / "peers"
ENVIRONMENTS = {
    "onnx": ("onnx==1.23.2", "safetensors", "numpy"),
    "onnxruntime": ("onnxruntime==1.32.0", "numpy"),
    "openvino": ("openvino==2026.4.1", "numpy"),
    "ncnn": ("ncnn==1.0.20261020", "numpy"),
}
"""Environment -> its packages. The other peers run in this one."""

PEERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "PyTorch fp32, whole": ("", "plain_torch", {"tile": 0}),
    "PyTorch fp32, tiles of 512": ("", "plain_torch", {"tile": 512}),
    "ncnn fp32, tiles of 200": ("ncnn", "ncnn_tiles", {}),
    "ONNX Runtime fp32": ("onnxruntime", "onnx_runtime", {}),
    "OpenVINO fp32": ("openvino", "open_vino", {"precision": "fp32"}),
    "OpenVINO bf16": ("openvino", "open_vino", {"precision": "bf16"}),
    "engine fp32, bands": ("", "engine_bands", {"precision": "fp32"}),
    "engine bf16, bands": ("", "engine_bands", {"precision": "bf16"}),
    "ceiling fp32": ("", "ceiling", {"precision": "fp32"}),
    "ceiling bf16": ("", "ceiling", {"precision": "bf16"}),
}
"""Name -> environment, script and options."""

REFERENCE = "PyTorch fp32, whole"
"""Peer whose output is the right one. It runs once, without a row, where it is not among the measured ones."""

GFLOP_PER_PIXEL = 35.85e-3
"""Arithmetic of RRDBNet 64x23 for an input pixel: two operations for each product of its convolutions."""


def python_of(name: str) -> str:
    """Interpreter of an environment, which is made first if it does not exist."""
    if not name:
        return sys.executable
    folder = FOLDER / name
    if not (done := folder / "installed").exists():
        print(f"installing {' '.join(ENVIRONMENTS[name])}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([folder / "bin" / "pip", "install", "--quiet", *ENVIRONMENTS[name]], check=True)
        done.touch()
    return str(folder / "bin" / "python")


class Peer:
    """A peer's process, warmed up and waiting."""

    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        environment, script, own = PEERS[name]
        self.name = name
        self.out = Path(settings["folder"]) / f"{name}.npy"
        self.seconds: list[float] = []
        self.peak = 0
        variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(settings["threads"])}
        self._process = subprocess.Popen(
            [python_of(environment), ROOT / "benchmarks" / "peers" / f"{script}.py",
             json.dumps(settings | own | {"out": str(self.out)})],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables,
        )  # fmt: skip
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise SystemExit(f"{self.name}: ended with exit code {self._process.wait()}")

    def run(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        answer = self._answer()
        self.seconds.append(answer["seconds"])
        self.peak = answer["peak"]

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def weights(param: Path, folder: Path) -> dict[str, str]:
    """Weight files of an ncnn network for the peers in PyTorch and ncnn; converted files are written to ``folder``."""
    network = archs.build(read_checkpoint(param))
    path = folder / "weights.safetensors"
    save_file({name: value.numpy() for name, value in network.state_dict().items()}, path)
    return {"weights": str(path), "param": str(param), "bin": str(param.with_suffix(".bin"))}


def onnx_file(files: dict[str, str], folder: Path) -> dict[str, str]:
    """File of an RRDBNet as ONNX's peers take it."""
    path = folder / "network.onnx"
    script = ROOT / "benchmarks" / "peers" / "onnx_file.py"
    subprocess.run([python_of("onnx"), script, files["weights"], path], check=True)
    return {"onnx": str(path)}


def errors(out: Path, reference: Path) -> dict[str, float]:
    """Difference of two outputs in levels of 255."""
    difference = np.abs(np.clip(np.load(out), 0, 1) - np.clip(np.load(reference), 0, 1)) * 255
    return {
        "mean": float(difference.mean()),
        "p999": float(np.quantile(difference, 0.999)),
        "max": float(difference.max()),
    }


def compare(size: str, names: list[str], repeats: int, threads: int, *, is_busy: bool) -> None:
    """Measure one size; prints and appends a row for each peer."""
    width, height = map(int, size.split("x"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "picture.npy", photo(height, width).numpy())
        files = weights(find_packaged("realsr"), folder)
        files |= onnx_file(files, folder)
        settings = {"folder": name, "picture": str(folder / "picture.npy"), "threads": threads, "scale": 4, **files}
        reference = folder / f"{REFERENCE}.npy"
        if REFERENCE not in names:
            once = Peer(REFERENCE, settings)
            once.run()
            once.end()
        peers = [Peer(peer, settings) for peer in names]
        load = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if is_busy else None
        try:
            for turn in range(repeats):
                for peer in peers:
                    peer.run()
                    print(f"{size}, turn {turn + 1}, {peer.name}: {peer.seconds[-1]:.2f} s", flush=True)
        finally:
            if load is not None:
                load.kill()
            for peer in peers:
                peer.end()
        for peer in peers:
            row: dict[str, Any] = {"size": size, "threads": threads, "busy": int(is_busy), "peer": peer.name}
            seconds = median(peer.seconds)
            speed = GFLOP_PER_PIXEL * width * height / seconds
            if peer.name.startswith("ceiling"):
                row |= {"seconds": "", "gflop_s": round(float(np.load(peer.out).max()), 1)}
            else:
                row |= {"seconds": round(seconds, 3), "gflop_s": round(speed, 1)}
            row |= {"peak_mib": peer.peak >> 20, "mean": "", "p999": "", "max": "", "frame_s": ""}
            if not peer.name.startswith("ceiling"):
                row["frame_s"] = round(seconds * FRAME[0] * FRAME[1] / (width * height))
                row |= {key: round(value, 4) for key, value in errors(peer.out, reference).items()}
            print("  ".join(f"{key} {value}" for key, value in row.items() if value != ""), flush=True)
            add_row("peers", row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["512x256", "1024x256", "4096x64"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=cpu_count())
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS), metavar="NAME")
    parser.add_argument("--busy", action="store_true", help="beside a process that takes one core")
    options = parser.parse_args()
    for size in options.sizes:
        compare(size, options.peers, options.repeats, options.threads, is_busy=options.busy)


if __name__ == "__main__":
    main()
