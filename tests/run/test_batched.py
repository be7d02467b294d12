"""Whole renders by the batched executor, here on the CPU: pixels, stores and promises of tiles one by one."""

import json
import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
import zarr
from PIL import Image
from support.stores import attributes, files, image_files, pixels, render, shards

from engine.device.queue import OutOfDeviceMemory
from engine.errors import BudgetError, ResumeError
from engine.geometry import Box
from engine.job import Job
from engine.model.bundle import load
from engine.plan.request import Request
from engine.plan.sides import stored_sides
from engine.run.stage import Stage

SMALL = Request(size=(256, 192), stages=2, tile=16, overlap="4", executor="batched", device="cpu", precision="fp32")
"""12 writes."""

EXECUTORS = ("tiles", "batched")


def test_store_equals_that_of_tiles(tmp_path, models):
    for name in ("rrdb", "swinir", "noisy"):
        for part, roi in (("whole", None), ("region", Box(33, 17, 180, 200))):
            folder = tmp_path / name / part
            for executor in EXECUTORS:
                job = render(models[name], replace(SMALL, executor=executor, roi=roi), folder / f"{executor}.zarr")
                assert job.plan.executor == executor
            assert image_files(folder / "tiles.zarr") == image_files(folder / "batched.zarr"), (name, part)
            assert attributes(folder / "batched.zarr")["complete"]
            assert [p.name for p in sorted(folder.iterdir())] == ["batched.zarr", "tiles.zarr"]


def test_any_size(tmp_path, models):
    for name in ("rrdb", "swinir"):
        for size in ((1, 1), (500, 33), (251, 187)):
            folder = tmp_path / f"{name} {size}"
            for executor in EXECUTORS:
                render(models[name], replace(SMALL, executor=executor, size=size), folder / f"{executor}.zarr")
            assert image_files(folder / "tiles.zarr") == image_files(folder / "batched.zarr"), (name, size)


def test_runs_as_tiles_without_a_gpu(tmp_path, models, call):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code, out, err = call(
        f"render {models['rrdb'].path} --size 64x48 --tile 16 --overlap 4 --precision fp32 --executor batched "
        f"--out {tmp_path / 'out.zarr'}"
    )
    assert code == 0
    assert err.splitlines().count("no GPU here: executor batched runs as tiles on the CPU") == 1
    assert "\ntiles, " in out
    assert attributes(tmp_path / "out.zarr")["plan"]["executor"] == "tiles"


def test_auto_on_a_cpu_is_not_batched(tmp_path, models):
    for tile in (None, 16):
        job = Job.prepare(models["rrdb"], replace(SMALL, executor="auto", tile=tile), tmp_path / "out.zarr")
        assert job.plan.executor != "batched"


def test_stopped_render_is_finished_with_the_same_bits(tmp_path, models):
    render(models["noisy"], SMALL, tmp_path / "whole" / "out.zarr")
    for writes in (1, 5, 11):
        out = tmp_path / str(writes) / "out.zarr"
        render(models["noisy"], SMALL, out, writes=writes)
        assert writes <= shards(out, 0) < 12 or writes == 11
        render(models["noisy"], SMALL, out, resume=True)
        assert files(out.parent) == files(tmp_path / "whole"), writes


def test_store_of_another_executor_is_not_continued(tmp_path, models):
    """On a GPU a batch may round in another way than a tile: half a store of each would be neither."""
    out = tmp_path / "out.zarr"
    render(models["rrdb"], SMALL, out, writes=1)
    other = Job.prepare(models["rrdb"], replace(SMALL, executor="tiles"), out)
    with pytest.raises(ResumeError, match="executor: .*batched.* there, .*tiles.* here"):
        other.open_sink(resume=True, overwrite=False)


