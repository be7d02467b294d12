"""Measure the main figures of docs/results.md again, in about five minutes on two CPU cores.

    python benchmarks/bench_quick.py

Runs smaller cases of the other benchmarks, with their own functions, and prints claim, committed value and value now.
Writes no rows. Exits with 1 when a claim that does not depend on the machine's speed fails.
"""

from __future__ import annotations

import contextlib
import csv
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import bench_bands
import bench_exact
import bench_memory
import bench_overhead
import harness
import kill_test
from results_page import Row, latest

from engine import archs
from engine.model.checkpoints import find_packaged, read_checkpoint

FRAME = (256, 256)
"""Low-resolution frame of the comparison with plain PyTorch."""

TILED = {"RRDBNet 64x23": ((767, 9), (64,)), "SwinIR-M": ((391, 21), (48,))}
"""Image (height, width) and tiles for the exactness of tiles: one size of tile each, RRDBNet on half of the width."""

KILLS = 7
"""Two while the store is made, two at the start, one in the middle, one at the last shard, one after the end."""

FLAT = 1.1
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
    bench_bands.exact()
    with mock.patch.object(bench_exact, "CASES", TILED):
        bench_exact.main()
    return [
        Claim(
            f"largest difference, {what}", worst(latest(name, *keys)), worst(rows[name]), float(worst(rows[name])) == 0
        )
        for what, name, keys in (
            ("bands and the whole image", "bands_exact", ("network", "case")),
            ("tiles with the exact halo and the whole image", "exact", ("network", "core")),
        )
    ]


def worst(shown: list[Row]) -> str:
    return f"{max(float(row['max_difference']) for row in shown):g}"


def overhead(rows: Rows) -> list[Claim]:
    """One render by tiles against its bare network."""
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
    """Bands in bf16 and float32 against plain PyTorch on padded tiles, on a small frame."""
    network = archs.build(read_checkpoint(find_packaged("realsr")))
    with mock.patch.object(bench_bands, "FRAME", FRAME):
        bands = {precision: bench_bands.band_seconds(bench_bands.real(precision)) for precision in ("bf16", "fp32")}
        seconds = {name: min(next(way) for _ in range(2)) for name, way in bands.items()}
        plain = bench_bands.customary_seconds(network, tile=FRAME[0])
    committed = {row["way"]: float(row["seconds"]) for row in latest("bands_time", "way")}
    before = committed["tiles of 512, pad 10, plain PyTorch fp32"]
    return [
        Claim(
            f"plain PyTorch in padded tiles / bands in {precision}, seconds",
            f"{before / committed[f'bands {precision}']:.2f}",
            f"{plain / now:.2f}",
        )
        for precision, now in seconds.items()
    ]


def kills(rows: Rows) -> list[Claim]:
    """kill -9 and resume; the files must equal those of an undisturbed render."""
    kill_test.main(KILLS, 0, "tiles")
    (row,), committed = rows["kill_test"], latest("kill_test", "executor")[0]
    return [Claim("files equal after kill -9 and resume", verdict(committed), verdict(row), row["equal"] == "True")]


def verdict(row: Row) -> str:
    return f"{'all' if row['equal'] == 'True' else 'NOT all'}, {row['kills']} kills"


def print_table(claims: Sequence[Claim]) -> None:
    lines = [("claim", "committed", "now"), *((claim.text, claim.committed, claim.now) for claim in claims)]
    first, second, third = (max(len(line[column]) for line in lines) for column in range(3))
    for line, holds in zip(lines, (True, *(claim.holds for claim in claims)), strict=True):
        print(f"{line[0]:{first}}  {line[1]:>{second}}  {line[2]:>{third}}{'' if holds else '  FAILS'}")


def main() -> int:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
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
