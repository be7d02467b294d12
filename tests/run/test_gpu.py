"""On a CUDA device: lanes with recorded launches against tiles one by one, and the promise about the device's memory."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support.devices import needs_gpu
from support.stores import attributes, pixels

from engine.archs.esrgan import RRDBNet
from engine.job import Job
from engine.plan.request import Request

GIB = 1 << 30
SMALL = Request(size=(384, 512), stages=2, tile=16, overlap="4", device="cuda", precision="fp32")

RENDER = """
import sys, torch
from engine.cli.app import main
limit = float(sys.argv[1]) / torch.cuda.mem_get_info()[1]
torch.cuda.set_per_process_memory_fraction(min(1.0, limit))
main(sys.argv[2:])
"""


def render(model, request, out):
    job = Job.prepare(model, request, out)
    for _ in job.run(job.open_sink(resume=False, overwrite=False)):
        pass
    return job


@needs_gpu
@pytest.mark.parametrize("name", ["rrdb", "swinir", "noisy"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_stream_gives_the_pixels_of_tiles_one_by_one(tmp_path, models, name, precision):
    """A batch may be summed in another order: bits are a CPU's promise, here it is a level (two in half precision)."""
    for executor in ("tiles", "batched"):
        job = render(
            models[name], replace(SMALL, executor=executor, precision=precision), tmp_path / f"{executor}.zarr"
        )
        assert job.redone == 0
    assert max(job.projection.batches) > 1
    difference = np.abs(pixels(tmp_path / "tiles.zarr").astype(int) - pixels(tmp_path / "batched.zarr"))
    assert difference.max() <= (1 if precision == "fp32" else 2)
    assert difference.mean() < 0.05


@needs_gpu
def test_auto_is_stream_and_twice_the_same_bits(tmp_path, models):
    for name in "ab":
        job = render(models["noisy"], replace(SMALL, executor="auto", precision="auto"), tmp_path / f"{name}.zarr")
        assert job.plan.executor == "batched"
    np.testing.assert_array_equal(pixels(tmp_path / "a.zarr"), pixels(tmp_path / "b.zarr"))


@pytest.fixture(scope="module")
def enlargement(tmp_path_factory):
    """A network of the usual size and a picture of 2048x1080 to enlarge."""
    folder = tmp_path_factory.mktemp("enlargement")
    torch.manual_seed(0)
    save_file(RRDBNet().state_dict(), folder / "sr.safetensors")
    values = torch.rand(1080, 2048, 3).mul(255).to(torch.uint8).numpy()
    Image.fromarray(values).save(folder / "picture.png")
    return folder


@needs_gpu
@pytest.mark.parametrize("gib", [2, 4, 6, 8])
def test_the_device_keeps_to_its_budget_and_to_the_projection(tmp_path, enlargement, gib):
    """By PyTorch's own count and the driver's, in a process of its own that PyTorch lets take no more."""
    if torch.cuda.get_device_properties(0).total_memory < gib * GIB:
        pytest.skip(f"the device has less than {gib} GiB")
    command = ["render", str(enlargement / "sr.safetensors"), "--init", str(enlargement / "picture.png"),
               "--vram", f"{gib}GiB", "--overlap", "24", "--precision", "fp16", "--executor", "batched",
               "--out", str(tmp_path / "out.zarr"), "--report", str(tmp_path / "report.json")]  # fmt: skip
    subprocess.run([sys.executable, "-c", RENDER, str(gib * GIB), *command], check=True)
    report = json.loads((tmp_path / "report.json").read_text())
    projected, measured = report["projection"]["device"], report["measured"]["device_peak"]
    assert max(measured, projected) <= gib * GIB
    assert abs(measured - projected) <= 0.1 * projected
    assert "cores" not in attributes(tmp_path / "out.zarr")  # nothing had to be cut smaller on the way
