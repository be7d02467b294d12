"""Fuzz models, checkpoints and pictures: sound files of the corpus' kinds, mutated at random, read by the command line.

    python tests/fuzz.py [--minutes 60] [--seed 0] [--keep build/fuzz]

Without --minutes it goes on until Ctrl-C. A mutant that ends in a traceback, a crash, several lines, more than 60 seconds or
more memory than its limit is kept in the folder, and its path is printed; the exit code is then 1.
"""

import argparse
import importlib.util
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from support.sandbox import run  # noqa: E402 (found by the path above)

SPEC = importlib.util.spec_from_file_location("corpus_make", Path(__file__).parent / "corpus" / "make.py")
make = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(make)

BATCH = 50
"""Mutants of one server (support/sandbox.py)."""

MEMORY = 1 << 30
"""Largest peak of resident bytes."""

NUMBERS = [0, 1, 127, 128, 255, 256, 32767, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1]
TEXTS = [b"0", b"-1", b"9" * 20, b"NaN", b"null", b"[" * 500, b'"', b"\0", b"\x1b[31m", b"."]


def mutate(content, rng):
    """A copy with one to four changes, most of them near the beginning, where headers are."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        reach = rng.choice([32, 256, len(data), len(data)])
        at = rng.randrange(max(1, min(reach, len(data))))
        kind = rng.randrange(8)
        if kind == 0 and data:
            data[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 2:
            width, order = rng.choice([1, 2, 4, 8]), rng.choice(["little", "big"])
            data[at : at + width] = (rng.choice(NUMBERS) % 256**width).to_bytes(width, order)
        elif kind == 3:
            del data[at : at + rng.choice([1, 4, 64, 1024])]
        elif kind == 4:
            data[at:at] = rng.choice(TEXTS)
        elif kind == 5:
            data[at : at + len(text)] = (text := rng.choice(TEXTS))
        elif kind == 6:
            source = rng.randrange(max(1, len(data)))
            data[at:at] = data[source : source + rng.choice([4, 32, 256])]
        else:
            del data[rng.randrange(max(1, len(data))) :]
    return bytes(data)


def is_picture(path):
    return make.command(path)[0] == make.PICTURE


def mutants(folder, rng, is_wanted=lambda path: True):
    """Write a batch of mutants of the wanted files; returns their paths."""
    source = folder / "seeds"
    if not source.exists():
        source.mkdir()
        make.seeds(source)
    seeds = sorted(path for path in source.iterdir() if path.suffix != ".param" and is_wanted(path))
    paths = []
    for number in range(BATCH):
        seed = rng.choice(seeds)
        path = folder / f"{number}{seed.suffix}"
        graph = seed.with_suffix(".param")
        if graph.exists() and seed.suffix == ".bin":
            half = rng.random() < 0.5
            path.write_bytes(mutate(seed.read_bytes(), rng) if half else seed.read_bytes())
            path.with_suffix(".param").write_bytes(graph.read_bytes() if half else mutate(graph.read_bytes(), rng))
        else:
            path.write_bytes(mutate(seed.read_bytes(), rng))
        paths.append(path)
    return paths


def problem(result):
    """Problem of a run, or ""."""
    if result.problem:
        return result.problem
    return f"peak of {result.peak >> 20} MiB" if result.peak > MEMORY else ""


def batch(seed, keep=None, is_wanted=lambda path: True):
    """Run one batch; returns (mutant, problem) of every failure, and the number of mutants read without refusal."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        paths = mutants(Path(name), rng, is_wanted)
        results = run(map(make.command, paths), name)
        failures = [(path, wrong) for path, result in zip(paths, results, strict=True) if (wrong := problem(result))]
        if keep is not None and failures:
            keep.mkdir(parents=True, exist_ok=True)
            for path, _ in failures:
                for part in {path, path.with_suffix(".param")}:
                    if part.exists():
                        shutil.copy(part, keep / f"{seed}-{part.name}")
        return [(f"{seed}-{path.name}", wrong) for path, wrong in failures], sum(r.code == 0 for r in results)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("build/fuzz"))
    options = parser.parse_args()
    end, seed, failed = time.monotonic() + 60 * options.minutes, options.seed, 0
    try:
        while time.monotonic() < end:
            failures, read = batch(seed, options.keep)
            failed += len(failures)
            for name, wrong in failures:
                sys.stdout.write(f"{options.keep / name}: {wrong}\n")
            sys.stdout.write(f"seed {seed}: {BATCH} mutants, {read} read, {len(failures)} wrong\n")
            sys.stdout.flush()
            seed += 1
    except KeyboardInterrupt:
        pass
    sys.stdout.write(f"{(seed - options.seed) * BATCH} mutants, {failed} wrong\n")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
