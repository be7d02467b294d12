"""Stores in an object store: equal bytes after injected faults and kills.

    python benchmarks/bench_objects.py [faults] [kills]

faults  A quarter of all requests fails at random: 500, 503, a slow answer, half an answer, none before the request is done and
        none after it. Tiles and bands, two steps, whole and in two parts, with at least 100 faults each; a command that gives up
        in one line is repeated with --resume. Then engine check and engine export, while requests fail as well.
kills   A render is killed with the n-th put of a shard, n drawn for each process, and goes on as on another machine, with
        an empty cache, until it ends.

The store must equal a local one in every byte, and the export the local export. The server is moto's on this machine. Writes
results/objects.csv; a case that fails writes a row too, and the exit code is 1.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
os.environ["OMP_NUM_THREADS"] = "1"

from harness import add_row, small_model  # noqa: E402
from support.commands import finish, start  # noqa: E402
from support.object_store import FAULTS, FaultyProxy, make_bucket, s3_server, stored  # noqa: E402
from support.stores import files  # noqa: E402

import engine  # noqa: E402

OPTIONS = {
    "tiles": {"size": "512x384", "stages": 2, "tile": 8, "overlap": 4, "precision": "fp32", "executor": "tiles"},
    "bands": {"size": "512x3072", "stages": 2, "overlap": 4, "precision": "fp32", "executor": "bands"},
}
COUNT = 100
KILLS = 20
SHARE = 0.25


class Bench:
    """A folder with a model and local stores, and the proxy that all requests pass."""

    def __init__(self, folder: Path, proxy: FaultyProxy) -> None:
        self.folder, self.proxy, self.failures, self.count = folder, proxy, 0, 0
        self.model = small_model(folder, 2).path
        for name, options in OPTIONS.items():
            engine.render(self.model, folder / name / "out.zarr", **options)
            engine.export(folder / name / "out.zarr", folder / f"{name}.tif")

    def faults(self) -> None:
        for name in OPTIONS:
            for parts in (1, 2):
                draw = random.Random(f"{name} {parts}")
                self._case(f"{name}, {'whole' if parts == 1 else 'two parts'}", name, lambda draw=draw: draw, parts)

    def kills(self) -> None:
        for name in OPTIONS:
            self._begin()
            draw, start_time, killed, equal = random.Random(name), time.perf_counter(), 0, True
            while killed < KILLS:
                url = self._url()
                code = -signal.SIGKILL
                while code:
                    code = self._killed(name, url, draw.randint(1, 8) if killed < KILLS else 0)
                    killed += code != 0
                equal &= self._is_equal(name, url)
            self._row(f"killed, {name}", start_time, runs=0, kills=killed, equal=equal)

    # Parts

    def _case(self, case: str, name: str, draw: Callable[[], random.Random], parts: int) -> None:
        self._begin()
        self.proxy.choose = lambda seen, total: draw().choice(FAULTS) if draw().random() < SHARE else None
        start_time, runs, equal = time.perf_counter(), 0, True
        while sum(self.proxy.injected.values()) < COUNT:
            url = self._url()
            for number in range(1, parts + 1):
                part = {} if parts == 1 else {"part": f"{number}/{parts}"}
                how = {"resume": True} if parts == 1 else part
                runs += self._again(lambda how=how, url=url: engine.render(self.model, url, **OPTIONS[name], **how))
            if parts > 1:
                runs += self._again(lambda url=url: engine.finish(url))
            picture = self.folder / f"{self.count}.tif"
            runs += self._again(lambda url=url, picture=picture: engine.export(url, picture, overwrite=True))
            equal &= picture.read_bytes() == (self.folder / f"{name}.tif").read_bytes()
            self.proxy.choose, choose = lambda seen, total: None, self.proxy.choose
            equal &= self._is_equal(name, url)
            self.proxy.choose = choose
        self._row(case, start_time, runs=runs, kills=0, equal=equal)

    def _again(self, act: Callable[[], object]) -> int:
        """Repeat until it ends well; returns how often it ran."""
        for run in range(1, 50):
            try:
                act()
            except engine.StorageError:
                continue
            return run
        raise RuntimeError("no run of 50 ended well")

    def _killed(self, name: str, url: str, puts: int) -> int:
        """Run the command, killed with the put of this number; returns its exit code."""
        seen: list[str] = []

        def watch(command: str, path: str) -> None:
            if command == "PUT" and "/c/0/" in path:
                seen.append(path)
                if len(seen) == puts:
                    process.kill()

        words = " ".join(f"--{key} {value}" for key, value in OPTIONS[name].items())
        with tempfile.TemporaryDirectory() as cache:
            os.environ["XDG_CACHE_HOME"], before = cache, os.environ.get("XDG_CACHE_HOME")
            process = start(self.folder, f"render {self.model} {words} --out {url} --resume -q")
            self.proxy.watch = watch
            code, error = finish(process)
            if before is None:
                del os.environ["XDG_CACHE_HOME"]
            else:
                os.environ["XDG_CACHE_HOME"] = before
        assert code in (0, -signal.SIGKILL), error
        return code

    def _begin(self) -> None:
        self.proxy.choose, self.proxy.watch = (lambda seen, total: None), (lambda command, path: None)
        self.proxy.injected, self.proxy.requests = dict.fromkeys(FAULTS, 0), 0

    def _url(self) -> str:
        self.count += 1
        return f"s3://bucket/{self.count}/out.zarr"

    def _is_equal(self, name: str, url: str) -> bool:
        local = files(self.folder / name / "out.zarr")
        return stored(url) == {key: data for key, data in local.items() if data is not None}

    def _row(self, case: str, start_time: float, *, runs: int, kills: int, equal: bool) -> None:
        self.failures += not equal
        row = {"case": case, "requests": self.proxy.requests, "faults": sum(self.proxy.injected.values())}
        row |= self.proxy.injected | {"runs": runs, "kills": kills}
        row |= {"seconds": round(time.perf_counter() - start_time, 1), "equal": equal}
        print(row, flush=True)
        add_row("objects", row)


def main() -> int:
    """Run the named parts, or all."""
    with tempfile.TemporaryDirectory() as folder, s3_server() as port:
        make_bucket(port, "bucket")
        proxy = FaultyProxy(port)
        os.environ["AWS_ENDPOINT_URL"] = proxy.url
        bench = Bench(Path(folder), proxy)
        for part in sys.argv[1:] or ("faults", "kills"):
            getattr(bench, part)()
        return int(bench.failures > 0)


if __name__ == "__main__":
    raise SystemExit(main())
