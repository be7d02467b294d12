"""Tiles of other programs beside the engine's bands: memory, time, errors, seams, and the largest picture within a limit.

    python benchmarks/bench_tiling.py [--only NETWORK ...] [--size 576x64] [--threads N]
    python benchmarks/bench_tiling.py largest

The rules are those of Real-ESRGAN 0.3.0, realesrgan-ncnn-vulkan 0.2.0 and ComfyUI 0.38.1, written from their description
(benchmarks/peers/tiling.py), with the same weights on the same picture, on a CPU in fp32, by PyTorch, ncnn and spandrel. Every
run is a process of its own: peaks are its resident memory, CPU seconds its user and system time with its start. The engine is
``engine upscale`` after a dry run, so that its measurements are made; its time includes the pyramid and files of its store.
Errors are levels of 255 against the whole picture in fp32; the engine's result has 16 bits. A seam is the largest step of the
error from a pixel to its neighbour across a tile's border, or anywhere for the engine, which has no such borders.

The largest picture of 4:3 within a memory is computed: a tile takes what the memory of two pictures in one tile each foretells,
and the picture and its result add ``held`` bytes a pixel. The engine's is the largest of PLANNED that a dry run accepts.
Appends to results/tiling.csv.

``largest`` renders the computed pictures of the small network, and pictures with sides a tenth longer, which should not fit;
the engine renders the longest of them all within the limit. Takes about ten minutes. Appends to results/tiling_largest.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyvips
from bench_peers import errors, python_of, weights
from bench_weights import NETWORKS, cut, fetch
from harness import RESULTS, ROOT, Ended, add_row, publish, run_process
from PIL import Image

from engine.container import cpu_count

PEERS = ROOT / "benchmarks" / "peers"
sys.path.append(str(PEERS))
from tiling import starts  # noqa: E402 (found by the path above)

COMPACT, X4PLUS = "realesr-animevideov3 x4", "Real-ESRGAN x4plus"

LIMITS = {COMPACT: 1024, X4PLUS: 4096}
"""Network -> memory in MiB of the largest picture."""

PLANNED = ((16384, 12288), (8192, 6144), (4096, 3072))
"""Sizes that the engine plans, largest first, until one fits the limit."""

LONGER = 1.1
"""Sides of a picture that should not fit, relative to the largest one."""

Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Program:
    """A way to enlarge a picture in a process."""

    script: str
    """File of benchmarks/peers."""
    environment: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    tile: int = 0
    """Side of a tile without its padding; 0: the whole picture."""
    pad: int = 0
    """Pixels around a tile."""
    overlap: int = 0
    """Pixels that neighbouring tiles share."""
    held: int = 0
    """Bytes a pixel of the picture, for it and its result at four times the size, of three channels each."""
    least: int = 0
    """Side down to which a tile is halved where memory is exhausted; 0: never."""

    def run(self, settings: dict[str, Any], picture: Path, out: Path) -> Ended:
        """Enlarge ``picture`` once."""
        options = settings | self.options | {"picture": str(picture), "out": str(out), "once": True}
        return run_process(
            [python_of(self.environment), PEERS / f"{self.script}.py", json.dumps(options)],
            OMP_NUM_THREADS=str(settings["threads"]),
            OMP_WAIT_POLICY="PASSIVE",  # as the engine has it: time spent waiting is no work
        )

    def borders(self, length: int) -> list[int]:
        """Pixels of a side of the picture that begin a tile, or that follow on one."""
        first = starts(length, self.tile, self.overlap) if self.overlap else range(0, length, self.tile or length)
        return sorted({side for start in first for side in (start, start + self.tile) if 0 < side < length})


_FLOATS = 4 * 3 * (1 + 16)
"""``held`` of a picture and a result in float32. ComfyUI's weights are as large as a channel more."""

WHOLE = "PyTorch, whole picture"
NCNN = "realesrgan-ncnn-vulkan's tiles of 200, ncnn"
PROGRAMS = {
    WHOLE: Program("plain_torch", options={"tile": 0}),
    "RealESRGANer's tiles of 400, PyTorch": Program(
        "plain_torch", options={"tile": 400}, tile=400, pad=10, held=_FLOATS
    ),
    "RealESRGANer's tiles of 512, PyTorch": Program(
        "plain_torch", options={"tile": 512}, tile=512, pad=10, held=_FLOATS
    ),
    NCNN: Program("ncnn_tiles", "ncnn", tile=200, pad=10, held=3 * (1 + 16)),
    "ComfyUI's tiles of 512, spandrel": Program(
        "spandrel_tiles", tile=512, overlap=32, held=_FLOATS + 4 * 16, least=128
    ),
}
ENGINE = "engine, bands"

