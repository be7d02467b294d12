"""Whole renders through ``Job``: equal plans give equal bits, regions are crops, tiles leave no trace, nothing is half done."""

import json
import shutil
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from support.stores import attributes, files, pixels, render, shards

import engine
from engine.cli.app import main
from engine.errors import BudgetError, InputError, RenderError, UsageError
from engine.geometry import Box
from engine.job import Job
from engine.measure import default_memory
from engine.model.bundle import load
from engine.plan.measured import SeamPoint, StageProfile
from engine.plan.request import EXECUTORS, Request
from engine.run.base import base_image
from engine.run.stage import Stage

GIB = 1 << 30
SMALL = Request(size=(192, 256), stages=2, tile=16, overlap="4", executor="tiles")
"""12 writes: of tiles, or of rows of shards down 4 strips."""

both = pytest.mark.parametrize("executor", ["tiles", "bands"])


@pytest.fixture
def model(models):
    return models["rrdb"]


@pytest.fixture
def picture_file(tmp_path, picture):
    """(height, width) -> path of a picture."""

    def write(height, width, name="picture.png", mode="RGB"):
        values = (picture(height, width).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        Image.fromarray(values).convert(mode).save(tmp_path / name)
        return tmp_path / name

    return write


def whole(network, image):
    """The network's output for a whole image [3, H, W] as pixels: what every tiling is measured against."""
    with torch.inference_mode():
        return (network(image[None])[0].clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def largest_difference(a, b):
    return int(np.abs(a.astype(int) - b.astype(int)).max())


# Repeatable


@both
@pytest.mark.parametrize("name", ["rrdb", "swinir", "noisy"])
def test_equal_plans_give_equal_files(tmp_path, models, name, executor):
    for folder in "ab":
        render(load(models[name].path), replace(SMALL, executor=executor), tmp_path / folder / "out.zarr")
    assert files(tmp_path / "a") == files(tmp_path / "b")


@both
@pytest.mark.parametrize("name", ["rrdb", "noisy"])
def test_seeds_give_different_pictures(tmp_path, models, name, executor):
    for seed in (0, 1, (1 << 64) - 1):
        render(models[name], replace(SMALL, seed=seed, executor=executor), tmp_path / f"{seed}.zarr")
    first, second, last = (pixels(tmp_path / f"{seed}.zarr") for seed in (0, 1, (1 << 64) - 1))
    assert largest_difference(first, second) > 20
    assert largest_difference(first, last) > 20


@both
def test_the_plan_does_not_depend_on_the_place_or_the_moment(tmp_path, model, executor):
    first, second = (
        Job(model, replace(SMALL, executor=executor, tile=None), tmp_path / name / "out.zarr") for name in "ab"
    )
    assert first.plan == second.plan
    assert first.plan.digest == second.plan.digest


@both
def test_a_render_in_half_precision_leaves_the_model_in_float32(tmp_path, model_file, executor):
    """Casting a network is in place; the next render, and a measurement, must not see it."""
    fresh = load(model_file)
    for name, precision in (("a", "fp32"), ("b", "bf16"), ("c", "fp32")):
        render(fresh, replace(SMALL, precision=precision, executor=executor), tmp_path / name / "out.zarr")
    assert files(tmp_path / "a") == files(tmp_path / "c")
    assert not np.array_equal(pixels(tmp_path / "a" / "out.zarr"), pixels(tmp_path / "b" / "out.zarr"))


# Seamless


ROIS = {
    "one tile": (0, 0, 64, 64),
    "across tiles": (40, 30, 100, 90),
    "odd": (33, 17, 61, 53),
    "one pixel": (199, 150, 1, 1),
    "last corner": (250, 180, 6, 12),
    "a column": (128, 0, 3, 192),
    "all": (0, 0, 256, 192),
}


@pytest.mark.parametrize("name", ["rrdb", "swinir", "noisy"])
def test_a_region_is_the_crop_of_the_full_render(tmp_path, models, name):
    render(models[name], SMALL, tmp_path / "full.zarr")
    full = pixels(tmp_path / "full.zarr")
    for label, (x, y, width, height) in ROIS.items():
        roi = engine.geometry.Box(y, x, y + height, x + width)
        job = render(models[name], replace(SMALL, roi=roi), tmp_path / f"{label}.zarr")
        np.testing.assert_array_equal(pixels(tmp_path / f"{label}.zarr"), full[:, y : y + height, x : x + width])
        assert all(n > 0 for n in job.projection.pieces)
    assert job.plan.is_whole


@pytest.mark.parametrize("tile", [None, 16], ids=["one strip", "strips"])
@pytest.mark.parametrize("name", ["rrdb", "swinir", "noisy"])
def test_a_region_by_bands_is_the_crop_of_the_full_render_to_rounding_ties(tmp_path, models, name, tile):
    request = replace(SMALL, executor="bands", overlap="exact", tile=tile)
    full = pixels(render(models[name], replace(request, tile=None), tmp_path / "full.zarr").out)
    for label, (x, y, width, height) in ROIS.items():
        roi = engine.geometry.Box(y, x, y + height, x + width)
        job = render(models[name], replace(request, roi=roi), tmp_path / f"{label}.zarr")
        assert job.plan.seam_error == 0
        difference = np.abs(pixels(job.out).astype(int) - full[:, y : y + height, x : x + width])
        assert difference.max() <= 1
        assert (difference > 0).sum() <= 1e-4 * difference.size + 1


@pytest.mark.parametrize("overlap", ["exact", "auto"])
@pytest.mark.parametrize("name", ["rrdb", "swinir", "noisy"])
def test_tiles_leave_at_most_the_promised_error(tmp_path, models, name, overlap):
    """The same image in tiles of every size. Rounding may differ by a level where sums are made in another order."""
    request = replace(SMALL, overlap=overlap)
    render(models[name], replace(request, tile=64), tmp_path / "whole.zarr")
    for tile in (8, 24, 40):
        job = render(models[name], replace(request, tile=tile), tmp_path / f"{tile}.zarr")
        assert len(job.plan.stages[-1].grid) > 1
        promised = 1 if overlap == "exact" else 2 * len(job.stages) * (1 + request.seam_tolerance)
        assert largest_difference(pixels(tmp_path / f"{tile}.zarr"), pixels(tmp_path / "whole.zarr")) <= promised
        assert job.plan.seam_error <= request.seam_tolerance


@both
def test_the_chain_is_step_1_and_then_each_network(tmp_path, model, executor):
    """Against the same networks run on whole images, without the engine's tiles, bands, caches and stores."""
    job = render(model, replace(SMALL, overlap="exact", seed=5, executor=executor), tmp_path / "out.zarr")
    base = base_image(model.structure, 5, job.plan.base)
    with torch.inference_mode():
        middle = model.network(0)(base[None])[0].clamp(0, 1)
    assert largest_difference(pixels(tmp_path / "out.zarr"), whole(model.network(1), middle)) <= 1


@both
@pytest.mark.parametrize("size", [(24, 32), (37, 29), (65, 64)])
def test_a_picture_is_enlarged_by_a_bare_checkpoint(tmp_path, model_file, picture_file, picture, size, executor):
    bare = load(model_file.parent / "sr.safetensors")
    path = picture_file(*size)
    job = render(bare, Request(init=path, tile=16, overlap="exact", executor=executor), tmp_path / "out.zarr")
    assert job.plan.size == (4 * size[0], 4 * size[1])
    image = (picture(*size) * 255).round() / 255
    assert largest_difference(pixels(tmp_path / "out.zarr"), whole(bare.network(0), image)) <= 1
    assert attributes(tmp_path / "out.zarr")["plan"]["init_digest"] == job.plan.init_digest is not None


@both
def test_a_picture_takes_the_place_of_step_1(tmp_path, model, picture_file, executor):
    request = replace(SMALL, executor=executor)
    render(model, replace(request, init=picture_file(12, 16)), tmp_path / "a.zarr")
    render(model, replace(request, init=picture_file(12, 16), seed=9), tmp_path / "b.zarr")
    render(model, request, tmp_path / "c.zarr")
    a, b, c = (pixels(tmp_path / f"{name}.zarr") for name in "abc")
    np.testing.assert_array_equal(a, b)  # without input noise a seed changes nothing
    assert largest_difference(a, c) > 20


def test_a_picture_is_resampled_to_the_size_that_is_asked_for(tmp_path, model, picture_file):
    job = render(model, Request(init=picture_file(30, 40), size=(90, 120), tile=16, overlap="4"), tmp_path / "out.zarr")
    assert job.plan.base == (23, 30)
    assert pixels(tmp_path / "out.zarr").shape == (3, 90, 120)
    with pytest.raises(UsageError, match="would stretch the picture of 40x30 by 100%; use 240x180"):
        Job(model, Request(init=picture_file(30, 40), size=(90, 240), tile=16, overlap="4"), tmp_path / "x.zarr")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_pictures_of_every_kind_can_be_enlarged(tmp_path, model_file, picture_file, mode):
    path = picture_file(20, 24, f"picture.{'jpg' if mode == 'CMYK' else 'png'}", mode)
    render(load(model_file.parent / "sr.safetensors"), Request(init=path, tile=16, overlap="4"), tmp_path / "out.zarr")
    assert pixels(tmp_path / "out.zarr").shape == (3, 80, 96)


# Sizes


@both
@pytest.mark.parametrize("name", ["rrdb", "swinir"])
@pytest.mark.parametrize(
    ("width", "height", "stages"),
    [(251, 187, 2), (251, 187, 1), (1, 1, 1), (1, 1, 2), (3, 2, 2), (97, 5, 1), (2, 130, 2), (129, 130, 1)],
)
def test_any_size_can_be_rendered(tmp_path, models, name, width, height, stages, executor):
    request = replace(SMALL, size=(height, width), stages=stages, executor=executor)
    job = render(models[name], request, tmp_path / "out.zarr")
    levels = [pixels(tmp_path / "out.zarr", level) for level in range(len(job.plan.levels))]
    for level, values in enumerate(levels):
        assert values.shape == (3, -(-height // 2**level), -(-width // 2**level))
    assert attributes(tmp_path / "out.zarr")["complete"]
    np.testing.assert_array_equal(levels[-1], reduced(levels[0], len(levels) - 1))


def reduced(values, times):
    for _ in range(times):
        odd = [(0, 0), (0, values.shape[1] % 2), (0, values.shape[2] % 2)]
        v = np.pad(values, odd, mode="edge").astype(int)
        values = (v[:, ::2, ::2] + v[:, 1::2, ::2] + v[:, ::2, 1::2] + v[:, 1::2, 1::2] + 2) // 4
    return values


@both
@pytest.mark.parametrize("name", ["rrdb", "swinir"])
def test_an_odd_size_is_the_crop_of_the_next_whole_one(tmp_path, models, name, executor):
    for width, height in ((251, 187), (256, 192)):
        render(models[name], replace(SMALL, size=(height, width), executor=executor), tmp_path / f"{width}.zarr")
    np.testing.assert_array_equal(pixels(tmp_path / "251.zarr"), pixels(tmp_path / "256.zarr")[:, :187, :251])


def test_without_a_size_all_stages_run_on_the_base(tmp_path, model):
    assert Job(model, Request(overlap="4"), tmp_path / "out.zarr").plan.size == (24 * 16, 32 * 16)


@both
@pytest.mark.parametrize("tile", [1, 7, 16, 100])
def test_any_tile_can_be_asked_for(tmp_path, models, tile, executor):
    for name in ("rrdb", "swinir"):
        job = render(
            models[name], replace(SMALL, size=(45, 60), tile=tile, executor=executor), tmp_path / f"{name}.zarr"
        )
        if executor == "bands":  # a strip is no wider than the image
            assert job.plan.stages[-1].core >= min(tile, 60 // job.plan.stages[-1].scale)
        else:
            assert all(stage.core >= tile for stage in job.plan.stages)
        assert attributes(tmp_path / f"{name}.zarr")["complete"]


# What is left on disk


def test_the_store_says_what_it_is(tmp_path, models):
    profile = StageProfile(
        "a test", {"0.98": 5}, {"0.98": 3}, (SeamPoint(0, 1.0, 2.0, 3.0), SeamPoint(4, 0.1, 0.2, 0.3))
    )
    job = render(models["noisy"].with_profiles([profile, profile]), replace(SMALL, seed=3), tmp_path / "out.zarr")
    found = attributes(tmp_path / "out.zarr")
    assert set(found) == {
        "complete", "plan", "engine", "model", "licences", "seam_error_levels", "precision_error_levels", "profiles"
    }  # fmt: skip
    assert found["complete"] is True
    assert found["plan"] == job.plan.to_json()
    assert found["plan"]["seed"] == 3
    assert found["plan"]["model_digest"] == models["noisy"].digest
    assert [stage["sigma"] for stage in found["plan"]["stages"]] == [0.05, 0.1]
    assert found["engine"] == engine.__version__
    assert found["model"] == "noisy.safetensors"
    assert found["licences"] == models["noisy"].manifest.licences
    assert found["seam_error_levels"] == job.plan.seam_error == 0.3
    assert [StageProfile.from_json(p) for p in found["profiles"]] == [profile, profile]
    assert json.loads((tmp_path / "out.zarr" / "zarr.json").read_text())["attributes"]["ourgan"] == found


@both
def test_a_store_is_not_complete_before_its_end(tmp_path, model, executor):
    job = Job(model, replace(SMALL, executor=executor), tmp_path / "out.zarr")
    seen = []
    for done in job.run(job.open_sink(resume=False, overwrite=False)):
        seen.append(done.box)
        assert attributes(tmp_path / "out.zarr")["complete"] is False
        # Bands hand the next rows over before they speak of the last ones.
        assert shards(tmp_path / "out.zarr", 0) - len(seen) in ((0, 1) if executor == "bands" else (0,))
    assert len(seen) == len(set(seen)) == 12
    assert attributes(tmp_path / "out.zarr")["complete"] is True
    assert [p.name for p in tmp_path.iterdir()] == ["out.zarr"]


def test_every_tile_of_every_stage_runs_once(tmp_path, models):
    for name in ("rrdb", "swinir", "noisy"):
        job = Job(models[name], replace(SMALL, tile=8, size=(187, 251)), tmp_path / f"{name}.zarr")
        ran = []
        for _ in job.run(
            job.open_sink(resume=False, overwrite=False), lambda stage, area, ran=ran: ran.append((stage, area))
        ):
            pass
        assert tuple(sum(stage == k for stage, _ in ran) for k in (0, 1)) == job.projection.pieces
        assert tuple(sum(area for stage, area in ran if stage == k) for k in (0, 1)) == job.projection.pixels
        assert {area for stage, area in ran if stage == 1} == {np.prod(job.plan.stages[1].tile_shape)}


@pytest.mark.parametrize("roi", [None, (40, 30, 100, 90)])
def test_spilling_to_disk_changes_nothing_and_is_cleaned_up(tmp_path, models, monkeypatch, roi):
    """Memory for a single inner tile: everything else goes through the scratch array."""
    request = replace(SMALL, tile=8, roi=roi and engine.geometry.Box(*roi))
    render(models["noisy"], request, tmp_path / "a" / "out.zarr")
    monkeypatch.setattr("engine.plan.limits.cache_share", lambda stages: 1)
    job = Job(models["noisy"], request, tmp_path / "b" / "out.zarr")
    spilled = 0
    for _ in job.run(job.open_sink(resume=False, overwrite=False)):
        spilled = max(spilled, len(list((tmp_path / "b" / "out.zarr.scratch").glob("*/1/c/0/*/*"))))
    assert spilled > 1
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_a_refused_store_keeps_what_an_interrupted_render_spilled(tmp_path, model, monkeypatch):
    monkeypatch.setattr("engine.plan.limits.cache_share", lambda stages: 1)
    job = Job(model, replace(SMALL, tile=8), tmp_path / "out.zarr")
    next(job.run(job.open_sink(resume=False, overwrite=False)))
    before = files(tmp_path)
    assert any("scratch" in name for name in before)
    again = Job(model, replace(SMALL, tile=8), tmp_path / "out.zarr")
    with pytest.raises(InputError, match="resume=True"):
        again.open_sink(resume=False, overwrite=False)
    assert files(tmp_path) == before


# Failures


@contextmanager
def poisoned(call, value=torch.nan):
    """One value in the middle of a network's output is no number, in the ``call``-th time that any network gives rows."""
    run, push, calls = Stage.run, Stage.push, 0

    def failing(output):
        nonlocal calls
        calls += 1
        output = output.clone()
        if calls == call:
            output[0, 1, output.shape[2] // 2, output.shape[3] // 2] = value
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage, "run", lambda *arguments: failing(run(*arguments)))
        patch.setattr(Stage, "push", lambda *arguments: [(y, failing(rows)) for y, rows in push(*arguments)])
        yield


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("call", "stage", "written"), [(1, 1, 0), (2, 2, 0), (6, 2, 4)])
def test_a_tile_with_nan_is_never_written(tmp_path, model, call, stage, written, value):
    job = Job(model, SMALL, tmp_path / "out.zarr")
    message = rf"stage {stage}: 1 values of tile \(row \d, column \d\) are NaN"
    with poisoned(call, value), pytest.raises(RenderError, match=message):
        for _ in job.run(job.open_sink(resume=False, overwrite=False)):
            pass
    assert attributes(tmp_path / "out.zarr")["complete"] is False
    assert shards(tmp_path / "out.zarr", 0) == written


@both
def test_a_nan_is_one_line_and_the_render_can_be_finished(tmp_path, model, capsys, executor):
    render(model, replace(SMALL, executor=executor), tmp_path / "good" / "out.zarr")
    command = ["render", str(model.path), "--size", "256x192", "--stages", "2", "--tile", "16", "--overlap", "4"]
    command += ["--executor", executor, "--out", str(tmp_path / "bad" / "out.zarr"), "--resume"]
    with poisoned(9), pytest.raises(SystemExit) as caught:
        main(command)
    assert caught.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("engine: ")]
    assert "stage 2" in line
    assert "--precision fp32" in line
    with pytest.raises(SystemExit) as caught:
        main(command)
    assert caught.value.code == 0
    assert files(tmp_path / "bad") == files(tmp_path / "good")


@both
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["rrdb", "swinir"])
def test_half_precision_is_close_to_float32(tmp_path, models, name, precision, executor):
    for given in ("fp32", precision):
        render(models[name], replace(SMALL, precision=given, executor=executor), tmp_path / f"{given}.zarr")
    exact, near = (pixels(tmp_path / f"{given}.zarr").astype(int) for given in ("fp32", precision))
    assert 0 < np.abs(near - exact).max() <= 8
    assert np.abs(near - exact).mean() < 1
    assert attributes(tmp_path / f"{precision}.zarr")["plan"]["precision"] == precision


# Budgets


def test_too_little_memory_is_refused_before_anything_is_written(tmp_path, model):
    job = Job(model, replace(SMALL, memory=100_000_000), tmp_path / "out.zarr")
    with pytest.raises(
        BudgetError, match=r"needs \d\.\d\d GiB of memory .* --memory allows 95\.4 MiB; .*--tile below 16"
    ):
        job.open_sink(resume=False, overwrite=False)
    with pytest.raises(
        BudgetError, match=r"smallest tile .* needs \d\.\d\d GiB of memory, --memory allows 95\.4 MiB; raise it"
    ):
        Job(model, replace(SMALL, memory=100_000_000, tile=None), tmp_path / "out.zarr")
    assert not list(tmp_path.iterdir())


def test_less_memory_means_smaller_tiles(tmp_path, models):
    request = Request(size=(3072, 4096), stages=2, overlap="16", executor="tiles")
    roomy = Job(models["rrdb"], replace(request, memory=64 * GIB), tmp_path / "out.zarr")
    need = roomy.projection.working - roomy.projection.host_parts["base image"]
    tight = Job(models["rrdb"], replace(request, memory=roomy.baseline + need * 2 // 3), tmp_path / "out.zarr")
    assert tight.plan.stages[-1].core < roomy.plan.stages[-1].core
    assert tight.projection.host <= tight.budget.host
    tight.check()


@both
def test_too_little_disk_is_refused_before_anything_is_written(tmp_path, model, monkeypatch, executor):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    job = Job(model, replace(SMALL, executor=executor), tmp_path / "out.zarr")
    with pytest.raises(BudgetError, match=r"the disk has 0\.1 MiB free; make room, write elsewhere or use a smaller"):
        job.open_sink(resume=False, overwrite=False)
    assert not list(tmp_path.iterdir())


def test_what_is_already_written_need_not_fit_once_more(tmp_path, model, monkeypatch):
    """A disk that was large enough for the render is large enough for the rest of it."""
    request = replace(SMALL, tile=8)
    job = Job(model, request, tmp_path / "out.zarr")
    needed = job.projection.disk + job.projection.scratch
    usage = shutil.disk_usage(tmp_path)

    def free(_):
        taken = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
        return usage._replace(free=needed + 1000 - taken)

    monkeypatch.setattr(shutil, "disk_usage", free)
    run = job.run(job.open_sink(resume=False, overwrite=False))
    for _ in range(40):
        next(run)
    again = Job(model, request, tmp_path / "out.zarr")
    assert again.budget.disk < needed
    for _ in again.run(again.open_sink(resume=True, overwrite=False)):
        pass
    assert attributes(tmp_path / "out.zarr")["complete"]


@pytest.mark.parametrize("changes", [{}, {"tile": None}, {"tile": None, "executor": "bands"}], ids=str)
def test_an_absurd_size_is_refused_at_once(tmp_path, model, changes):
    """Before its tiles are counted one by one."""
    request = replace(SMALL, size=(10_000_000, 10_000_000), **changes)
    with pytest.raises(BudgetError):
        Job(model, request, tmp_path / "out.zarr").open_sink(resume=False, overwrite=False)


@pytest.mark.parametrize(("width", "height"), [(251, 187), (256, 192), (1, 1), (500, 33)])
@pytest.mark.parametrize("tile", [3, 40])
@pytest.mark.parametrize("name", ["rrdb", "swinir"])
def test_the_tiles_of_a_whole_image_are_known_without_a_list_of_them(tmp_path, models, name, width, height, tile):
    job = Job(models[name], replace(SMALL, size=(height, width), tile=tile), tmp_path / "out.zarr")
    assert job.projection.pieces == job.plan.tiles_to_run(list(job.plan.writes()))


def test_the_default_memory_is_steady():
    assert [default_memory(free) // GIB for free in (GIB, 5 * GIB, 8 * GIB, 15 * GIB, 16 * GIB, 31 * GIB)] == [
        1,
        2,
        4,
        4,
        8,
        8,
    ]


# What a request may not say, and when that is noticed


@pytest.mark.parametrize(
    "changes",
    [{"roi": engine.geometry.Box(0, 200, 10, 257)}, {"precision": "fp8"}, {"stages": 3}, {"device": "abacus"}],
    ids=str,
)
def test_a_wrong_request_is_refused_before_anything_is_measured(tmp_path, model, monkeypatch, changes):
    def measured(*_):
        raise AssertionError("measured")

    for name in ("stage_footprint", "band_cost", "precision_errors", "probe"):
        monkeypatch.setattr(f"engine.probe.profiles.{name}", measured)
    for executor in EXECUTORS:
        with pytest.raises(UsageError):
            Job(model, replace(SMALL, overlap="auto", executor=executor, **changes), tmp_path / "out.zarr")


def test_a_model_without_step_1_asks_for_a_picture(tmp_path, model_file):
    with pytest.raises(UsageError, match="--init"):
        Job(load(model_file.parent / "sr.safetensors"), SMALL, tmp_path / "out.zarr")


def test_a_model_is_measured_on_the_picture_once(tmp_path, model_file, picture_file, monkeypatch):
    """A bare checkpoint has nobody else's measurement to go by."""
    profile = StageProfile("a test", {}, {}, (SeamPoint(0, 1.0, 2.0, 3.0), SeamPoint(4, 0.1, 0.2, 0.3)))
    calls = []
    monkeypatch.setattr("engine.probe.profiles.probe", lambda *arguments: calls.append(arguments) or [profile])
    bare = load(model_file.parent / "sr.safetensors")
    job = render(bare, Request(init=picture_file(20, 24), tile=16), tmp_path / "out.zarr")
    assert len(calls) == 1
    assert job.plan.stages[0].halo == 4
    assert [StageProfile.from_json(p) for p in attributes(tmp_path / "out.zarr")["profiles"]] == [profile]


@pytest.mark.parametrize("executor", ["bands", "stream"])
def test_a_dithered_level_depends_on_its_place_alone(tmp_path, model, executor):
    """Exact halos, so that every executor rounds the same values: the same thresholds, in regions too; and none is lost."""
    request = replace(SMALL, overlap="exact", precision="fp32", device="cpu", dither=True)
    tiled = pixels(render(model, request, tmp_path / "tiles.zarr").out)
    other = pixels(render(model, replace(request, executor=executor, tile=None), tmp_path / "other.zarr").out)
    assert (tiled != other).mean() < 1e-3
    roi = Box(33, 17, 180, 200)
    part = pixels(render(model, replace(request, roi=roi), tmp_path / "part.zarr").out)
    assert (part != tiled[(slice(None), *roi.slices)]).mean() < 1e-3
    plain = pixels(render(model, replace(request, dither=False), tmp_path / "plain.zarr").out).astype(int)
    assert np.abs(tiled - plain).max() == 1
    assert 0.2 < (tiled != plain).mean() < 0.8
    assert abs((tiled - plain).mean()) < 0.02
