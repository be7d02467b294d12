"""Faults on purpose: kills, full disks, damage, races, mutated files, limits and signals; each must end as promised.

    python benchmarks/faults.py kills [--case "render, bands"] [--count 20] [--seed N]
    python benchmarks/faults.py cost [--count 5]

Parts: bits, container, cost, damage, fuzz, kills, races, signals, streams; and calls of the system that fail: allocations,
descriptors, disk, opens, reads. A part goes on at the seed after the last one in results/faults.csv, appends a row for each
case, and prints what went wrong; the exit code is then 1. Ctrl-C ends a case early, and its row holds what has been done.
docs/reliability.md shows the rows.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import fuzz  # noqa: E402 (found by the path above)
import torch  # noqa: E402
from harness import RESULTS, add_row  # noqa: E402
from support import commands, damage, ends, forks, kills, races, sandbox, small, timed  # noqa: E402
from support import faults as fault_calls  # noqa: E402
from support.stores import files  # noqa: E402

from engine.archs.esrgan import RRDBNet  # noqa: E402

MIB = 1 << 20
FINISHED = "finished.zarr"
BEFORE = "c64e36b"
"""Commit before checksums, locks, identities and synchronised files."""

Outcome = tuple[int, int, str]
"""Seed, number of faults that hit, and what is wrong, or ""."""


class Part:
    """A kind of fault: what it is tried on, and how."""

    cases: Sequence[str]
    count = 20
    """Number of seeds of a case, unless the command line says otherwise."""
    total: int | str = ""
    """Number of all seeds, if they end."""
    most = 0
    """Largest number of calls that fail, spread evenly, in a part whose seeds are calls; 0: all fail."""

    def __init__(self, folder: Path, server: forks.Server) -> None:
        self.folder, self.server = folder, server

    @cached_property
    def model(self) -> Path:
        torch.manual_seed(0)
        return small.bundle(self.folder, small.lively(RRDBNet(channels=8, blocks=1, growth=4), 0.08))

    def attack(self, case: str, seeds: range) -> Iterator[Outcome]:
        """Try every seed."""
        for seed in seeds:
            folder = self.folder / f"{case.replace(' ', '-')}-{seed}"
            folder.mkdir()
            try:
                yield seed, self.once(case, seed, folder), ""
            except AssertionError as error:
                yield seed, 1, f"{error}"
            shutil.rmtree(folder)

    def once(self, case: str, seed: int, folder: Path) -> int:
        """Try one seed in an empty folder; returns the number of faults. A part without it has its own ``attack``.

        Raises AssertionError.
        """
        raise NotImplementedError(f"{type(self).__name__} has neither once nor attack")


class Kills(Part):
    """kill -9."""

    cases = tuple(kills.CASES)

    @cached_property
    def _kills(self) -> kills.Kills:
        return kills.Kills(self.folder / "kills", self.model, self.server)

    def attack(self, case: str, seeds: range) -> Iterator[Outcome]:
        return self._kills.attack(case, seeds)


class Calls(Part):
    """The n-th call of a kind fails; the seed is n. The server has the library that fails calls."""

    cases = tuple(f"{name}, {how}" for name, how in product(fault_calls.CASES, ("once", "from there on")))
    count = 100_000

    def __init__(self, folder: Path, server: forks.Server, kind: str) -> None:
        super().__init__(folder, server)
        self.kind = fault_calls.KINDS[kind]

    def attack(self, case: str, seeds: range) -> Iterator[Outcome]:
        name, _, how = case.partition(", ")
        number, every, self.total = seeds.start, 1, ""
        while number < seeds.stop:
            folder = self.folder / f"{case}-{number}".replace(" ", "-")
            attack = fault_calls.Attack(
                fault_calls.CASES[name], self.kind, self.model, self.server, folder, is_lasting=how != "once"
            )
            try:
                if self.most:
                    ((_, _, calls),) = attack.run([seeds.stop])
                    every = max(1, math.ceil(calls / self.most))
                numbers = range(number, seeds.stop, every)
                for number, code, calls in attack.run(numbers):
                    if code not in (0, 1):
                        print(f"{case}, seed {number}: a library ended the process with {code}", flush=True)
                    self.total = calls if number > calls else ""
                    yield number, int(number <= calls), ""
                    number += every
                return
            except AssertionError as error:
                yield number, 1, f"{error}"
                number += every


class Finished(Part):
    """Damage to a finished store of three levels."""

    render = "render {model} --size 96x64 --stages 1 --overlap 4 --precision fp32 --executor tiles --tile 8"

    @cached_property
    def store(self) -> Path:
        words = self.render.format(model=self.model)
        code, error = commands.finish(commands.start(self.folder, f"{words} --out {FINISHED}"))
        assert code == 0, error
        return self.folder / FINISHED

    def shards(self, store: Path, levels: str = "*") -> list[Path]:
        return sorted(path for path in store.glob(f"{levels}/c/*/*/*") if path.is_file())


class Bits(Finished):
    """One flipped bit in one shard."""

    cases = "check", "export"
    count = 200

    def attack(self, case: str, seeds: range) -> Iterator[Outcome]:
        flipped, folders = [], []
        for seed in seeds:
            folder, chance = self.folder / f"{case}-{seed}", random.Random(seed)
            shutil.copytree(self.store, folder / "s.zarr")
            shard = chance.choice(self.shards(folder / "s.zarr", "*" if case == "check" else "0"))
            damage.flip(shard, chance.randrange(8 * shard.stat().st_size))
            folders.append(folder)
            flipped.append(str(shard.relative_to(folder)))
        words = ["check", "s.zarr", "-q"] if case == "check" else ["export", "s.zarr", "x.png", "-q"]
        results = sandbox.run([words] * len(seeds), self.folder, folders)
        for seed, folder, shard, result in zip(seeds, folders, flipped, results, strict=True):
            noticed = result.code == 4 and shard in result.output and not (folder / "x.png").exists()
            yield seed, 1, result.problem or ("" if noticed else f"{shard}: not noticed: {result.output}")
            shutil.rmtree(folder)


class Damage(Finished):
    """One to three damaged shards: repaired, rendered again and compared."""

    cases = "check --repair, render --resume", "render --resume"
    count = 100

    def attack(self, case: str, seeds: range) -> Iterator[Outcome]:
        repair = "check" in case
        commands_of_one = [["check", "s.zarr", "--repair", "-q"]] if repair else []
        commands_of_one += [[*self.render.format(model=self.model).split(), "--out", "s.zarr", "--resume", "-q"]]
        work = []
        for seed in seeds:
            folder, chance = self.folder / f"{repair}-{seed}", random.Random(seed)
            shutil.copytree(self.store, folder / "s.zarr")
            kinds = [*damage.DAMAGE, *(["a flipped bit"] if repair else [])]
            shown = chance.choice(kinds)
            for shard in chance.sample(
                self.shards(folder / "s.zarr"), 1 if shown == "a link" else chance.randint(1, 3)
            ):
                if shown == "a flipped bit":
                    damage.flip(shard, chance.randrange(8 * shard.stat().st_size))
                else:
                    damage.DAMAGE[shown](shard)
            work.append((seed, folder, shown))
        words = commands_of_one * len(seeds)
        folders = [folder for _, folder, _ in work for _ in commands_of_one]
        results = iter(sandbox.run(words, self.folder, folders, addresses=1 << 33))
        for seed, folder, shown in work:
            problems = [f"{shown}: {r.problem or r.output}" for r in (next(results) for _ in commands_of_one) if r.code]
            equal = files(folder / "s.zarr") == files(self.store)
            yield seed, 1, " ".join(problems) or ("" if equal else f"{shown}: the repaired store differs")
            shutil.rmtree(folder)


class Races(Part):
    """Two renders into one store, the second one at a random time."""

    cases = tuple(races.RACES)
    count = 25
    seconds = 3.0
    """Longest delay of the second render."""

    @cached_property
    def expected(self) -> list[object]:
        folder = self.folder / "expected"
        folder.mkdir()
        return races.images(folder, self.model)

    def once(self, case: str, seed: int, folder: Path) -> int:
        shutil.copy(self.model, folder / "model.safetensors")
        pause = random.Random(seed).uniform(0, self.seconds)
        races.race(
            folder, case, lambda process: time.sleep(pause), self.expected, self.server.start, forks.Forked.finish
        )
        return 1


class Fuzz(Part):
    """Mutated files, 50 for each seed: read, or refused in one line, within 60 seconds and 1 GiB."""

    cases = "models", "pictures"
    count = 10

    def attack(self, case: str, seeds: range) -> Iterator[Outcome]:
        for seed in seeds:
            failures, _ = fuzz.batch(
                seed, ROOT / "build" / "fuzz", lambda path: fuzz.is_picture(path) == (case == "pictures")
            )
            yield seed, fuzz.BATCH, "; ".join(f"{name}: {wrong}" for name, wrong in failures)


class Signals(Part):
    """Signals of several kinds at several times; the seed counts the pairs."""

    cases = tuple(ends.COMMANDS)
    grid = tuple(product(sorted(ends.DELAYS, key=lambda delay: delay not in (0.1, 0.8, 2.0)), ends.SIGNALS))
    count = total = len(grid)

    def once(self, case: str, seed: int, folder: Path) -> int:
        delay, kind = self.grid[(seed - 1) % len(self.grid)]
        ends.fill(folder, self.model)
        try:
            ends.stop(folder, ends.COMMANDS[case], ends.SIGNALS[kind], delay)
        except AssertionError as error:
            raise AssertionError(f"{kind} after {delay} s: {error}") from None
        return 1


class Streams(Part):
    """Standard streams that are closed or full; the seed counts them."""

    cases = tuple(name for name in ends.COMMANDS if name != "train")
    count = total = len(ends.STREAMS)

    def once(self, case: str, seed: int, folder: Path) -> int:
        ends.fill(folder, self.model)
        ends.lose_stream(folder, case, list(ends.STREAMS)[(seed - 1) % len(ends.STREAMS)])
        return 1


class Container(Part):
    """Limits of memory: a made-up control group in a private mount namespace, and RLIMIT_AS."""

    cases = "control group of 300 MiB", "control group of 400 to 1,200 MiB", "address space of 600 to 3,000 MiB"

    def once(self, case: str, seed: int, folder: Path) -> int:
        chance = random.Random(seed)
        size = f"{chance.randint(64, 2048)}x{chance.randint(64, 2048)}"
        model = chance.choice(["", f"{self.model} "])
        words = (
            f"render {model}--size {size} --roi 0,0,64,64 --out o.zarr --executor {chance.choice(['bands', 'tiles'])}"
        )
        command = [sys.executable, "-m", "engine", *words.split()]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        if case.startswith("address"):
            done = timed.run(["prlimit", f"--as={chance.randint(600, 3000) * MIB}", *command], folder, environment)
        else:
            limit = (300 if case.endswith(" 300 MiB") else chance.randint(400, 1200)) * MIB
            done, peak = self._in_group(folder, command, environment, limit)
            assert peak <= limit, f"{words}: {peak / MIB:.0f} of {limit / MIB:.0f} MiB"
        assert done.code in (0, 1, 3, 4), f"{words}: ended with {done.code}: {done.err[-500:]}"
        assert "Traceback" not in done.err, done.err
        errors = [line for line in done.err.splitlines() if line.startswith("engine: ")]
        assert len(errors) == (done.code != 0), done.err
        return 1

    def _in_group(
        self, folder: Path, command: list[str], environment: dict[str, str], limit: int
    ) -> tuple[timed.Done, int]:
        """Run in a mount namespace whose /sys/fs/cgroup is made of files; a thread counts what the process uses.

        Returns:
            The end, and the peak of anonymous bytes. Libraries are mapped files, which the kernel drops when a group is full.
        """
        group = folder / "cgroup" / "memory"
        group.mkdir(parents=True)
        (group / "memory.limit_in_bytes").write_text(f"{limit}\n")
        usage, pid, peak, ended = group / "memory.usage_in_bytes", folder / "pid", 0, threading.Event()
        usage.write_text(f"{20 * MIB}\n")

        def count() -> None:
            nonlocal peak
            while not ended.wait(0.01):
                try:
                    _, resident, shared, *_ = map(int, Path(f"/proc/{int(pid.read_text())}/statm").read_text().split())
                except (OSError, ValueError):
                    continue
                peak = max(peak, (resident - shared) * resource.getpagesize())
                part = usage.with_suffix(".part")
                part.write_text(f"{resident * resource.getpagesize()}\n")
                part.rename(usage)

        thread = threading.Thread(target=count)
        thread.start()
        script = 'echo $$ > pid && mount --bind cgroup /sys/fs/cgroup && exec "$@"'
        try:
            done = timed.run(["unshare", "--mount", "sh", "-c", script, "sh", *command], folder, environment)
        finally:
            ended.set()
            thread.join()
        return done, peak


PARTS = {
    "bits": Bits, "container": Container, "damage": Damage, "fuzz": Fuzz, "kills": Kills, "races": Races, "signals": Signals,
    "streams": Streams, **{kind: partial(Calls, kind=kind) for kind in fault_calls.KINDS},
}  # fmt: skip


def run(part: Part, name: str, case: str, first: int, count: int) -> int:
    """Try a case, append its row, and return the number of failures."""
    start, faults, failures, last, stopped = time.perf_counter(), 0, 0, first - 1, False
    try:
        for last, hits, problem in part.attack(case, range(first, first + count)):
            faults += hits
            if problem:
                failures += 1
                print(f"{name}, {case}, seed {last}: {problem}", flush=True)
    except KeyboardInterrupt:
        stopped = True
    row = {"part": name, "case": case, "first": first, "last": last, "total": part.total, "faults": faults}
    row |= {"failures": failures, "seconds": round(time.perf_counter() - start, 1)}
    print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if last >= first:
        add_row("faults", row)
    if stopped:
        raise KeyboardInterrupt
    return failures


def next_seed(name: str, case: str) -> int:
    """The seed after the last row of a case; the first one if all have been tried."""
    path = RESULTS / "faults.csv"
    rows = list(csv.DictReader(path.open(newline=""))) if path.exists() else []
    rows = [row for row in rows if (row["part"], row["case"]) == (name, case)]
    if not rows or (rows[-1]["total"] and int(rows[-1]["last"]) >= int(rows[-1]["total"])):
        return 1
    return int(rows[-1]["last"]) + 1


def cost(folder: Path, count: int) -> None:
    """Render in turns by this engine and by the one before the safety of stores; append medians to faults_cost.csv."""
    archive = subprocess.run(["git", "archive", BEFORE], cwd=ROOT, check=True, capture_output=True).stdout
    (folder / "before").mkdir()
    subprocess.run(["tar", "x", "-C", folder / "before"], input=archive, check=True)
    words = [
        "render",
        "--size",
        "512x384",
        "--seed",
        "7",
        "--executor",
        "bands",
        "--precision",
        "fp32",
        "--overwrite",
        "--out",
    ]
    taken: dict[str, list[timed.Done]] = {"before": [], "after": []}
    for number in range(count + 1):  # the first ones measure the machine
        for name, root in (("before", folder / "before"), ("after", ROOT)):
            environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-m", "engine", *words, str(folder / f"{name}.zarr")]
            done = timed.run(command, folder, environment)
            assert done.code == 0, done.err
            print(f"{name}: {done.cpu:.2f} CPU s, {done.wall:.2f} s", flush=True)
            if number:
                taken[name].append(done)
    row: dict[str, object] = {"commit": BEFORE, "renders": count}
    for name, results in taken.items():
        size = sum(path.stat().st_size for path in (folder / f"{name}.zarr").rglob("*") if path.is_file())
        row |= {f"{name}_cpu": round(statistics.median(done.cpu for done in results), 2)}
        row |= {f"{name}_wall": round(statistics.median(done.wall for done in results), 2), f"{name}_bytes": size}
    print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    add_row("faults_cost", row)


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("part", choices=[*PARTS, "cost"])
    words.add_argument("--case", action="append", help="case of the part; by default all")
    words.add_argument("--count", type=int, help="number of seeds of each case")
    words.add_argument("--seed", type=int, help="first seed; by default the one after the last row")
    words.add_argument("--most", type=int, default=0, help="number of calls of the system that fail, spread evenly")
    options = words.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts in the background
    torch.set_num_threads(1)
    failures = 0
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        os.environ["XDG_CACHE_HOME"] = str(Path(name) / "cache")
        if options.part == "cost":
            cost(Path(name), options.count or 5)
            return 0
        shim = fault_calls.build_shim(Path(name)) if options.part in fault_calls.KINDS else None
        with forks.Server(shim) as server:
            part = PARTS[options.part](Path(name), server)
            part.most = options.most
            try:
                for case in options.case or part.cases:
                    first = options.seed or next_seed(options.part, case)
                    failures += run(part, options.part, case, first, options.count or part.count)
            except KeyboardInterrupt:
                return 130
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
