"""Measure the main figures of docs/results.md again, in about five minutes on two CPU cores.

    python benchmarks/bench_quick.py

Runs smaller cases of the other benchmarks, with their own functions, and prints claim, committed value and value now.
Writes no rows. Exits with 1 when a claim that does not depend on the machine's speed fails.
"""

from __future__ import annotations

import contextlib
import csv
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import bench_bands
import bench_exact
import bench_memory
import bench_overhead
import faults
import harness
import torch
from harness import small_model
from results_page import Row, latest
from support import forks

from engine.run.stage import Stage

FRAME = (2160, 256)
"""Low-resolution frame (height, width) of the comparison with plain PyTorch. Bands are timed in the middle of its height."""

BANDS = {"RRDBNet 64x23": ((397, 33), (9, 771), 512), "SwinIR-M": ((391, 21), (8, 391), 256)}
"""Exactness of bands: a tall image (height, width), a wide one, and the width of its strips in low-resolution pixels."""

TILES = {"RRDBNet 64x23": ((767, 5), (64,)), "SwinIR-M": ((391, 8), (48,))}
"""Exactness of tiles: image (height, width) and tile."""

ROUNDING = 2.0**-23
"""Largest difference that counts as equal: CPUs may order sums by the width, which changes the last bit of float32."""

FLAT = 1.2
"""Largest ratio of the peaks at two sizes that counts as flat."""


@dataclass(frozen=True)
class Claim:
    """One line of the printed table."""

    text: str
    committed: str
    now: str
    holds: bool = True


