"""Bands on a pretend accelerator: the CPU's pixels, within the projection, with copies beside the computing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.accelerator import pretend_accelerator
from support.stores import attributes, pixels, render

from engine.device.queue import CudaDeviceQueue, Download
from engine.errors import BudgetError
from engine.job import Job
from engine.plan import strips
from engine.plan.request import Request
from engine.run.stage import Stage

TALL = Request(size=(256, 768), stages=2, executor="bands", precision="fp32", overlap="exact")
"""192 LR rows of the last stage: enough for captured bands of 32 rows."""

MIB = 1 << 20


@pytest.fixture
def accelerator():
    with pretend_accelerator() as board:
        yield board


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(strips, "SHARD", 64)
    monkeypatch.setattr(strips, "CHUNK", 64)


def assert_close(image, expected):
    """Bands of another height sum in another order: one level in single pixels, as on a real device."""
    difference = np.abs(image.astype(int) - expected)
    assert difference.max() <= 1
    assert difference.mean() < 1e-3


@pytest.fixture
def on_cpu(tmp_path, models):
    """Function ``on_cpu(name)``: pixels of the CPU."""
    return lambda name: pixels(render(models[name], replace(TALL, device="cpu"), tmp_path / "cpu.zarr").out)


def test_pixels_are_the_cpus_within_the_projection(tmp_path, models, accelerator, on_cpu):
    """Peaks are those of the render alone, without the measurements before it."""
    job = Job.prepare(models["noisy"], TALL, tmp_path / "out.zarr")
    assert job.device.type == "pretend"
    assert {stage.band for stage in job.plan.stages} == {32}
    memory = accelerator.memory[0]
    memory.empty_cache()
    memory.peak_reserved = memory.reserved
    before = accelerator.counts["replays"]
    for _ in job.run(job.open_sink()):
        pass
    assert accelerator.counts["replays"] > before
    peak = memory.context + memory.peak_reserved
    # The allocator takes segments; the projection counts bytes.
    assert 0.5 * (job.projection.device - memory.context) < memory.peak_reserved
    assert peak <= job.projection.device + 8 * MIB
    assert_close(pixels(job.out), on_cpu("noisy"))
    assert attributes(job.out)["kernels"] == "torch"  # a resume with Triton's kernels would round in another way


def test_rows_are_looked_at_one_band_later(tmp_path, models, accelerator, monkeypatch):
    """When the host waits for a band's rows, the next band has been queued; at the end of a strip nothing is left."""
    pushed, looked, push, result = {}, [], Stage.push, Download.result

    def counted_push(stage, stream, band):
        pushed[id(stream)] = pushed.get(id(stream), 0) + 1
        for rows in push(stage, stream, band):
            counted_push.last = id(stream)
            yield rows

    class Dated(Download):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.stream = counted_push.last
            self.band = pushed[self.stream]

        def result(self):
            looked.append((self.stream, self.band, pushed[self.stream]))
            return result(self)

    monkeypatch.setattr(Stage, "push", counted_push)
    monkeypatch.setattr("engine.device.queue.Download", Dated)
    job = render(models["rrdb"], TALL, tmp_path / "out.zarr")
    lags = {}
    for stream, band, at in looked:
        lags.setdefault(stream, []).append(at - band)
    assert len(lags) == len(job.stages)
    for lag in lags.values():
        assert set(lag) == {0, 1}
        assert lag == sorted(lag, reverse=True)  # 0 at the strip's end alone
        assert lag.count(1) > lag.count(0)


def test_overflow_is_found_a_band_later_and_computed_again(tmp_path, models, accelerator, small_shards, monkeypatch):
    """The rows of shards above the overflow are written, and those from there on are computed again or anew."""
    request, push = replace(TALL, precision="fp32,bf16"), Stage.push
    expected = pixels(render(models["rrdb"], request, tmp_path / "expected.zarr").out)

    def poisoned(stage, stream, band):
        for y, rows in push(stage, stream, band):
            if stage.precision == "bf16" and y <= 300 < y + rows.shape[2]:
                rows = rows.clone()
                rows[0, 1, 300 - y, 20] = torch.nan
            yield y, rows

    monkeypatch.setattr(Stage, "push", poisoned)
    job = render(models["rrdb"], request, tmp_path / "out.zarr")
    assert job.redone == 1
    different = np.abs(pixels(job.out).astype(int) - expected).max((0, 2)).reshape(-1, 64).max(1)
    assert set(np.flatnonzero(different)) == {300 // 64}
    assert different.max() <= 3


def test_memory_that_others_take_means_narrower_strips(tmp_path, models, accelerator, small_shards):
    """Other programs take memory after the plan was made; strips become narrower until they fit."""
    wide = replace(TALL, size=(768, 256))
    whole = render(models["noisy"], wide, tmp_path / "whole.zarr")
    job = Job.prepare(models["noisy"], wide, tmp_path / "out.zarr")
    memory = accelerator.memory[0]
    memory.empty_cache()
    memory.others = memory.free - (job.projection.device - memory.context - memory.reserved) * 5 // 8
    for _ in job.run(job.open_sink()):
        pass
    assert job.cuts[-1].tile < job.plan.stages[-1].tile
    assert attributes(job.out)["cores"] == [cut.tile for cut in job.cuts]
    assert_close(pixels(job.out), pixels(whole.out))


def test_vram_below_the_projection_is_refused_or_cut(tmp_path, models, accelerator):
    job = Job.prepare(models["rrdb"], TALL, tmp_path / "out.zarr")
    with pytest.raises(BudgetError, match="vram: the narrowest strip of bands .* needs"):
        Job.prepare(models["rrdb"], replace(TALL, vram=job.projection.device - 1), tmp_path / "out.zarr")
    Job.prepare(models["rrdb"], replace(TALL, vram=job.projection.device), tmp_path / "out.zarr").check()


def test_uploads_run_beside_the_work_queued_before(accelerator):
    """The compute stream waits for an upload, and an upload for the readers of the last tensor but one."""
    queue = CudaDeviceQueue(torch.device("pretend", 0))
    uploads, total = queue.uploads(64, torch.float32), torch.zeros(64, device="pretend:0")
    for k in range(1, 6):
        total.add_(uploads.start(torch.full((64,), float(k))))
        uploads.read()
    (result,) = queue.download([total]).result()
    assert result.unique().tolist() == [15.0]
    assert accelerator.counts["synchronizations"] == 0