ONE_TILE = {
    COMPACT: {WHOLE: ((384, 288), (768, 576)), NCNN: ((100, 100), (200, 200))},
    X4PLUS: {WHOLE: ((192, 64), (576, 64)), NCNN: ((100, 100), (200, 200))},
}
"""Network -> program -> sizes of two pictures of one tile each. All tiles in PyTorch take the same."""


@dataclass(frozen=True, slots=True)
class Line:
    """Memory of a process that grows with pixels."""

    base: float
    """MiB without any."""
    slope: float
    """MiB of a pixel."""

    @classmethod
    def through(cls, first: tuple[int, int], second: tuple[int, int]) -> Line:
        """The line through two (pixels, MiB), which rises by a byte a pixel at least."""
        slope = max((second[1] - first[1]) / (second[0] - first[0]), 2**-20)
        return cls(first[1] - slope * first[0], slope)

    def at(self, pixels: float) -> float:
        """MiB of a picture with this number of pixels."""
        return self.base + self.slope * pixels

    def within(self, limit: float) -> float:
        """Pixels within a limit."""
        return max(0.0, (limit - self.base) / self.slope)


class Bench:
    """One network, its files in the formats of all programs, and a folder for pictures and results."""

    def __init__(self, network: str, folder: Path, threads: int) -> None:
        self.network = network
        self.param = fetch(NETWORKS[network])
        self.scale = NETWORKS[network].scale
        self.settings = {"threads": threads, "scale": self.scale, **weights(self.param, folder)}
        self.folder = folder

    def picture(self, size: Size) -> Path:
        """Middle of the photograph, mirrored as often as the size takes, as uint8; ``.png`` beside it for the engine."""
        path = self.folder / f"{size[0]}x{size[1]}.npy"
        if not path.exists():
            pixels = np.asarray(cut((min(size[0], 768), min(size[1], 576))))
            more = [(0, side - had) for side, had in zip(reversed(size), pixels.shape, strict=False)]
            pixels = np.pad(pixels, [*more, (0, 0)], "symmetric")
            np.save(path, np.ascontiguousarray(pixels.transpose(2, 0, 1)))
            Image.fromarray(pixels).save(path.with_suffix(".png"))
        return path

    def one_tile(self, program: str) -> Line:
        """Memory of a program by the pixels of a tile, from two pictures."""
        peaks = []
        for size in ONE_TILE[self.network][program]:
            ended = PROGRAMS[program].run(self.settings, self.picture(size), self.folder / "forgotten.npy")
            print(f"  {program}: {size[0]}x{size[1]} in {ended.peak} MiB", flush=True)
            peaks.append((math.prod(size), ended.peak))
        return Line.through(*peaks)

    def compare(self, size: Size) -> Iterator[dict[str, Any]]:
        """Row of each program on one picture."""
        picture, whole = self.picture(size), self.folder / "whole.npy"
        for name, program in PROGRAMS.items():
            out = whole if name == WHOLE else self.folder / "result.npy"
            ended = program.run(self.settings, picture, out)
            steps = [[side * self.scale for side in program.borders(length)] for length in reversed(size)]
            yield self._row(name, size, ended, out, whole, steps)
        out = self.folder / "result.tif"
        ended = self.upscale(picture.with_suffix(".png"), out, "--depth", "16")
        pixels = pyvips.Image.new_from_file(str(out)).numpy().transpose(2, 0, 1)
        np.save(out.with_suffix(".npy"), pixels.astype(np.float32) / 65535)
        steps = [list(range(1, side * self.scale)) for side in reversed(size)]
        yield self._row(ENGINE, size, ended, out.with_suffix(".npy"), whole, steps)

    def _row(
        self, name: str, size: Size, ended: Ended, out: Path, whole: Path, steps: list[list[int]]
    ) -> dict[str, Any]:
        found = errors(out, whole)
        return {
            "network": self.network, "program": name, "picture": f"{size[0]}x{size[1]}",
            "threads": self.settings["threads"], "cpu_s": round(ended.cpu, 1), "seconds": round(ended.seconds, 1),
            "peak_mib": ended.peak, "worst": round(found["max"], 4), "p999": round(found["p999"], 4),
            "mean": round(found["mean"], 5), "seam": round(largest_step(out, whole, steps), 4),
        }  # fmt: skip

    def upscale(self, picture: Path, out: Path, *options: str) -> Ended:
        """The engine's render, after a dry run."""
        command = [sys.executable, "-m", "engine", "upscale", picture, "--model", self.param, "--precision", "fp32",
                   "--executor", "bands", "--overwrite", "--json", *options, "--out", out]  # fmt: skip
        variables = {"XDG_CACHE_HOME": str(self.folder / "cache")}
        run_process([*command, "--dry-run"], **variables)
        return run_process(command, **variables)

    def planned(self, limit: int) -> Size | None:
        """Largest size whose plan fits the limit."""
        for size in PLANNED:
            picture = self.folder / "flat.png"
            pyvips.Image.black(*size, bands=3).copy(interpretation="srgb").pngsave(str(picture), compression=1)
            ended = run_process(
                [sys.executable, "-m", "engine", "upscale", picture, "--model", self.param, "--precision", "fp32",
                 "--memory", f"{limit}MiB", "--json", "--dry-run", "--out", self.folder / "flat.zarr"],
                expected=(0, 3),
            )  # fmt: skip
            print(f"  {ENGINE}: {size[0]}x{size[1]} planned, exit code {ended.code}", flush=True)
            if not ended.code:
                return size
        return None


