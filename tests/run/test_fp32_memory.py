"""Memory of a device while float32 computes again what overflowed: as projected, and within a limit without room for it."""

from dataclasses import replace

import pytest
import torch
from support import small
from support.accelerator import pretend_accelerator
from support.stores import attributes

from engine.archs.esrgan import RRDBNet
from engine.job import Job
from engine.model.bundle import load
from engine.plan import strips
from engine.plan.request import Request
from engine.probe import count, footprint
from engine.run.stage import Stage

KIB = 1 << 10
SLACK = 256 * KIB
"""Small tensors that no part of a projection counts."""

SMALL = Request(size=(128, 192), stages=1, precision="bf16", overlap="exact")
REQUESTS = {
    "bands": replace(SMALL, executor="bands"),
    "batched": replace(SMALL, executor="batched", tile=16, overlap="4"),
    "tiles": replace(SMALL, executor="tiles", tile=16, overlap="4"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A network whose weights take more than its maps, as the usual ones do for small tiles."""
    return load(
        small.bundle(tmp_path_factory.mktemp("wide"), small.lively(RRDBNet(channels=64, blocks=1, growth=32), 0.02))
    )


@pytest.fixture
def memory(monkeypatch):
    """Memory of a pretend device that takes segments of 512 bytes, and footprints of tiles as small as those rendered."""
    monkeypatch.setattr(footprint, "_SMALL", 12)
    monkeypatch.setattr(footprint, "_LARGE", 24)
    monkeypatch.setattr(count, "_SIDES", (24, 48))
    monkeypatch.setattr("support.accelerator.memory.SEGMENT", 512)
    monkeypatch.setattr(strips, "SHARD", 64)
    monkeypatch.setattr(strips, "CHUNK", 64)
    with pretend_accelerator() as board:
        yield board.memory[0]


@pytest.fixture
def overflow(monkeypatch):
    """Function that begins to spoil a value of every batch of tiles, and of row 30, in half precision."""
    fill, push, begun = Stage.fill, Stage.push, []

    def spoiled_fill(stage, out, tiles, chunks):
        fill(stage, out, tiles, chunks)
        if begun and stage.precision == "bf16":
            out[0, 1, out.shape[2] // 2, out.shape[3] // 2] = torch.inf

    def spoiled_push(stage, stream, band):
        for y, rows in push(stage, stream, band):
            if begun and stage.precision == "bf16" and y <= 30 < y + rows.shape[2]:
                rows[0, 1, 30 - y, 20] = torch.inf
            yield y, rows

    monkeypatch.setattr(Stage, "fill", spoiled_fill)
    monkeypatch.setattr(Stage, "push", spoiled_push)
    return lambda: begun.append(True)


def peak_of(job, memory, overflow):
    """Peak of the device in a render, without the measurements before it."""
    memory.empty_cache()
    memory.peak_reserved = memory.reserved
    overflow()
    for _ in job.run(job.open_sink()):
        pass
    assert job.redone >= 1
    assert attributes(job.out)["complete"]
    return memory.context + memory.peak_reserved


@pytest.mark.parametrize("name", REQUESTS)
def test_peak_is_projected(tmp_path, model, memory, overflow, name):
    job = Job.prepare(model, REQUESTS[name], tmp_path / "out.zarr")
    projection, (stage,) = job.projection, job.measured.stages
    assert stage.fp32.weights == sum(t.nbytes for t in model.new_network(0).parameters())
    peak = peak_of(job, memory, overflow)
    assert projection.device < peak <= projection.device_in_fp32 + SLACK


@pytest.mark.parametrize("name", ["bands", "batched"])
def test_limit_is_kept_without_room_for_it(tmp_path, model, memory, overflow, name):
    """Strips become narrower; a tile is computed again without the batches."""
    request = replace(REQUESTS[name], size=(512, 64))
    planned = Job.prepare(model, request, tmp_path / "out.zarr").projection
    vram = planned.device + (planned.device_in_fp32 - planned.device) // 2
    job = Job.prepare(model, replace(request, vram=vram), tmp_path / "out.zarr")
    assert job.projection.device_in_fp32 <= vram
    assert peak_of(job, memory, overflow) <= vram
