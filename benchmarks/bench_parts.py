"""CPU time of a render in parts over that of one run: one part after the other, and ``engine.finish``.

    python benchmarks/bench_parts.py [tiles] [bands] [default] [tall] [work]

tiles     A frame of 2048x2048, 64 shards, in tiles of 64 with the exact halo.
bands     A column, 1024 pixels wide, of a frame of 8192x8192, 64 shards. The work of bands in one strip is proportional to the
          width, so the ratio is that of the frame.
default   The same column by the default model, in 2, 3 and 4 parts.
tall      A column of 12288 rows by the default model, in 4 parts.
work      Multiply-adds in place of seconds, which another process cannot disturb: columns of 8192 and of 12288 rows, 64 pixels
          wide, by the default model. Writes results/parts_work.csv.

All are enlarged twice from a picture; tiles and bands by a small RRDBNet with the receptive field of the default model (49
pixels). One run and all parts take turns, and the row has the median of the ratios. The store of the parts must equal that of
one run. Networks, plan, compression, pyramid and ``engine.finish`` count; the start of a process is measured beside them: an
interpreter, the libraries, the model and the plan. Writes results/parts.csv.
"""

from __future__ import annotations

import filecmp
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from harness import PHOTOS, add_row, small_model
from PIL import Image

import engine
from engine.job import Job
from engine.model.bundle import Model, load
from engine.plan.make import project
from engine.plan.parts import Part, Shares
from engine.plan.request import Request

MODEL = Path(__file__).parents[1] / "models" / "picosdeeuropa.safetensors"
TURNS = 3


@dataclass(frozen=True)
class Way:
    """A frame, and how it is rendered."""

    size: tuple[int, int]
    """(width, height)."""
    options: dict[str, object]
    """Options of ``engine.render``."""
    parts: tuple[int, ...]
    """Numbers of parts."""
    small: bool = False
    """Whether the network is a small one."""


BANDS = {"executor": "bands"}
WAYS = {
    "tiles": Way((2048, 2048), {"executor": "tiles", "tile": 64, "overlap": "exact"}, (2, 4, 8), small=True),
    "bands": Way((1024, 8192), BANDS, (2, 4, 8), small=True),
    "default": Way((1024, 8192), BANDS, (2, 3, 4)),
    "tall": Way((1024, 12288), BANDS, (4,)),
}


def main(ways: list[str]) -> None:
    """Measure the ways, in the order of the command line."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small = small_model(folder, 2, blocks=3)
        for way in ways or (*WAYS, "work"):
            if way == "work":
                measure_work(folder)
                continue
            chosen = WAYS[way]
            model = small if chosen.small else load(MODEL)
            size = chosen.size
            request = Request(init=picture_of(size, folder), size=size, precision="fp32", **chosen.options)
            job = Job.prepare(model, request, folder / "planned.zarr")
            render_part(model, request, folder / way / "warm" / "out.zarr", Part(1, 8))  # measures the machine, once
            for count in chosen.parts:
                turns = [turn(model, request, folder / f"{way} {count} {k}", count) for k in range(TURNS)]
                alone, together, end = sorted(turns, key=lambda t: (t[1] + t[2]) / t[0])[TURNS // 2]
                row = {
                    "way": way,
                    "frame": "x".join(map(str, size)),
                    "parts": count,
                    "one_run_cpu_s": round(alone, 2),
                    "parts_cpu_s": round(together, 2),
                    "finish_cpu_s": round(end, 2),
                    "overhead": round((together + end) / alone - 1, 3),
                    "planned": round(Shares.of(job.plan, job.measured, count).overhead(job.plan, job.measured), 3),
                    "start_cpu_s": round(start(model, request), 1),
                }
                print(row, flush=True)
                add_row("parts", row)


def picture_of(size: tuple[int, int], folder: Path) -> Path:
    """A picture of a sixteenth of the sides."""
    path = folder / f"{size[0]}x{size[1]}.png"
    photo = Image.open(PHOTOS / "picosdeeuropa-crop.jpg").convert("RGB")
    photo.resize((size[0] // 16, size[1] // 16)).save(path)
    return path


def measure_work(folder: Path) -> None:
    """Measure the LR pixels that the networks compute, from the multiply-adds that run."""
    model = load(MODEL)
    for height, counts in ((8192, (2, 3, 4)), (12288, (4,))):
        size = (64, height)
        request = Request(init=picture_of(size, folder), size=size, precision="fp32", executor="bands")
        alone, job = lr_pixels(model, request, folder / f"work {height}" / "out.zarr", 1)
        for count in counts:
            together, _ = lr_pixels(model, request, folder / f"work {height} {count}" / "out.zarr", count)
            shares = Shares.of(job.plan, job.measured, count)
            writes = [shares.writes(job.plan, part).rectangles for part in shares.parts]
            pixels = [sum(project(job.plan, job.measured, boxes).lr_pixels) for boxes in (None, *writes)]
            planned = sum(pixels[1:]) / pixels[0] - 1
            row = {"way": "bands, default model", "rows": height, "parts": count}
            row |= {"overhead": round(together / alone - 1, 4), "planned": round(planned, 4)}
            print(row, flush=True)
            add_row("parts_work", row)


def lr_pixels(model: Model, request: Request, out: Path, count: int) -> tuple[int, Job]:
    """LR pixels of all steps in all parts, and the job of the last part."""
    pixels: list[int] = []
    for number in range(1, count + 1):
        job = Job.prepare(model, request, out)
        for _ in job.run(job.open_part(Part(number, count)), lambda _, lr_pixels: pixels.append(lr_pixels)):
            pass
    engine.finish(out)
    return sum(pixels), job


def turn(model: Model, request: Request, folder: Path, count: int) -> tuple[float, float, float]:
    """CPU seconds of one run, of all parts, and of ``engine.finish``."""
    one, out = folder / "one" / "out.zarr", folder / "parts" / "out.zarr"
    alone = seconds(partial(engine.render, model, one, **asdict(request)))
    works = [partial(render_part, model, request, out, Part(k + 1, count)) for k in range(count)]
    together, end = sum(map(seconds, works)), seconds(partial(engine.finish, out))
    check_equal(one, out)
    shutil.rmtree(folder)
    return alone, together, end


def asdict(request: Request) -> dict[str, object]:
    """Options of a request for ``engine.render``."""
    return {name: getattr(request, name) for name in ("init", "size", "precision", "executor", "tile", "overlap")}


def render_part(model: Model, request: Request, out: Path, part: Part) -> None:
    """Plan and render a part."""
    engine.render(model, out, part=str(part), **asdict(request))


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of all threads of this process."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def start(model: Model, request: Request) -> float:
    """CPU seconds of a process that plans and renders nothing."""
    begin = resource.getrusage(resource.RUSAGE_CHILDREN)
    size = "x".join(map(str, request.size or ()))
    words = f"--init {request.init} --size {size} --precision fp32 --executor {request.executor} --quiet"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "engine", "plan", str(model.path), *words.split()]
    subprocess.run(command, check=True, env=environment)
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    return end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime


def check_equal(one: Path, other: Path) -> None:
    """Raise AssertionError unless two stores have the same files."""
    files = [str(path.relative_to(one)) for path in one.rglob("*") if path.is_file()]
    assert sorted(files) == sorted(str(path.relative_to(other)) for path in other.rglob("*") if path.is_file())
    _, mismatch, errors = filecmp.cmpfiles(one, other, files, shallow=False)
    assert not mismatch, mismatch
    assert not errors, errors


if __name__ == "__main__":
    main(sys.argv[1:])
