"""Every check and measurement of a GPU, in at most eight minutes, by one command.

    python benchmarks/gpu_quick.py --out FOLDER [--wheels FOLDER] [--only STEP ...] [--limit 480]
    python benchmarks/gpu_quick.py --out FOLDER --device cpu --tiny      a rehearsal on small shapes, without a GPU
    python benchmarks/gpu_quick.py --fetch-wheels FOLDER [--python 3.12]  on another machine: what --wheels installs

It needs a Python with torch and Triton, no network and no virtual environment; packages that are missing come from wheels.
The steps are those of benchmarks/gpu_steps.py. Each runs in a process of its own with a limit of its own, so that a step that
fails, hangs or ends its process is a row and never the end. FOLDER then holds rows.csv (flushed row by row), steps.log (all
output) and profile.txt. The exit code is 1 if a step failed. To publish the rows, copy rows.csv to
benchmarks/results/gpu_<machine>.csv.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
STEPS = {
    "machine": 40,
    "kernels": 90,
    "render": 90,
    "networks": 120,
    "profile": 45,
    "frames": 180,
    "recovery": 60,
    "tests": 90,
}
"""Step -> its limit in seconds; ``--limit`` bounds their sum."""

LEAST = 10
"""Seconds below which no step is started."""

GIVEN = ("torch", "triton", "numpy")
"""Packages that the machine provides, with all that they need."""

SOURCES = ("pyvips",)
"""Packages of Python alone that are published without a wheel."""

PLATFORMS = [*(f"manylinux_2_{minor}_x86_64" for minor in range(5, 36)), "manylinux2014_x86_64", "manylinux1_x86_64"]


def add_row(out: Path, step: str, case: str, quantity: str, value: object) -> None:
    """Append a row to ``out/rows.csv``; the file is whole after each row."""
    path = out / "rows.csv"
    row = {"date": datetime.date.today(), "step": step, "case": case, "quantity": quantity, "value": value}
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def environment(out: Path) -> dict[str, str]:
    """Environment of the steps: this project and the installed wheels first, caches of their own, kernels not interpreted."""
    paths = [str(out / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    names = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return names | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}


def run(command: list[str], variables: dict[str, str], log: Path, limit: float) -> str:
    """Run a step with its output in the log; returns why it failed, or ""."""
    with log.open("ab") as file:
        process = subprocess.Popen(command, env=variables, stdout=file, stderr=file, start_new_session=True)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"stopped at its limit of {limit:g} s"
    lines = log.read_text(errors="replace").strip().splitlines()
    return f"exit code {code}: {lines[-1][:300] if lines else ''}" if code else ""


def install(wheels: Path, out: Path) -> None:
    """Unpack wheels into ``out/site``, without a registry and without their dependencies."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--no-compile",
        "--upgrade",
    ]
    subprocess.run([*command, "--target", str(out / "site"), *map(str, sorted(wheels.glob("*.whl")))], check=True)


def requirements() -> list[str]:
    """Pinned versions, as installed here, of all packages that a GPU machine may lack."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*map(Requirement, project["dependencies"]), *map(Requirement, ("pytest", "pytest-timeout", "hypothesis"))]
    versions: dict[str, str] = {}
    while wanted:
        requirement = wanted.pop()
        name = requirement.name.lower().replace("_", "-")
        if name in GIVEN or name in versions:
            continue
        versions[name] = importlib.metadata.version(name)
        for text in importlib.metadata.requires(name) or ():
            needed = Requirement(text)
            extras = requirement.extras or {""}
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                wanted.append(needed)
    return [f"{name}=={version}" for name, version in sorted(versions.items())]


def fetch(folder: Path, python: str) -> None:
    """Download the wheels of ``requirements`` for a Linux machine with another Python."""
    pip = [sys.executable, "-m", "pip"]
    source = [text for text in requirements() if text.split("==")[0] in SOURCES]
    subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), *source], check=True)
    command = [*pip, "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    command += ["--python-version", python, "--implementation", "cp"]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    subprocess.run([*command, *sorted(set(requirements()) - set(source))], check=True)
    size = sum(path.stat().st_size for path in folder.glob("*.whl"))
    print(f"{folder}: {size / 2**20:.1f} MiB of wheels")


def has_cuda(variables: dict[str, str]) -> bool:
    question = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", question], env=variables, check=False).returncode == 0


def main(arguments: list[str] | None = None) -> int:
    """Run the steps; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the rows and the log")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--tiny", action="store_true", help="run every step on small shapes")
    parser.add_argument("--only", nargs="+", metavar="STEP", choices=list(STEPS), help=", ".join(STEPS))
    parser.add_argument("--limit", type=float, default=480, help="seconds of all steps together; default: 480")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install first")
    parser.add_argument(
        "--fetch-wheels", type=Path, metavar="FOLDER", help="download wheels for another machine, and end"
    )
    parser.add_argument("--python", default="3.12", help="that machine's Python; default: 3.12")
    options = parser.parse_args(arguments)
    if options.fetch_wheels is not None:
        fetch(options.fetch_wheels, options.python)
        return 0
    if options.out is None:
        parser.error("--out: no folder for the rows; give --out FOLDER")
    options.out.mkdir(parents=True, exist_ok=True)
    out = options.out.resolve()
    if options.wheels is not None:
        install(options.wheels, out)
    variables = environment(out)
    if options.device.startswith("cuda") and not has_cuda(variables):
        print("gpu_quick: no CUDA device here; nothing was measured")
        return 0
    end, failed = time.monotonic() + options.limit, []
    for step in options.only or STEPS:
        start = time.monotonic()
        limit = round(min(STEPS[step], end - start), 1)
        command = [sys.executable, str(ROOT / "benchmarks" / "gpu_steps.py"), step, options.device, str(out)]
        command += ["--tiny"] * options.tiny
        problem = run(command, variables, out / "steps.log", limit) if limit >= LEAST else "skipped: no time was left"
        seconds = time.monotonic() - start
        add_row(out, step, "step", "failed" if problem else "seconds", problem or f"{seconds:.1f}")
        print(f"{step}: {seconds:.1f} s{f', {problem}' if problem else ''}", flush=True)
        failed += [step] * bool(problem)
    print(f"rows: {out / 'rows.csv'}; failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
