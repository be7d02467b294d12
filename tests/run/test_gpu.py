"""On a CUDA device: batches with captured launches against tiles one by one, and the promise about the device's memory."""

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
from support.stores import attributes, pixels, render

from engine.archs.esrgan import RRDBNet
from engine.plan.request import Request

GIB = 1 << 30
SMALL = Request(size=(512, 384), stages=2, tile=16, overlap="4", device="cuda", precision="fp32")

RENDER = """
import sys, torch
from engine.cli.app import main
limit = float(sys.argv[1]) / torch.cuda.mem_get_info()[1]
torch.cuda.set_per_process_memory_fraction(min(1.0, limit))
main(sys.argv[2:])
"""


@needs_gpu
@pytest.mark.parametrize("name", ["rrdb", "swinir", "noisy"])
def test_batches_give_the_pixels_of_tiles(tmp_path, models, name):
    """A batch may be summed in another order: equal bits are a CPU's promise; here one level, two in half precision."""
    for precision in ("fp32", "fp16"):
        images = []
        for executor in ("tiles", "batched"):
            request = replace(SMALL, executor=executor, precision=precision)
            job = render(models[name], request, tmp_path / precision / f"{executor}.zarr")
            assert job.redone == 0
            images.append(pixels(job.out).astype(int))
        assert max(job.projection.batches) > 1
        difference = np.abs(images[0] - images[1])
        assert difference.max() <= (1 if precision == "fp32" else 2)
        assert difference.mean() < 0.05


@needs_gpu
@pytest.mark.parametrize(("tile", "executor"), [(None, "bands"), (16, "batched")])
def test_auto_repeats_the_bits(tmp_path, models, tile, executor):
    request = replace(SMALL, executor="auto", precision="auto", tile=tile)
    for name in "ab":
        job = render(models["noisy"], request, tmp_path / f"{name}.zarr")
        assert job.plan.executor == executor
    np.testing.assert_array_equal(pixels(tmp_path / "a.zarr"), pixels(tmp_path / "b.zarr"))


@needs_gpu
@pytest.mark.parametrize("name", ["rrdb", "swinir", "noisy"])
def test_bands_give_the_pixels_of_tiles(tmp_path, models, name):
    """Within the projection. The kernel's convolutions round less often than cuDNN's."""
    for precision in ("fp32", "fp16"):
        images = []
        for executor, tile in (("tiles", 16), ("bands", None)):
            request = replace(SMALL, executor=executor, precision=precision, tile=tile, overlap="exact")
            job = render(models[name], request, tmp_path / precision / f"{executor}.zarr")
            assert job.redone == 0
            images.append(pixels(job.out).astype(int))
        difference = np.abs(images[0] - images[1])
        assert difference.max() <= (1 if precision == "fp32" else 2)
        assert difference.mean() < 0.05


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
def test_device_memory_is_within_budget_and_projection(tmp_path, enlargement, gib):
    """By PyTorch's own count and the driver's, in its own process, which PyTorch limits to the budget."""
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
    assert "cores" not in attributes(tmp_path / "out.zarr")  # no tile had to become smaller
