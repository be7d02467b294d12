"""Counts on the meta device: known operations, and memory by area whatever the shape of a tile."""

import math
import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from engine.archs.esrgan import RRDBNet
from engine.archs.swinir import SwinIR
from engine.bands.stream import RowStream
from engine.plan.gpus import GPUS
from engine.probe.count import META, as_on, band_counts, count_tile, counting, tile_bytes, tile_counts
from engine.run.stage import Stage


def stage_of(network):
    return Stage(network.eval().requires_grad_(False), META, "fp16")


@pytest.fixture(scope="module")
def stages():
    with torch.device("meta"):
        return {"rrdb": stage_of(RRDBNet(blocks=3)), "swinir": stage_of(SwinIR(depths=(2, 2), heads=(6, 6)))}


def test_one_convolution():
    """A convolution with its bias, a view, a copy and an in-place operation."""
    with counting() as counter:
        x = torch.empty(1, 8, 10, 20, dtype=torch.float16, device=META)
        weight, bias = torch.empty(4, 8, 3, 3, dtype=torch.float16, device=META), torch.empty(4, device=META).half()
        counter.operations.clear()
        y = F.conv2d(x, weight, bias, padding=1)
        y[:, 1:].relu_()
        y[:, :1].copy_(x[:, :1])
    convolution, addition, relu, copy = counter.operations
    assert convolution.flops == 2 * 9 * 8 * 4 * 200
    assert convolution.is_half
    assert convolution.bytes == 2 * (8 * 200 + 4 * 8 * 9 + 4 + 4 * 200)
    assert addition.bytes == 2 * 2 * 4 * 200
    assert relu.bytes == 2 * 2 * 3 * 200
    assert copy.bytes == 2 * 2 * 200
    assert relu.flops == copy.flops == 0
    assert counter.peak >= 2 * (8 + 4) * 200


def test_network_has_the_flops_of_its_layers(stages):
    """Dense blocks and tail of ESRGAN by their formula; bands compute nothing twice, a tile's chunks their context."""
    trunk = 9 * sum(64 * 32 + 32 * 32 * k for k in range(4)) + 9 * 192 * 64
    tail = 9 * 64 * 64 + 9 * 64 * 64 * (4 + 16 + 16) + 9 * 64 * 3 * 16
    flops = 2 * (9 * trunk + 9 * 3 * 64 + tail)
    banded = band_counts(stages["rrdb"], 512)
    assert banded.flops_per_pixel == pytest.approx(flops, rel=1e-3)
    assert flops < tile_counts(stages["rrdb"]).flops_per_pixel < 1.08 * flops
    assert 100 < banded.launches < 1000


def test_a_band_has_no_launches_of_its_pictures_start():
    """As many as the next band; rows of zero are made once for a picture."""
    with as_on(None), torch.device("meta"):
        stage = stage_of(RRDBNet(blocks=1))
        stream, band = RowStream(stage.stream_plan(64), META), torch.empty(1, 3, 32, 64)
    with counting() as counter:
        stream.start(0, 1 << 30)
        for _ in range(4):
            counter.operations.clear()
            list(stage.push(stream, band))
    assert band_counts(stage, 64).launches == len(counter.operations)


def test_window_attention_is_one_kernel_where_the_gpu_runs_it(stages):
    kernel, twin = (tile_counts(stages["swinir"], GPUS[name]) for name in ("l4", "t4"))
    assert twin.launches > kernel.launches + 4 * 5
    assert twin.bytes_per_pixel > kernel.bytes_per_pixel
    assert kernel.flops_per_pixel == pytest.approx(twin.flops_per_pixel, rel=1e-3)


def test_kernels_have_the_flops_of_the_operations_they_replace():
    """SwinIR packed for kernels but for its padded channels, and bands whose convolutions are kernels."""
    with torch.device("meta"):
        plain = {
            "swinir": stage_of(SwinIR(dim=192, depths=(2,), heads=(6,), hidden=384)),
            "rrdb": stage_of(RRDBNet(blocks=1)),
        }
        with as_on(None):
            packed = {
                "swinir": stage_of(SwinIR(dim=192, depths=(2,), heads=(6,), hidden=384)),
                "rrdb": stage_of(RRDBNet(blocks=1)),
            }
    for name, count in (("swinir", tile_counts), ("rrdb", lambda stage, gpu: band_counts(stage, 512, gpu))):
        slow, fast = count(plain[name], GPUS["t4"]), count(packed[name], GPUS["l4"])
        assert fast.flops_per_pixel == pytest.approx(slow.flops_per_pixel, rel=2e-3)
        assert fast.bytes_per_pixel < 0.7 * slow.bytes_per_pixel
        assert fast.launches < 0.9 * slow.launches


SHAPES = [(144, 432), (288, 96), (400, 1200), (1120, 592), (208, 208)]


@pytest.mark.parametrize("name", ["rrdb", "swinir"])
def test_memory_follows_the_area(stages, name):
    """The line through two squares is never below an oblong tile, and near it."""
    line = tile_bytes(stages[name])
    # The last concatenation in a dense block, the inputs of block and group, the tile twice, and the output.
    assert name != "rrdb" or line.per_pixel == 1.25 * (2 * (160 + 32 + 192) + 4 * (2 * 64 + 2 * 3 + 48))
    for shape in SHAPES:
        live = count_tile(stages[name], *shape).peak
        held = line.bytes_at(math.prod(shape)) / 1.25
        assert live <= 1.001 * held, shape
        assert held <= 1.15 * live, shape
    assert count_tile(stages[name], 64, 96, batch=4).peak == pytest.approx(
        count_tile(stages[name], 128, 192).peak, rel=0.1
    )


@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build of PyTorch uses Triton")
def test_a_job_on_a_cpu_imports_no_triton():
    """Whose import takes 0.4 s and 80 MB."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = "import sys, engine.job; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == "False\n"