def largest_step(out: Path, whole: Path, steps: list[list[int]]) -> float:
    """Largest change of the error, in levels of 255, from a row or column to the next one at the given places."""
    result, right = (np.clip(np.load(path), 0, 1) for path in (out, whole))
    error = (result - right) * 255
    return max(
        (
            float(np.abs(np.take(error, places, axis) - np.take(error, np.subtract(places, 1), axis)).max())
            for axis, places in enumerate(steps, 1)
            if places
        ),
        default=0.0,
    )


def read_size(text: str) -> Size:
    """(width, height) of WIDTHxHEIGHT."""
    width, height = map(int, text.split("x"))
    return width, height


def shape(pixels: float) -> Size:
    """Size of 4:3 with about this number of pixels."""
    width = round(math.sqrt(pixels * 4 / 3))
    return width, width * 3 // 4


def computed(program: Program, limit: int, tile: Line) -> Size:
    """Largest picture within a limit in MiB, with the best of the tiles that are tried and fit, or as a part of one tile."""
    sides = [program.tile] if program.tile else []
    while program.least and sides[-1] // 2 >= program.least:
        sides.append(sides[-1] // 2)
    left = [limit - tile.at((side + 2 * program.pad) ** 2) for side in sides]
    return shape(max(((mib * 2**20) / program.held for mib in left if mib > 0), default=tile.within(limit)))


def measure(bench: Bench, size: Size) -> None:
    """Print and append the rows of a network, errors and times from a picture of ``size``."""
    limit = LIMITS[bench.network]
    tiles = {name: bench.one_tile(name) for name in ONE_TILE[bench.network]}
    for row in bench.compare(size):
        name = row["program"]
        if name == ENGINE:
            largest, how = bench.planned(limit), "planned"
        else:
            largest, how = computed(PROGRAMS[name], limit, tiles.get(name, tiles[WHOLE])), "computed"
        row |= {"limit_mib": limit, "largest": "x".join(map(str, largest)) if largest else "", "how": how}
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        add_row("tiling", row)


def render_largest(bench: Bench) -> None:
    """Render the largest picture of each program that was computed last, and one with longer sides."""
    with (RESULTS / "tiling.csv").open(newline="") as file:
        computed_rows = {row["program"]: row for row in csv.DictReader(file) if row["network"] == bench.network}
    limit, longest = LIMITS[bench.network], (0, 0)
    for name, program in PROGRAMS.items():
        fitting = read_size(computed_rows[name]["largest"])
        for size in (fitting, shape(math.prod(fitting) * LONGER**2)):
            # As these programs are at their limit: results in 8 bits where they hold them so, and the smallest tiles.
            settings = bench.settings | {"bytes": True, "tile": program.least or program.tile}
            ended = program.run(settings, bench.picture(size), bench.folder / "result.npy")
            add_largest(bench.network, name, size, ended, limit)
            longest = max(longest, size)
    ended = bench.upscale(
        bench.picture(longest).with_suffix(".png"), bench.folder / "result.zarr", "--memory", f"{limit}MiB"
    )
    add_largest(bench.network, ENGINE, longest, ended, limit)


def add_largest(network: str, program: str, size: Size, ended: Ended, limit: int) -> None:
    """Append the row of a picture that was rendered."""
    row = {"network": network, "program": program, "picture": f"{size[0]}x{size[1]}", "limit_mib": limit}
    row |= {"peak_mib": ended.peak, "seconds": round(ended.seconds, 1)}
    publish("tiling_largest", row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(LIMITS), choices=list(LIMITS), metavar="NETWORK")
    parser.add_argument("--size", type=read_size, default=(576, 64), help="WIDTHxHEIGHT for errors and times")
    parser.add_argument("--threads", type=int, default=cpu_count())
    parser.add_argument("part", nargs="?", choices=("compare", "largest"), default="compare")
    options = parser.parse_args()
    if options.part == "largest":
        with tempfile.TemporaryDirectory() as folder:
            render_largest(Bench(COMPACT, Path(folder), options.threads))
        return
    for name in options.only:
        with tempfile.TemporaryDirectory() as folder:
            measure(Bench(name, Path(folder), options.threads), options.size)


if __name__ == "__main__":
    main()