def test_batches_move_no_pixel(tmp_path, models):
    """The plan makes no batches on a CPU; with batches, as on a GPU, tiles land where they belong."""
    render(models["rrdb"], replace(SMALL, tile=8), tmp_path / "one.zarr")
    job = Job.prepare(models["rrdb"], replace(SMALL, tile=8), tmp_path / "many.zarr")
    assert job.projection.batches == (1, 1)
    job.projection = replace(job.projection, batches=(3, 5))
    for _ in job.run(job.open_sink(resume=False, overwrite=False)):
        pass
    # PyTorch takes another algorithm for so small a tile than for a batch: one level where a value lies between two.
    difference = np.abs(pixels(tmp_path / "one.zarr").astype(int) - pixels(tmp_path / "many.zarr"))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


# Exhausted memory


AUTO_TILE = replace(SMALL, tile=None)


@pytest.fixture
def memory(monkeypatch):
    """Function ``memory(limit)``: a device that holds tiles of ``limit`` LR pixels, in any number of chunks."""
    fill = Stage.fill

    def limited(limit):
        def limited_fill(stage, out, tiles, chunks):
            if tiles.shape[2] * tiles.shape[3] > limit:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nSee documentation")
            fill(stage, out, tiles, chunks)

        monkeypatch.setattr(Stage, "fill", limited_fill)

    return limited


def area(stage):
    """LR pixels of a tile's input."""
    return int(np.prod(stage.tile_shape))


def test_automatic_tile_becomes_smaller_and_the_store_records_it(tmp_path, models, memory):
    exact = replace(AUTO_TILE, overlap="exact", size=(512, 384))
    planned = render(models["rrdb"], exact, tmp_path / "planned.zarr")
    memory(area(planned.plan.stages[1]) - 1)
    lines = []
    job = render(models["rrdb"], exact, tmp_path / "smaller.zarr", log=lines.append)
    assert job.plan == planned.plan
    assert math.prod(job.cuts[1].core) < math.prod(job.plan.stages[1].core)
    assert job.cuts[0] == job.plan.stages[0]
    assert f"step 3: out of device memory; going on with tiles of {job.cuts[1].core_text} px" in lines
    stored = attributes(tmp_path / "smaller.zarr")
    assert stored["complete"]
    assert stored["plan"] == planned.plan.to_json()
    assert stored["cores"] == [stored_sides(cut.core) for cut in job.cuts]
    assert "cores" not in attributes(tmp_path / "planned.zarr")
    # The halo is the whole receptive field, so a smaller tile is no other approximation.
    assert stored["seam_error_levels"] == 0
    difference = np.abs(pixels(tmp_path / "smaller.zarr").astype(int) - pixels(tmp_path / "planned.zarr"))
    assert difference.max() <= 1


