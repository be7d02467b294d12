"""Renders by Dask workers: equal bytes, faults of workers and hosts, and what workers cost.

    python benchmarks/bench_workers.py [equal] [faults] [hosts] [cost] [long]

equal   1, 2 and 3 workers, tiles and bands, two steps: the store must equal that of one run.
faults  A worker is killed, stopped, or has a full disk; the scheduler is killed; Ctrl-C. The same command then finishes the
        store, which must equal that of one run.
hosts   Three hosts as network namespaces of this machine: a scheduler and two workers. The link of one is cut while it renders,
        and comes back later. Needs root and Linux.
cost    CPU seconds and wall time of the shares by one and by two workers, one core and one thread each, and the time that Dask
        takes for a share that does nothing. Needs two cores without other work for the wall time.
long    The same for renders of about two minutes by one worker, by the default model in bands and in tiles: one share by one
        worker, and the usual number of shares by two. The time of every share beside its planned one goes to
        results/shares.csv. Takes about 8 minutes.

Writes results/workers.csv; a case that fails writes a row too, and the exit code is 1.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
os.environ["OMP_NUM_THREADS"] = "1"  # as many as the workers have

import torch  # noqa: E402
from harness import add_row, small_model  # noqa: E402
from support.clusters import Cluster, wait_until  # noqa: E402
from support.commands import finish, start  # noqa: E402
from support.faults import build_shim, is_possible  # noqa: E402
from support.small import photograph  # noqa: E402
from support.stores import render, shards  # noqa: E402

from engine.io.files import sha256  # noqa: E402
from engine.model.bundle import load  # noqa: E402
from engine.plan.request import Request  # noqa: E402
from engine.workers import cluster, conduct, tasks  # noqa: E402
from engine.workers.render import WorkersRender  # noqa: E402

TILES = Request(size=(512, 384), stages=2, tile=8, overlap="4", precision="fp32", executor="tiles")
BANDS = replace(TILES, executor="bands", tile=16)
WORDS = "--size 512x384 --stages 2 --tile 8 --overlap 4 --precision fp32 --executor tiles"
COSTS = {
    "tiles": replace(TILES, size=(1024, 1024), tile=64, overlap="exact"),
    "bands, 4096 rows": replace(BANDS, size=(1024, 4096), tile=None),
    "bands, 16384 rows": replace(BANDS, size=(1024, 16384), tile=None),
}
LONG = {
    "bands, 4096x6144": Request(size=(4096, 6144), stages=2, executor="bands"),
    "tiles, 4096x6144": Request(size=(4096, 6144), stages=2, executor="tiles", tile=256),
}
DEFAULT = ROOT / "models" / "picosdeeuropa.safetensors"
SHARES = 6
ECHOES = 200


def echo(order: tasks.Order) -> tasks.Answer[None]:
    """A share that does nothing."""
    return tasks.Answer("", "")


def digests(folder: Path) -> dict[str, str]:
    """Every file below a folder, with its digest."""
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def pin(processes: Iterable[int]) -> None:
    """Bind each process to a core of its own, where the system can: writers of a lone worker would use the idle core."""
    if hasattr(os, "sched_setaffinity"):
        for process, core in zip(processes, sorted(os.sched_getaffinity(0)), strict=False):
            for thread in Path(f"/proc/{process}/task").iterdir():
                os.sched_setaffinity(int(thread.name), {core})


class Bench:
    """A working folder with a model, and the stores of one run."""

    def __init__(self, folder: Path):
        self.folder, self.failures, self.count, self.known = folder, 0, 0, {}
        self.model = small_model(folder, 2).path

    def new(self) -> Path:
        """A folder for a case."""
        self.count += 1
        folder = self.folder / f"case-{self.count}"
        folder.mkdir()
        return folder

    def check(self, case: str, request: Request, out: Path, model: Path | None = None, **values: object) -> None:
        """Compare a store with that of one run, and append the row."""
        if request not in self.known:
            one = self.new() / "out.zarr"
            render(load(model or self.model), request, one)
            self.known[request] = digests(one.parent)
        is_equal = digests(out.parent) == self.known[request]
        self.failures += not is_equal
        row = {"case": case, "workers": "", "shares": "", "cpu_s": "", "wall_s": "", "efficiency": "", "share_ms": ""}
        row |= values | {"equal": is_equal}
        print(row, flush=True)
        add_row("workers", row)

    # Cases

    def equal(self) -> None:
        for workers in (1, 2, 3):
            with cluster.connected(f"local:{workers}", (), 1 << 30) as client:
                for name, request in (("tiles", TILES), ("bands", BANDS)):
                    out = self.new() / "out.zarr"
                    run = WorkersRender.begin(conduct.Conductor(client, print), self.model, request, out)
                    run.run()
                    self.check(f"equal, {name}", request, out, workers=workers, shares=run.begun.shares.count)

    def faults(self) -> None:
        for case in ("a worker is killed", "a worker is stopped"):
            number = signal.SIGKILL if "killed" in case else signal.SIGSTOP
            folder = self.new()
            with Cluster(folder) as dask:
                out, process = self._begin(dask, folder, 3)
                wait_until(lambda out=out, dask=dask: dask.busy(out))[0].send_signal(number)
                self._end(process, 0)
                self.check(case, TILES, out, workers=3, shares=SHARES)
        for case, code in (("the scheduler is killed", 1), ("Ctrl-C", 130)):
            folder = self.new()
            with Cluster(folder) as dask:
                out, process = self._begin(dask, folder, 2)
                wait_until(lambda out=out: shards(out, 0) >= 8)
                dask.scheduler.kill() if "killed" in case else process.send_signal(signal.SIGINT)
                self._end(process, code)
            with Cluster(folder) as dask:
                self._end(self._begin(dask, folder, 2)[1], 0)
            self.check(f"{case}, and the command is repeated", TILES, out, workers=2, shares=SHARES)
        if is_possible():
            folder = self.new()
            (folder / "out").mkdir()
            shim = build_shim(folder)
            with Cluster(folder) as dask:
                dask.add(shim=shim, first=60, full=folder / "out")
                out, process = self._begin(dask, folder, 1, known=1)
                error = self._end(process, 0)
                assert re.search(r"worker worker-0 gets no more work: .*No space left on device", error), error
                self.check("the disk of a worker is full", TILES, out, workers=2, shares=SHARES)

    def hosts(self) -> None:
        folder, out = self.new(), None
        with Hosts(3) as hosts, Cluster(folder, hosts.address(0), hosts.prefix(0)) as dask:
            for host in (1, 2):
                dask.add(prefix=hosts.prefix(host))
            out, process = self._begin(dask, folder, 0, known=2, prefix=hosts.prefix(0))
            wait_until(lambda: len(dask.busy(out)) == 2)
            hosts.link(2, "down")
            wait_until(lambda: "Remove worker" in (folder / "scheduler.log").read_text())
            assert process.poll() is None  # its share is not done
            hosts.link(2, "up")
            self._end(process, 0)
            self.check("the link of a host is cut", TILES, out, workers=2, shares=SHARES)

    def cost(self) -> None:
        for name, request in COSTS.items():
            # Alone, with the repeated work, and beside each other.
            self._cost(f"cost, {name}", self.model, request, ((1, 1), (1, 2), (2, 2)))

    def long(self) -> None:
        for name, request in LONG.items():
            self._cost(f"long, {name}", DEFAULT, request, ((1, 1), (2, None)))

    def _cost(self, case: str, model: Path, request: Request, ways: tuple[tuple[int, int | None], ...]) -> None:
        """Measure (workers, shares); None: the usual number of shares."""
        one = None
        width, height = request.size
        # A picture, since step 1 is a second in every share.
        picture = photograph(self.new() / "picture.png", height // 16, width // 16)
        request = replace(request, init=picture)
        small = replace(request, size=(1024, 1024), init=photograph(self.new() / "picture.png", 64, 64))
        for workers, shares in ways:
            with cluster.connected(f"local:{workers}", (), 2 << 30) as client:
                pin(client.run(os.getpid).values())
                conductor = conduct.Conductor(client, print)
                warm = self.new() / "out.zarr"  # libraries, networks and the caches of measurements
                WorkersRender.begin(conductor, model, small, warm, shares=2).run()
                out = self.new() / "out.zarr"
                run = WorkersRender.begin(conductor, model, request, out, shares=shares)
                wall = run.run().measurements.seconds
                cpu = sum(done.cpu_seconds for done in run.results)
                one = one or (cpu, wall)
                order = tasks.order_of(None, request, out, conductor.topic)
                begin = time.perf_counter()
                conductor.run([conduct.Work(f"echo-{index}", echo, (order,)) for index in range(ECHOES)])
                echoes = 1000 * (time.perf_counter() - begin) / ECHOES
                conductor.close()
                if case.startswith("long"):
                    self._add_shares(case, workers, run)
                self.check(
                    case, request, out, model, workers=workers, shares=len(run.results), cpu_s=round(cpu, 2), wall_s=round(wall, 2),
                    efficiency=f"CPU {one[0] / cpu:.2f}, wall {one[1] / wall / workers:.2f}", share_ms=round(echoes, 1),
                )  # fmt: skip

    @staticmethod
    def _add_shares(case: str, workers: int, run: WorkersRender) -> None:
        """Append the planned and the measured time of every share: its networks, and all of it."""
        for number, (planned, done) in enumerate(zip(run.begun.seconds, run.results, strict=True), 1):
            measured = done.measurements
            row = {"case": case, "workers": workers, "share": f"{number}/{len(run.results)}"}
            row |= {"planned_s": round(planned, 2), "compute_s": round(measured.compute_seconds, 2)}
            row |= {"share_s": round(measured.seconds, 2), "ratio": round(measured.seconds / planned, 3)}
            print(row, flush=True)
            add_row("shares", row)

    def _begin(self, dask: Cluster, folder: Path, count: int, *, known: int = 0, prefix: tuple[str, ...] = ()):
        """Add workers and start the command, as soon as they are there."""
        for _ in range(count):
            dask.add()
        out = folder / "out" / "out.zarr"
        words = f"render {self.model} {WORDS} --out {out} --dask {dask.address} --shares {SHARES}"
        if not prefix:
            return out, start(folder, words)
        command = [*prefix, sys.executable, "-m", "engine", *words.split()]
        return out, subprocess.Popen(command, cwd=folder, env=dask.environment, stderr=subprocess.PIPE)

    @staticmethod
    def _end(process: subprocess.Popen[bytes], expected: int) -> str:
        code, error = finish(process)
        assert code == expected, (code, error)
        return error


class Hosts:
    """Hosts of this machine: network namespaces on a bridge."""

    def __init__(self, count: int):
        self.names = [f"engine{os.getpid() % 10000}-{index}" for index in range(count)]
        self.bridge = f"eb{os.getpid() % 10000}"

    def address(self, host: int) -> str:
        """IP address of a host."""
        return f"10.213.{os.getpid() % 250}.{host + 1}"

    def prefix(self, host: int) -> tuple[str, ...]:
        """Words that run a command there."""
        return ("ip", "netns", "exec", self.names[host])

    def link(self, host: int, state: str) -> None:
        """Cut or join the cable of a host."""
        _ip("link", "set", f"{self.bridge}-{host}", state)

    def __enter__(self) -> Hosts:
        _ip("link", "add", self.bridge, "type", "bridge")
        _ip("link", "set", self.bridge, "up")
        for host, name in enumerate(self.names):
            cable = f"{self.bridge}-{host}"
            _ip("netns", "add", name)
            _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", cable, "master", self.bridge, "up")
            for words in (f"addr add {self.address(host)}/24 dev eth0", "link set eth0 up", "link set lo up"):
                _ip("-n", name, *words.split())
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], check=False)
        subprocess.run(["ip", "link", "delete", self.bridge], check=False)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def main(parts: list[str]) -> int:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="workers-") as name:
        os.environ["XDG_CACHE_HOME"] = str(Path(name) / "cache")
        bench = Bench(Path(name))
        for part in parts or ("equal", "faults", "hosts", "cost"):
            getattr(bench, part)()
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