class Rows:
    """Rows that benchmarks write during a quick run: into a temporary folder, not into benchmarks/results."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __getitem__(self, name: str) -> list[Row]:
        with (self.folder / f"{name}.csv").open(newline="") as file:
            return list(csv.DictReader(file))


@contextlib.contextmanager
def redirected_rows() -> Iterator[Rows]:
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(harness, "RESULTS", Path(folder)):
        yield Rows(Path(folder))


def exactness(rows: Rows) -> list[Claim]:
    """Bands and tiles against the whole image: RRDBNet 64x23 and SwinIR-M."""
    for title, network in bench_exact.networks():
        stage = Stage(network, torch.device("cpu"), "fp32")
        tall, wide, strip = BANDS[title]
        for size, case, width in ((tall, "bands of 16", 1 << 20), (wide, f"strips of {strip}", strip * stage.scale)):
            image = bench_bands.photo(*size)
            bands = bench_bands.streamed([stage], image, 16, width)
            bench_bands.report(title, f"{size[1]}x{size[0]}, {case}", bands, bench_exact.whole_image(stage, image))
    with mock.patch.object(bench_exact, "CASES", TILES):
        bench_exact.main()
    claims = []
    for name, what, keys in (
        ("bands_exact", "bands", ("network", "case")),
        ("exact", "tiles with the exact halo", ("network", "core")),
    ):
        text = f"largest difference between {what} and the whole image"
        now = worst(rows[name])
        claims.append(Claim(text, f"{worst(latest(name, *keys)):g}", f"{now:g}", now <= ROUNDING))
    return claims


def worst(shown: list[Row]) -> float:
    return max(float(row["max_difference"]) for row in shown)


def overhead(rows: Rows) -> list[Claim]:
    """One render by tiles against its bare network, which has fewer blocks than in the committed row."""
    with mock.patch.object(bench_overhead, "small_model", partial(small_model, channels=64, blocks=4, growth=32)):
        bench_overhead.main(1)
    (row,), (committed,) = rows["overhead"], latest("overhead")
    return [Claim("render by tiles / bare network, seconds", committed["ratio"], row["ratio"])]


def memory(rows: Rows) -> list[Claim]:
    """Peak memory at a small and a larger size: tiles by area, bands by height."""
    tiles, heights = bench_memory.SIZES[:2], bench_memory.HEIGHTS[:2]
    with mock.patch.multiple(bench_memory, SIZES=tiles, HEIGHTS=heights, WIDTHS=()):
        bench_memory.main("tiles")
        bench_memory.main("bands")
    claims = []
    for name, what, sizes in (("memory", "tiles", tiles), ("bands_memory", "bands", heights)):
        committed = {row["size"]: row for row in latest(name, "size")}
        now = {row["size"]: row for row in rows[name]}
        small, large = sizes
        for size in sizes:
            holds = float(now[size]["measured"]) <= 1.1 * float(now[size]["projected"])
            claims.append(
                Claim(
                    f"peak by {what}, {size}: measured / projected, MiB", peak(committed[size]), peak(now[size]), holds
                )
            )
        ratio = growth(now, small, large)
        claims.append(
            Claim(
                f"peak by {what}, {large} / {small}",
                f"{growth(committed, small, large):.3f}",
                f"{ratio:.3f}",
                ratio < FLAT,
            )
        )
    return claims


def peak(row: Row) -> str:
    return f"{float(row['measured']):.0f} / {float(row['projected']):.0f}"


def growth(by_size: dict[str, Row], small: str, large: str) -> float:
    return float(by_size[large]["measured"]) / float(by_size[small]["measured"])


def speed(_rows: Rows) -> list[Claim]:
    """Bands against plain PyTorch on padded tiles, on a narrow frame. CPUs differ in the speed of bf16."""
    _, network = next(bench_exact.networks())
    committed = {row["way"]: float(row["seconds"]) for row in latest("bands_time", "way")}
    claims = []
    with mock.patch.object(bench_bands, "FRAME", FRAME):
        plain = bench_bands.customary_seconds(network, tile=FRAME[1])
        for precision in ("bf16", "fp32"):
            bands = bench_bands.band_seconds(bench_bands.real(precision))
            before = committed["tiles of 512, pad 10, plain PyTorch fp32"] / committed[f"bands {precision}"]
            now = plain / min(next(bands) for _ in range(2))
            text = f"plain PyTorch in padded tiles / bands in {precision}, seconds"
            claims.append(Claim(text, f"{before:.2f}", f"{now:.2f}"))
    return claims


def kills(rows: Rows) -> list[Claim]:
    """kill -9 of renders by tiles at random moments; the resumed files must equal those of an undisturbed render."""
    case = "render, tiles"
    with tempfile.TemporaryDirectory() as folder, forks.Server() as server:
        faults.run(faults.Kills(Path(folder), server), "kills", case, first=1, count=2)
    (row,) = rows["faults"]
    committed = [row for row in latest("faults", "part", "case", "first", "last") if row["case"] == case]
    text = "renders that differ after kill -9 and resume, and kills"
    return [Claim(text, verdict(committed), verdict([row]), row["failures"] == "0")]


def verdict(shown: Sequence[Row]) -> str:
    failures, faults = (sum(int(row[key]) for row in shown) for key in ("failures", "faults"))
    return f"{failures} of {faults}"


def print_table(claims: Sequence[Claim]) -> None:
    lines = [("claim", "committed", "now"), *((claim.text, claim.committed, claim.now) for claim in claims)]
    first, second, third = (max(len(line[column]) for line in lines) for column in range(3))
    for line, holds in zip(lines, (True, *(claim.holds for claim in claims)), strict=True):
        print(f"{line[0]:{first}}  {line[1]:>{second}}  {line[2]:>{third}}{'' if holds else '  FAILS'}")


def main() -> int:
    parts: tuple[Callable[[Rows], list[Claim]], ...] = (exactness, overhead, speed, memory, kills)
    claims: list[Claim] = []
    with redirected_rows() as rows:
        for part in parts:
            start = time.perf_counter()
            claims += part(rows)
            print(f"{part.__name__}: {time.perf_counter() - start:.0f} s", flush=True)
    print_table(claims)
    return 0 if all(claim.holds for claim in claims) else 1


if __name__ == "__main__":
    sys.exit(main())