def test_recut_frees_the_caches_of_the_chain_before(tmp_path, models, memory):
    job = Job.prepare(models["rrdb"], replace(AUTO_TILE, size=(512, 384)), tmp_path / "out.zarr")
    memory(area(job.plan.stages[1]) // 4)
    sink = job.open_sink(resume=False, overwrite=False)
    pipeline = job._pipeline(lambda cut: job._note_recut(sink, cut))
    first = weakref.ref(pipeline.tiles()[0])
    pipeline.recut(OutOfDeviceMemory("CUDA out of memory"))
    pipeline.tiles()
    assert first() is None
    assert pipeline.redone == 0


def test_seam_error_is_that_of_the_rendered_cut(tmp_path, models, memory):
    """Planned as one tile, without a seam; rendered in several, with the error that was measured for this halo."""
    auto = replace(AUTO_TILE, overlap="auto")
    planned = Job.prepare(models["rrdb"], auto, tmp_path / "planned.zarr")
    assert planned.seam_error == 0
    memory(area(planned.plan.stages[1]) - 1)
    job = render(models["rrdb"], auto, tmp_path / "smaller.zarr")
    assert 0 < job.seam_error <= auto.seam_tolerance
    assert attributes(tmp_path / "smaller.zarr")["seam_error_levels"] == job.seam_error


@pytest.fixture
def recut_store(tmp_path, models, memory, monkeypatch):
    """(request, store) of a render that was stopped after one write, and again after its tile became smaller."""
    monkeypatch.setattr("engine.plan.tiles.LARGEST", 32)
    request, out = replace(AUTO_TILE, size=(512, 384)), tmp_path / "out.zarr"
    job = render(models["rrdb"], request, out, writes=1)
    assert len(list(job.plan.writes())) > 3
    written = {p: p.stat().st_mtime_ns for p in (out / "0" / "c").rglob("*") if p.is_file()}
    memory(area(job.plan.stages[1]) - 1)
    again = render(models["rrdb"], request, out, resume=True, writes=1)
    assert math.prod(again.cuts[1].core) < math.prod(again.plan.stages[1].core)
    assert shards(out, 0) > len(written)
    assert all(p.stat().st_mtime_ns == time for p, time in written.items())
    return request, out


def test_resumed_render_keeps_the_smaller_tile(models, recut_store):
    request, out = recut_store
    job = Job.prepare(models["rrdb"], request, out)
    sink = job.open_sink(resume=True, overwrite=False)
    assert [stored_sides(cut.core) for cut in job.cuts] == attributes(out)["cores"]
    for _ in job.run(sink):
        pass
    assert attributes(out)["complete"]


def test_damaged_smaller_tiles_are_refused(models, recut_store):
    request, out = recut_store
    for tiles in ([0, 16], [16], "ab", ["16", 16], [16, 1 << 20], 7, [16.0, 16], [16, [16, 0]], [16, [16] * 3]):
        group = zarr.open_group(out, mode="r+")
        group.attrs["ourgan"] = {**group.attrs["ourgan"], "cores": tiles}
        with pytest.raises(
            ResumeError, match="out.zarr: damaged, its tiles do not fit its plan .*; use overwrite=True"
        ):
            Job.prepare(models["rrdb"], request, out).open_sink(resume=True, overwrite=False)


def test_requested_tile_is_kept_and_the_way_out_is_named(tmp_path, models, memory):
    memory(100)
    with pytest.raises(BudgetError, match=r"step 2: tiles of 16 px do not fit the device's memory \(.*vram, .*tile"):
        render(models["rrdb"], SMALL, tmp_path / "out.zarr")


# Reports


def test_redone_tiles_are_counted_and_printed(tmp_path, models, monkeypatch, call):
    """One tile's output of the half-precision network is infinite; the picture is that of float32 there."""
    fill, calls = Stage.fill, []

    def overflowing_fill(stage, out, tiles, chunks):
        fill(stage, out, tiles, chunks)
        if stage.precision != "fp32":
            calls.append(stage)
            if len(calls) == 8:
                out[0, 1, out.shape[2] // 2, out.shape[3] // 2] = torch.inf

    monkeypatch.setattr(Stage, "fill", overflowing_fill)
    command = f"render {models['rrdb'].path} --size 256x192 --tile 16 --overlap 4 --stages 2 --executor batched"
    for precision in ("bf16", "fp32"):
        report = tmp_path / f"{precision}.json"
        code, out, _ = call(
            f"{command} --device cpu --precision {precision} --out {tmp_path / precision}.zarr --report {report} -v"
        )
        assert code == 0
        measured = json.loads(report.read_text())["measured"]
        assert measured["tiles_redone_in_fp32"] == (precision == "bf16")
        assert ("tiles computed again in fp32: 1" in out) == (precision == "bf16")


def test_picture_is_enlarged(tmp_path, model_file, picture):
    values = (picture(40, 50).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    Image.fromarray(values).save(tmp_path / "picture.png")
    bare = load(model_file.parent / "sr.safetensors")
    for executor in EXECUTORS:
        request = replace(SMALL, size=None, stages=None, init=tmp_path / "picture.png", executor=executor)
        render(bare, request, tmp_path / f"{executor}.zarr")
    np.testing.assert_array_equal(pixels(tmp_path / "tiles.zarr"), pixels(tmp_path / "batched.zarr"))
