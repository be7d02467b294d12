"""Whole renders by ``--executor stream``, here on the CPU: the pixels, stores and promises of tiles one by one."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from support.stores import attributes, files, pixels, shards

from engine.cli.app import main
from engine.errors import BudgetError
from engine.geometry import Box
from engine.job import Job
from engine.plan.request import Request
from engine.run.stage import Stage

SMALL = Request(size=(192, 256), stages=2, tile=16, overlap="4", executor="batched", device="cpu", precision="fp32")
"""12 writes."""


def render(model, request, out, resume=False):
    told = []
    job = Job.prepare(model, request, out, told.append)
    for _ in job.run(job.open_sink(resume=resume, overwrite=False)):
        pass
    return job, told


def image_files(folder):
    """Without the file that names the executor."""
    return {name: data for name, data in files(folder).items() if name != "zarr.json"}


@pytest.mark.parametrize("name", ["rrdb", "swinir", "noisy"])
@pytest.mark.parametrize("roi", [None, Box(33, 17, 180, 200)], ids=["whole", "region"])
def test_a_store_is_that_of_tiles_one_by_one(tmp_path, models, name, roi):
    for executor in ("tiles", "batched"):
        job, _ = render(models[name], replace(SMALL, executor=executor, roi=roi), tmp_path / f"{executor}.zarr")
        assert job.plan.executor == executor
    assert image_files(tmp_path / "tiles.zarr") == image_files(tmp_path / "batched.zarr")
    assert attributes(tmp_path / "batched.zarr")["complete"]
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["batched.zarr", "tiles.zarr"]


@pytest.mark.parametrize("size", [(1, 1), (33, 500), (187, 251)])
@pytest.mark.parametrize("name", ["rrdb", "swinir"])
def test_any_size_can_be_rendered(tmp_path, models, name, size):
    for executor in ("tiles", "batched"):
        render(models[name], replace(SMALL, executor=executor, size=size), tmp_path / f"{executor}.zarr")
    assert image_files(tmp_path / "tiles.zarr") == image_files(tmp_path / "batched.zarr")


def test_without_a_gpu_it_runs_as_tiles_and_says_so(tmp_path, models, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    out = tmp_path / "out.zarr"
    with pytest.raises(SystemExit) as caught:
        main(["render", str(models["rrdb"].path), "--size", "64x48", "--tile", "16", "--overlap", "4",
              "--executor", "batched", "--out", str(out)])  # fmt: skip
    said = capsys.readouterr()
    assert caught.value.code == 0
    assert said.err.splitlines().count("no GPU here: executor batched runs as tiles on the CPU") == 1
    assert "by tiles, " in said.out
    assert attributes(out)["plan"]["executor"] == "tiles"


def test_auto_on_a_cpu_is_not_stream(tmp_path, models):
    for tile in (None, 16):
        job = Job.prepare(models["rrdb"], replace(SMALL, executor="auto", tile=tile), tmp_path / "out.zarr")
        assert job.plan.executor != "batched"


@pytest.mark.parametrize("writes", [1, 5, 11])
def test_a_render_that_was_stopped_is_finished_with_the_same_bits(tmp_path, models, writes):
    render(models["noisy"], SMALL, tmp_path / "whole" / "out.zarr")
    job = Job.prepare(models["noisy"], SMALL, tmp_path / "stopped" / "out.zarr")
    run = job.run(job.open_sink(resume=False, overwrite=False))
    for _ in range(writes):
        next(run)
    run.close()
    assert writes <= shards(tmp_path / "stopped" / "out.zarr", 0) < 12 or writes == 11
    render(models["noisy"], SMALL, tmp_path / "stopped" / "out.zarr", resume=True)
    assert files(tmp_path / "whole") == files(tmp_path / "stopped")


def test_a_store_of_another_executor_is_not_continued(tmp_path, models):
    """On a GPU a batch may round another way than a tile: half a store of each would be neither."""
    out = tmp_path / "out.zarr"
    job = Job.prepare(models["rrdb"], SMALL, out)
    next(job.run(job.open_sink(resume=False, overwrite=False)))
    other = Job.prepare(models["rrdb"], replace(SMALL, executor="tiles"), out)
    with pytest.raises(Exception, match="executor: .*batched.* there, .*tiles.* here"):
        other.open_sink(resume=True, overwrite=False)


def test_batches_change_no_place_of_a_pixel(tmp_path, models):
    """On a CPU the planner leaves tiles alone; as on a GPU, put together, they land where they belong."""
    reference, _ = render(models["rrdb"], replace(SMALL, tile=8), tmp_path / "one.zarr")
    job = Job.prepare(models["rrdb"], replace(SMALL, tile=8), tmp_path / "many.zarr")
    assert job.projection.batches == (1, 1)
    job.projection = replace(job.projection, batches=(3, 5))
    for _ in job.run(job.open_sink(resume=False, overwrite=False)):
        pass
    # So small a tile takes another algorithm of PyTorch's than a batch of them: a level where a value lies on its edge.
    difference = np.abs(pixels(tmp_path / "one.zarr").astype(int) - pixels(tmp_path / "many.zarr"))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


# A device that runs out of memory


AUTO_TILE = replace(SMALL, tile=None)


@pytest.fixture
def memory(monkeypatch):
    """memory(limit): a device that holds tiles of so many LR pixels, in however many pieces."""
    fill = Stage.fill

    def limited(limit):
        def filled(stage, out, tiles, chunks):
            if tiles.shape[2] * tiles.shape[3] > limit:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nSee documentation")
            fill(stage, out, tiles, chunks)

        monkeypatch.setattr(Stage, "fill", filled)

    return limited


def test_a_tile_that_was_chosen_becomes_smaller_and_the_store_tells(tmp_path, models, memory):
    exact = replace(AUTO_TILE, overlap="exact", size=(384, 512))
    planned, _ = render(models["rrdb"], exact, tmp_path / "planned.zarr")
    largest = int(np.prod(planned.plan.stages[1].tile_shape))
    memory(largest - 1)
    job, told = render(models["rrdb"], exact, tmp_path / "smaller.zarr")
    assert job.plan == planned.plan
    assert job.cuts[1].tile < job.plan.stages[1].tile
    assert job.cuts[0] == job.plan.stages[0]
    core = job.cuts[1].tile
    assert f"step 3: out of device memory; going on with tiles of {core} px" in told
    found = attributes(tmp_path / "smaller.zarr")
    assert found["complete"]
    assert found["plan"] == planned.plan.to_json()
    assert found["cores"] == [s.tile for s in job.cuts]
    assert "cores" not in attributes(tmp_path / "planned.zarr")
    # The halo is the whole receptive field, so a smaller tile is no other approximation.
    assert found["seam_error_levels"] == 0
    difference = np.abs(pixels(tmp_path / "smaller.zarr").astype(int) - pixels(tmp_path / "planned.zarr"))
    assert difference.max() <= 1


def test_the_seam_error_is_that_of_the_cut_that_was_rendered(tmp_path, models, memory):
    """Planned as one tile, without a seam; rendered in several, with what was measured for this halo."""
    auto = replace(AUTO_TILE, overlap="auto")
    planned = Job.prepare(models["rrdb"], auto, tmp_path / "planned.zarr")
    assert planned.seam_error == 0
    memory(int(np.prod(planned.plan.stages[1].tile_shape)) - 1)
    job, _ = render(models["rrdb"], auto, tmp_path / "smaller.zarr")
    assert 0 < job.seam_error <= auto.seam_tolerance
    assert attributes(tmp_path / "smaller.zarr")["seam_error_levels"] == job.seam_error


def test_what_is_written_stays_and_a_resumed_render_keeps_the_smaller_tile(tmp_path, models, memory, monkeypatch):
    monkeypatch.setattr("engine.plan.tiles.TILES", (16, 32))
    request = replace(AUTO_TILE, size=(384, 512))
    job = Job.prepare(models["rrdb"], request, tmp_path / "out.zarr")
    assert len(list(job.plan.writes())) > 3
    run = job.run(job.open_sink(resume=False, overwrite=False))
    next(run)
    run.close()
    written = shards(tmp_path / "out.zarr", 0)
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "out.zarr" / "0" / "c").rglob("*") if p.is_file()}
    memory(int(np.prod(job.plan.stages[1].tile_shape)) - 1)
    again = Job.prepare(models["rrdb"], request, tmp_path / "out.zarr")
    run = again.run(again.open_sink(resume=True, overwrite=False))
    next(run)
    run.close()
    assert again.cuts[1].tile < again.plan.stages[1].tile
    assert shards(tmp_path / "out.zarr", 0) > written
    last = Job.prepare(models["rrdb"], request, tmp_path / "out.zarr")
    sink = last.open_sink(resume=True, overwrite=False)
    assert [s.tile for s in last.cuts] == [s.tile for s in again.cuts]
    for _ in last.run(sink):
        pass
    assert attributes(tmp_path / "out.zarr")["complete"]
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items())


def test_a_tile_that_was_asked_for_stays_and_the_way_out_is_named(tmp_path, models, memory):
    memory(100)
    job = Job.prepare(models["rrdb"], SMALL, tmp_path / "out.zarr")
    with pytest.raises(BudgetError, match=r"step 2: tiles of 16 px do not fit the device's memory \(.*vram, .*tile"):
        for _ in job.run(job.open_sink(resume=False, overwrite=False)):
            pass


# Reports


def test_tiles_that_were_redone_are_counted_and_said(tmp_path, models, monkeypatch, capsys):
    """One tile's output of the half network is infinite; the picture is that of float32 there."""
    fill, calls = Stage.fill, []

    def filled(stage, out, tiles, chunks):
        fill(stage, out, tiles, chunks)
        if stage.precision != "fp32":
            calls.append(stage)
            if len(calls) == 8:
                out[0, 1, out.shape[2] // 2, out.shape[3] // 2] = torch.inf

    monkeypatch.setattr(Stage, "fill", filled)
    command = ["render", str(models["rrdb"].path), "--size", "256x192", "--tile", "16", "--overlap", "4", "--stages", "2",
               "--executor", "batched", "--device", "cpu"]  # fmt: skip
    for precision in ("bf16", "fp32"):
        with pytest.raises(SystemExit) as caught:
            main([*command, "--precision", precision, "--out", str(tmp_path / f"{precision}.zarr"),
                  "--report", str(tmp_path / f"{precision}.json")])  # fmt: skip
        assert caught.value.code == 0
        said = capsys.readouterr().out
        measured = json.loads((tmp_path / f"{precision}.json").read_text())["measured"]
        assert measured["tiles_redone_in_fp32"] == (precision == "bf16")
        assert ("tiles redone in fp32: 1" in said) == (precision == "bf16")


def test_a_picture_is_enlarged(tmp_path, model_file, picture):
    from engine.model.bundle import load

    values = (picture(40, 50).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    Image.fromarray(values).save(tmp_path / "picture.png")
    bare = load(model_file.parent / "sr.safetensors")
    for executor in ("tiles", "batched"):
        request = Request(init=tmp_path / "picture.png", tile=16, overlap="4", executor=executor, device="cpu")
        render(bare, request, tmp_path / f"{executor}.zarr")
    np.testing.assert_array_equal(pixels(tmp_path / "tiles.zarr"), pixels(tmp_path / "batched.zarr"))
