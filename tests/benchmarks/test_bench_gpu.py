"""GPU benchmarks: one line without a GPU, and a rehearsal of every section on the CPU."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SECTIONS = ("ceilings", "kernels", "networks", "precision", "render", "busy")


def run(*command, **variables):
    # Without Triton's interpreter, which would take minutes for networks.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=BENCHMARKS)


def test_one_line_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for command in (["bash", "gpu.sh"], [sys.executable, "bench_gpu.py"]):
        done = run(*command, PYTHON=sys.executable)
        assert (done.returncode, done.stderr) == (0, "")
        assert len(done.stdout.splitlines()) == 1
        assert done.stdout.endswith("no CUDA device here; nothing was measured\n")


@pytest.mark.slow
def test_cpu_rows_need_another_folder():
    done = run(sys.executable, "bench_gpu.py", "--device", "cpu", "--tiny")
    assert done.returncode == 2
    assert "only a rehearsal is possible" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rehearsal_of_every_section(tmp_path):
    done = run(sys.executable, "bench_gpu.py", "--device", "cpu", "--tiny", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    with (tmp_path / "gpu_cpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    by_section = {section: [r for r in rows if r["section"] == section] for section in SECTIONS}
    assert all(by_section.values())
    assert not [r for r in rows if r["quantity"] in ("wrong", "refused")]
    assert {"esrgan", "swinir"} <= {r["case"].split()[0] for r in by_section["networks"]}
    methods = {r["case"].split(" ", 1)[1] for r in by_section["render"]}
    batched = {f"engine batched --vram {n}" for n in ("1GiB", "1.25GiB", "8GiB")}
    assert methods == {*batched, "engine bands --vram 8GiB", "tiles of 16, pad 10", "whole image"}
    errors = {r["case"]: float(r["value"]) for r in by_section["render"] if r["quantity"] == "max_levels"}
    assert set(errors) == {f"144x96 {method}" for method in methods}
    assert max(errors.values()) <= 2
    assert "Self CPU" in (tmp_path / "gpu_cpu_trace.txt").read_text()
    shares = [float(r["value"]) for r in by_section["busy"] if r["quantity"] == "busy"]
    assert all(0 < share <= 1 for share in shares)
