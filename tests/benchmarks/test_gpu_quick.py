"""The GPU script, rehearsed without a GPU: every step, and that a step which fails or hangs is a row and never the end."""

import csv
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))
import gpu_quick  # noqa: E402 (found by the path above)


def script(*options, python=sys.executable, **variables):
    # Without Triton's interpreter, which would take minutes for networks.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    command = [python, BENCHMARKS / "gpu_quick.py", *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def rows(folder):
    with (folder / "rows.csv").open() as file:
        return list(csv.DictReader(file))


def wheel(folder):
    """Wheel of one module, as a machine without network gets its packages."""
    folder.mkdir()
    with zipfile.ZipFile(folder / "carried-1.0-py3-none-any.whl", "w") as file:
        file.writestr("carried.py", "")
        file.writestr("carried-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: carried\nVersion: 1.0\n")
        file.writestr("carried-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr("carried-1.0.dist-info/RECORD", "")
    return folder


def test_one_line_without_a_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = script("--out", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "gpu_quick: no CUDA device here; nothing was measured\n"


def test_a_step_that_fails_is_a_row(tmp_path):
    """Even where PyTorch itself does not import; and no step starts after the limit of all."""
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "torch.py").write_text("raise ImportError('no such driver')")
    out = tmp_path / "out"
    done = script("--device", "cpu", "--out", out, "--only", "machine", "tests", PYTHONPATH=str(broken))
    assert done.returncode == 1
    assert [(row["step"], row["quantity"]) for row in rows(out)] == [("machine", "failed"), ("tests", "failed")]
    assert all("no such driver" in row["value"] for row in rows(out))
    script("--device", "cpu", "--out", out, "--only", "frames", "--limit", "1")
    assert rows(out)[-1]["value"] == "skipped: no time was left"


def test_a_step_that_hangs_is_stopped_with_its_children(tmp_path):
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    problem = gpu_quick.run([sys.executable, "-c", child], dict(os.environ), tmp_path / "log", 0.5)
    assert problem == "stopped at its limit of 0.5 s"


def test_requirements_are_pinned_and_leave_out_what_a_gpu_machine_has():
    names = dict(text.split("==") for text in gpu_quick.requirements())
    assert {"zarr", "pyvips", "pyvips-binary", "safetensors", "pytest", "donfig"} <= set(names)
    assert not {"torch", "triton", "numpy", "sympy", "ruff"} & set(names)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rehearsal_of_every_step(tmp_path):
    """From a virtual environment made inside another: it sees none of its parent's packages, as on many GPU machines."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    done = script(
        "--device", "cpu", "--tiny", "--out", tmp_path / "out", "--wheels", wheel(tmp_path / "wheels"),
        python=tmp_path / "venv" / "bin" / "python", PYTHONPATH=sysconfig.get_path("purelib"), PIP_NO_INDEX="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / "site" / "carried.py").exists()
    by_step = {step: [row for row in rows(tmp_path / "out") if row["step"] == step] for step in gpu_quick.STEPS}
    assert all(step[-1]["quantity"] == "seconds" for step in by_step.values())
    assert not [row for step in by_step.values() for row in step if row["quantity"] in ("wrong", "refused", "failed")]
    assert {row["case"].split()[0] for row in by_step["networks"][:-1]} == {"esrgan", "swinir"}
    errors = [row for row in by_step["frames"] + by_step["render"] if row["quantity"] == "max_levels"]
    assert len(errors) == 2 * 2 + 3
    assert max(float(row["value"]) for row in errors) <= 2
    (equal,) = [row["value"] for row in by_step["recovery"] if row["quantity"] == "equal"]
    assert equal == "1"
    assert "aten::" in (tmp_path / "out" / "profile.txt").read_text()
