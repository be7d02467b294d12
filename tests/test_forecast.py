"""Forecasts for a GPU that is not there: its memory bounds the plan, and nothing is called a measurement."""

import json
import re

import pytest

from engine.errors import BudgetError, UsageError
from engine.forecast import forecast
from engine.geometry import Box
from engine.plan.cost import GIB
from engine.plan.gpus import CONTEXT, GPUS
from engine.plan.request import Request

SMALL = Request(size=(512, 384), stages=2, overlap="4")
MIB = 1 << 20


@pytest.fixture(scope="module")
def forecasts(models, tmp_path_factory):
    """Function (GPU, options) -> forecast for the small model."""

    def make(gpu, name="rrdb", request=SMALL, **options):
        options = {**{f: getattr(request, f) for f in ("size", "stages", "overlap")}, **options}
        return forecast(models[name], Request(**options), GPUS[gpu], tmp_path_factory.mktemp("out") / "out.zarr")

    return make


@pytest.mark.parametrize("name", ["rrdb", "swinir", "noisy"])
def test_plan_is_that_of_the_gpu(forecasts, name):
    result = forecasts("rtx-4090", name)
    assert result.plan.executor == "bands"
    assert result.plan.precision == "fp16"
    assert result.plan.backend.startswith("cuda")
    assert CONTEXT < result.projection.device <= result.measured.budget.device == 24 * GIB
    assert 0 < result.times.total < result.projection.seconds
    assert result.work >= 1
    assert not result.to_json()["is_measured"]
    assert all(counts.flops_per_pixel > 1e3 for counts in result.counts)


def test_faster_gpus_take_less_time(forecasts):
    slow, fast = forecasts("rtx-3060"), forecasts("h100")
    assert fast.times.total < slow.times.total
    assert fast.counts == slow.counts
    # Old GPUs run PyTorch's operations.
    assert any("too old" in text for text in forecasts("t4").assumptions)


def test_vram_bounds_the_plan(forecasts):
    size = (8192, 8192)
    roomy, tight = (
        forecasts("rtx-4090", size=size, executor="batched", vram=vram) for vram in (None, CONTEXT + 100 * MIB)
    )
    assert tight.projection.device <= CONTEXT + 100 * MIB < roomy.projection.device
    assert tight.work > roomy.work
    assert tight.projection.batches <= roomy.projection.batches
    with pytest.raises(BudgetError, match="vram: the smallest tile .* needs"):
        forecasts("rtx-4090", size=size, executor="batched", vram=CONTEXT)


def test_requests_are_kept(forecasts):
    assert forecasts("l4", precision="fp32").plan.precision == "fp32"
    whole, part = (forecasts("l4", tile=16, roi=roi) for roi in (None, Box(0, 0, 64, 64)))
    assert part.times.total < whole.times.total
    tile = forecasts("l4", tile=(32, 16)).plan.stages
    assert [stage.core for stage in tile] == [(16, 32)] * 2
    assert forecasts("l4", executor="tiles").projection.batches == ()
    bands = forecasts("l4", executor="bands")
    assert bands.plan.is_banded
    assert bands.work < 1.6
    with pytest.raises(UsageError, match="device='cpu': a forecast for gpu runs nothing on a device; leave it out"):
        forecasts("l4", device="cpu")


def test_command_prints_a_forecast(call, model_file, tmp_path):
    line = f"plan {model_file} --size 512x384 --stages 2 --overlap 4 --out {tmp_path / 'out.zarr'}"
    code, out, _ = call(f"{line} --gpu rtx-4090")
    lines = out.splitlines()
    assert code == 0
    assert 4 <= len(lines) <= 8
    assert re.fullmatch(
        r"forecast for RTX 4090, not a measurement: device memory 0\.\d\d of 24\.00 GiB, networks about 0\.\d+ s",
        lines[1],
    )
    assert any(re.match(r"bound by (arithmetic|memory traffic|launches): \d+% of the time; ", text) for text in lines)
    assert lines[-2].startswith("assumed: 165.2 TFLOP/s in fp16, 1008 GB/s and 24 GiB as published")
    code, out, _ = call(f"{line} --gpu h100 --json")
    data = json.loads(out)
    assert code == 0
    assert data["forecast"]["is_measured"] is False
    assert data["forecast"]["seconds"] == pytest.approx(data["projection"]["seconds"], abs=60)
    assert sum(data["forecast"]["shares"].values()) == pytest.approx(1)
    assert data["plan"]["executor"] == "bands"
    assert not list(tmp_path.iterdir())


def test_refusals_of_the_command(call, model_file):
    for options, words, expected in (
        ("--gpu voodoo", "--gpu voodoo: no published figures of it here; use one of rtx-3060, ", 2),
        ("--gpu l4 --device cpu", "--device cpu: a forecast for --gpu runs nothing on a device; leave it out", 2),
        ("--gpu l4 --theory", "--theory: only --report and --json apply to it", 2),
        ("--gpu l4 --vram 600MiB --size 8192x8192", "--vram: the smallest tile of step", 3),
    ):
        code, out, err = call(f"plan {model_file} {options}")
        assert (code, out) == (expected, ""), options
        assert words in err, options
