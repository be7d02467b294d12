"""Whole renders through ``Job``: equal plans give equal bits, regions are crops, tiles leave no trace, stores are whole."""

import json
import math
import os
import re
import shutil
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from support.stores import attributes, files, pixels, render, shards

import engine
from engine.errors import BudgetError, InputError, RenderError, ResumeError, UsageError
from engine.geometry import Box
from engine.io.first_look import FIRST_LOOK, decode_first_look
from engine.job import Job
from engine.measure import default_memory
from engine.model.build import build
from engine.model.bundle import load
from engine.plan.layouts import EXECUTORS
from engine.plan.measured import SeamPoint, StageProfile
from engine.plan.request import AUTO, Request
from engine.run.base import base_image
from engine.run.stage import Stage

GIB = 1 << 30
SMALL = Request(size=(256, 192), stages=2, tile=16, overlap="4", executor="tiles", precision="fp32")
"""12 writes: of tiles, or of rows of shards down 4 strips."""

BOTH = ("tiles", "bands")
PROFILE = StageProfile("a test", {"0.98": 5}, {"0.98": 3}, (SeamPoint(0, 1.0, 2.0, 3.0), SeamPoint(4, 0.1, 0.2, 0.3)))

rrdb_and_slow_swinir = pytest.mark.parametrize("name", ["rrdb", pytest.param("swinir", marks=pytest.mark.slow)])


@pytest.fixture
def model(models):
    return models["rrdb"]


@pytest.fixture
def bare(model_file):
    """A super-resolution checkpoint, without step 1."""
    return load(model_file.parent / "sr.safetensors")


@pytest.fixture
def picture_file(tmp_path, picture):
    """Function ``picture_file(height, width)`` -> path of a picture."""

    def write(height, width, name="picture.png", mode="RGB"):
        values = (picture(height, width).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        Image.fromarray(values).convert(mode).save(tmp_path / name)
        return tmp_path / name

    return write


def whole_output(network, image):
    """The network's output for a whole image [3, H, W], as uint8: the reference of every tiling."""
    with torch.inference_mode():
        return (network(image[None])[0].clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def largest_difference(a, b):
    return int(np.abs(a.astype(int) - b.astype(int)).max())


# Repeatable


@pytest.mark.parametrize("executor", BOTH)
def test_equal_plans_give_equal_files(tmp_path, models, executor):
    for name, model in models.items():
        for folder in "ab":
            render(load(model.path), replace(SMALL, executor=executor), tmp_path / name / folder / "out.zarr")
        assert files(tmp_path / name / "a") == files(tmp_path / name / "b"), name


def test_seeds_give_different_pictures(tmp_path, models):
    for name in ("rrdb", "noisy"):
        for executor in BOTH:
            images = []
            for seed in (0, 1, (1 << 64) - 1):
                job = render(
                    models[name], replace(SMALL, seed=seed, executor=executor), tmp_path / f"{name} {executor} {seed}"
                )
                images.append(pixels(job.out))
            assert largest_difference(images[0], images[1]) > 20
            assert largest_difference(images[0], images[2]) > 20


@pytest.mark.parametrize("executor", [pytest.param("tiles", marks=pytest.mark.slow), "bands"])
def test_noise_gain_is_that_of_a_model_file(tmp_path, models, executor):
    """The pixels of a file with louder noise, and 1 those without; a store is continued with its own gain alone."""
    model, request = models["noisy"], replace(SMALL, size=(128, 96), tile=8, executor=executor, seed=3)
    loud = build(model.path, [str(model.path)] * 2, noise_gain=[1.0, 2.0], margin=0)
    expected = pixels(render(loud, request, tmp_path / "file.zarr").out)
    job = render(model, replace(request, noise_gain="1,2"), tmp_path / "loud.zarr", writes=2)
    assert (job.plan.noise_gain, job.plan.model_digest) == ((1.0, 2.0), model.digest)
    for gain, shown in ((1, "[1.0, 1.0]"), (3, "[1.0, 3.0]")):
        with pytest.raises(ResumeError, match=re.escape(f"noise_gain: [1.0, 2.0] there, {shown} here")):
            render(model, replace(request, noise_gain=gain), job.out, resume=True)
    render(model, replace(request, noise_gain=2), job.out, resume=True)
    np.testing.assert_array_equal(pixels(job.out), expected)
    plain = render(model, request, tmp_path / "plain.zarr", writes=2).out
    assert "noise_gain" not in attributes(plain)["plan"]
    render(model, replace(request, noise_gain=1), plain, resume=True)
    assert largest_difference(expected, pixels(plain)) > 20


def test_plan_depends_on_no_place_or_moment(tmp_path, model):
    for executor in BOTH:
        request = replace(SMALL, executor=executor, tile=None)
        first, second = (Job.prepare(model, request, tmp_path / name / "out.zarr") for name in "ab")
        assert first.plan == second.plan
        assert first.plan.digest == second.plan.digest


def test_half_precision_leaves_the_model_in_float32(tmp_path, model_file):
    """Casting a network is in place; the next render, and a measurement, must not see it."""
    for executor in BOTH:
        fresh, folder = load(model_file), tmp_path / executor
        for name, precision in (("a", "fp32"), ("b", "bf16"), ("c", "fp32")):
            render(fresh, replace(SMALL, precision=precision, executor=executor), folder / name / "out.zarr")
        assert files(folder / "a") == files(folder / "c")
        assert not np.array_equal(pixels(folder / "a" / "out.zarr"), pixels(folder / "b" / "out.zarr"))


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
"""(x, y, width, height) of regions."""


@pytest.mark.parametrize("name", ["rrdb", "swinir", "noisy"])
def test_region_is_the_crop(tmp_path, models, name):
    small = replace(SMALL, tile=(24, 16))
    full = pixels(render(models[name], small, tmp_path / "full.zarr").out)
    for label, (x, y, width, height) in ROIS.items():
        request = replace(small, roi=Box(y, x, y + height, x + width))
        job = render(models[name], request, tmp_path / f"{label}.zarr")
        np.testing.assert_array_equal(pixels(job.out), full[:, y : y + height, x : x + width])
        assert all(n > 0 for n in job.projection.tasks)
        assert job.plan.is_whole == (label == "all")


@pytest.mark.parametrize(
    ("options", "part"),
    [({}, np.s_[:24, :32]), ({"roi": Box(33, 64, 193, 320)}, np.s_[2:13, 4:20]), ({"init": (48, 40)}, np.s_[:48, :40])],
    ids=["whole", "region", "picture"],
)
def test_first_look_is_what_the_networks_begin_with(tmp_path, model, picture_file, options, part):
    """An unfinished store has it, for viewers, of the part that is written; a finished one has not."""
    size = (512, 384)
    if "init" in options:
        size, options = (640, 768), {"init": picture_file(*options["init"])}
    request = Request(size=size, stages=2, overlap="4", precision="fp32", executor="tiles", **options)
    job = render(model, request, tmp_path / "a.zarr", writes=1)
    look = np.asarray(decode_first_look(attributes(tmp_path / "a.zarr")[FIRST_LOOK])).astype(float)
    base = job._base().read(Box(0, 0, *job.plan.base)).permute(1, 2, 0).numpy()[part] * 255
    assert look.shape == base.shape
    assert np.corrcoef(look.ravel(), base.ravel())[0, 1] > 0.85  # WebP blurs the grain
    render(model, request, tmp_path / "a.zarr", resume=True)
    assert FIRST_LOOK not in attributes(tmp_path / "a.zarr")


@pytest.mark.parametrize("name", ["rrdb", "swinir", "noisy"])
def test_region_by_bands_is_the_crop_to_rounding(tmp_path, models, name):
    request = replace(SMALL, executor="bands", overlap="exact")
    full = pixels(render(models[name], replace(request, tile=None), tmp_path / "full.zarr").out)
    for label, (x, y, width, height) in ROIS.items():
        for tile in (None, 16):
            part = replace(request, roi=Box(y, x, y + height, x + width), tile=tile)
            job = render(models[name], part, tmp_path / f"{label} {tile}.zarr")
            assert job.seam_error == 0
            difference = np.abs(pixels(job.out).astype(int) - full[:, y : y + height, x : x + width])
            assert difference.max() <= 1, (label, tile)
            assert (difference > 0).sum() <= 1e-4 * difference.size + 1, (label, tile)


@pytest.mark.parametrize("name", ["rrdb", *(pytest.param(n, marks=pytest.mark.slow) for n in ("swinir", "noisy"))])
def test_tiles_keep_the_promised_error(tmp_path, models, name):
    """The same image in tiles of several sizes. Rounding may differ by a level where the order of sums differs."""
    for overlap in ("exact", "auto"):
        request = replace(SMALL, overlap=overlap)
        whole = pixels(render(models[name], replace(request, tile=64), tmp_path / f"{overlap} whole.zarr").out)
        for tile in (8, 24, (40, 16)):
            job = render(models[name], replace(request, tile=tile), tmp_path / f"{overlap} {tile}.zarr")
            assert len(job.plan.stages[-1].grid) > 1
            promised = 1 if overlap == "exact" else 2 * len(job.stages) * (1 + request.seam_tolerance)
            assert largest_difference(pixels(job.out), whole) <= promised, (overlap, tile)
            assert job.seam_error <= request.seam_tolerance


def test_chain_is_step_1_and_then_each_network(tmp_path, model):
    """Against the same networks on whole images, without the engine's tiles, bands, caches and stores."""
    for executor in BOTH:
        job = render(model, replace(SMALL, overlap="exact", seed=5, executor=executor), tmp_path / f"{executor}.zarr")
        base = base_image(model.base_generator, 5, job.plan.base)
        with torch.inference_mode():
            middle = model.network(0)(base[None])[0].clamp(0, 1)
        assert largest_difference(pixels(job.out), whole_output(model.network(1), middle)) <= 1


def test_picture_is_enlarged_by_a_bare_checkpoint(tmp_path, bare, picture_file, picture):
    for size in ((24, 32), (37, 29), (65, 64)):
        path = picture_file(*size, name=f"{size}.png")
        image = (picture(*size) * 255).round() / 255
        for executor in BOTH:
            request = Request(init=path, tile=16, overlap="exact", executor=executor, precision="fp32")
            job = render(bare, request, tmp_path / f"{size} {executor}.zarr")
            assert job.plan.size == (4 * size[0], 4 * size[1])
            assert largest_difference(pixels(job.out), whole_output(bare.network(0), image)) <= 1
            assert attributes(job.out)["plan"]["init_digest"] == job.plan.init_digest is not None


def test_picture_replaces_step_1(tmp_path, model, picture_file):
    for executor in BOTH:
        request = replace(SMALL, executor=executor)
        first = render(model, replace(request, init=picture_file(12, 16)), tmp_path / f"{executor} a.zarr")
        second = render(model, replace(request, init=picture_file(12, 16), seed=9), tmp_path / f"{executor} b.zarr")
        sample = render(model, request, tmp_path / f"{executor} c.zarr")
        np.testing.assert_array_equal(pixels(first.out), pixels(second.out))  # without noise a seed changes nothing
        assert largest_difference(pixels(first.out), pixels(sample.out)) > 20


def test_picture_is_enlarged_then_reduced_to_the_requested_size(tmp_path, model, picture_file):
    request = Request(init=picture_file(30, 40), size=(120, 90), tile=16, overlap="4", precision="fp32")
    job = render(model, request, tmp_path / "out.zarr")
    assert (job.plan.base, job.plan.enlarged) == ((30, 40), (120, 160))
    assert pixels(tmp_path / "out.zarr").shape == (3, 90, 120)
    for size, words in (((240, 90), "would stretch the picture of 40x30 by 100%; use 240x180"), ((9, 0), "not a size")):
        with pytest.raises(UsageError, match=words):
            Job.prepare(model, replace(request, size=size), tmp_path / "x.zarr")


def test_pictures_of_every_kind(tmp_path, bare, picture_file):
    for mode, channels in {"L": 1, "RGBA": 4, "P": 3, "1": 1, "CMYK": 3}.items():
        path = picture_file(20, 24, f"picture.{'jpg' if mode == 'CMYK' else 'png'}", mode)
        request = Request(init=path, tile=16, overlap="4", precision="fp32")
        job = render(bare, request, tmp_path / f"{mode}.zarr")
        assert pixels(job.out).shape == (channels, 80, 96), mode


def test_conversions_of_a_picture_are_logged_and_refusals_come_first(tmp_path, bare, picture_file):
    def lines(path):
        log = []
        Job.prepare(bare, Request(init=path, overlap="exact", precision="fp32"), tmp_path / "out.zarr", log.append)
        return [line for line in log if str(path) in line]

    assert lines(picture_file(20, 24)) == []
    alpha = picture_file(20, 24, "alpha.png", "RGBA")
    assert lines(alpha) == []  # it is kept
    floats, log = tmp_path / "floats.tif", []
    tifffile.imwrite(floats, np.full((20, 24), np.nan, np.float32))
    with pytest.raises(InputError, match="floats.tif: .*NaN among its samples"):
        engine.render(bare, tmp_path / "no.zarr", init=floats, log=log.append)
    assert log == []  # nothing was measured
    assert not (tmp_path / "no.zarr").exists()


# Sizes


def halved(values, times):
    for _ in range(times):
        odd = [(0, 0), (0, values.shape[1] % 2), (0, values.shape[2] % 2)]
        v = np.pad(values, odd, mode="edge").astype(int)
        values = (v[:, ::2, ::2] + v[:, 1::2, ::2] + v[:, ::2, 1::2] + v[:, 1::2, 1::2] + 2) // 4
    return values


SIZES = [(251, 187, 2), (251, 187, 1), (1, 1, 1), (1, 1, 2), (3, 2, 2), (97, 5, 1), (2, 130, 2), (129, 130, 1)]
"""(width, height, stages)."""


@rrdb_and_slow_swinir
def test_any_size(tmp_path, models, name):
    for executor in BOTH:
        for width, height, stages in SIZES:
            request = replace(SMALL, size=(width, height), stages=stages, executor=executor)
            job = render(models[name], request, tmp_path / f"{executor} {width}x{height} {stages}.zarr")
            levels = [pixels(job.out, level) for level in range(len(job.plan.pyramid))]
            for level, values in enumerate(levels):
                assert values.shape == (3, -(-height // 2**level), -(-width // 2**level))
            assert attributes(job.out)["complete"]
            np.testing.assert_array_equal(levels[-1], halved(levels[0], len(levels) - 1))


def test_odd_size_is_the_crop_of_the_next_whole_one(tmp_path, models):
    for name in ("rrdb", "swinir"):
        for executor in BOTH:
            request = replace(SMALL, executor=executor)
            odd, even = (
                pixels(render(models[name], replace(request, size=size), tmp_path / f"{name} {executor} {size}").out)
                for size in ((251, 187), (256, 192))
            )
            np.testing.assert_array_equal(odd, even[:, :187, :251])


def test_default_size_is_that_of_all_stages(tmp_path, model):
    request = Request(overlap="4", precision="fp32")
    assert Job.prepare(model, request, tmp_path / "out.zarr").plan.size == (24 * 16, 32 * 16)


@pytest.mark.parametrize("executor", BOTH)
def test_any_tile(tmp_path, models, executor):
    for name in ("rrdb", "swinir"):
        for tile in (1, 7, 16, 100) if executor == "bands" else (1, (7, 16), 100):
            request = replace(SMALL, size=(60, 45), tile=tile, executor=executor)
            job = render(models[name], request, tmp_path / f"{name} {tile}.zarr")
            if executor == "bands":  # a strip is no wider than the image
                assert job.plan.stages[-1].tile >= min(tile, 60 // job.plan.stages[-1].scale)
            else:
                assert all(n >= least for s in job.plan.stages for n, least in zip(s.core, request.core, strict=True))
            assert attributes(job.out)["complete"]


# On disk


def test_store_records_its_plan_and_provenance(tmp_path, models):
    job = render(models["noisy"].with_profiles([PROFILE, PROFILE]), replace(SMALL, seed=3), tmp_path / "out.zarr")
    stored = attributes(tmp_path / "out.zarr")
    assert set(stored) == {
        "complete", "plan", "engine", "model", "licences", "overlap", "seam_error_levels", "precision_error_levels",
        "profiles", "instructions", "threads",
    }  # fmt: skip
    assert stored["complete"] is True
    assert stored["plan"] == job.plan.to_json()
    assert stored["plan"]["seed"] == 3
    assert stored["plan"]["model_digest"] == models["noisy"].digest
    assert [stage["sigma"] for stage in stored["plan"]["stages"]] == [0.05, 0.1]
    assert stored["engine"] == engine.__version__
    assert stored["model"] == "noisy.safetensors"
    assert stored["licences"] == models["noisy"].manifest.licences
    assert stored["overlap"] == "4"
    assert stored["seam_error_levels"] == job.seam_error == 0.3
    assert [StageProfile.from_json(p) for p in stored["profiles"]] == [PROFILE, PROFILE]
    assert json.loads((tmp_path / "out.zarr" / "zarr.json").read_text())["attributes"]["ourgan"] == stored


def test_store_is_complete_only_at_the_end(tmp_path, model):
    for executor in BOTH:
        folder, boxes = tmp_path / executor, []
        job = Job.prepare(model, replace(SMALL, executor=executor), folder / "out.zarr")
        for written in job.run(job.open_sink(resume=False, overwrite=False)):
            boxes.append(written.box)
            assert attributes(job.out)["complete"] is False
            # Bands submit the next rows before they report the last ones.
            assert shards(job.out, 0) - len(boxes) in ((0, 1) if executor == "bands" else (0,))
        assert len(boxes) == len(set(boxes)) == 12
        assert attributes(job.out)["complete"] is True
        assert [p.name for p in folder.iterdir()] == ["out.zarr"]


def test_every_tile_runs_once_and_is_projected(tmp_path, models):
    for name, model in models.items():
        job = Job.prepare(model, replace(SMALL, tile=8, size=(251, 187)), tmp_path / f"{name}.zarr")
        ran = []
        sink = job.open_sink(resume=False, overwrite=False)
        for _ in job.run(sink, lambda position, lr_pixels, ran=ran: ran.append((position, lr_pixels))):
            pass
        assert tuple(sum(position == k for position, _ in ran) for k in (0, 1)) == job.projection.tasks
        assert tuple(sum(n for position, n in ran if position == k) for k in (0, 1)) == job.projection.lr_pixels
        assert {n for position, n in ran if position == 1} == {np.prod(job.plan.stages[1].tile_shape)}


def test_spilled_tiles_change_no_byte_and_are_removed(tmp_path, models, monkeypatch):
    """With memory for a single inner tile: all other tiles go through the scratch array."""
    for name, roi in (("whole", None), ("region", Box(40, 30, 100, 90))):
        request = replace(SMALL, tile=8, roi=roi)
        render(models["noisy"], request, tmp_path / name / "a" / "out.zarr")
        job = Job.prepare(models["noisy"], request, tmp_path / name / "b" / "out.zarr")
        spilled = 0
        with monkeypatch.context() as patch:
            patch.setattr("engine.plan.limits.cache_share", lambda stages: 1)
            for _ in job.run(job.open_sink(resume=False, overwrite=False)):
                spilled = max(spilled, len(list(job.out.parent.glob(".out.zarr.*.scratch/*/1/c/0/*/*"))))
        assert spilled > 1
        assert files(tmp_path / name / "a") == files(tmp_path / name / "b")


def test_refused_store_keeps_spilled_tiles(tmp_path, model, monkeypatch):
    """Spilled tiles of an interrupted render, which can still be resumed."""
    monkeypatch.setattr("engine.plan.limits.cache_share", lambda stages: 1)
    request = replace(SMALL, tile=8)
    render(model, request, tmp_path / "out.zarr", writes=1)
    before = files(tmp_path)
    assert any("scratch" in name for name in before)
    with pytest.raises(InputError, match="resume=True|--resume"):
        render(model, request, tmp_path / "out.zarr")
    assert files(tmp_path) == before


# Failures


@contextmanager
def poisoned(call, value=torch.nan):
    """Put ``value`` in the middle of a network's output, in call number ``call`` of all networks."""
    run, push, calls = Stage.run, Stage.push, 0

    def damaged(output):
        nonlocal calls
        calls += 1
        output = output.clone()
        if calls == call:
            output[0, 1, output.shape[2] // 2, output.shape[3] // 2] = value
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage, "run", lambda *arguments: damaged(run(*arguments)))
        patch.setattr(Stage, "push", lambda *arguments: [(y, damaged(rows)) for y, rows in push(*arguments)])
        yield


def test_nonfinite_tile_is_never_written(tmp_path, model):
    for value in (torch.nan, torch.inf):
        for call, step, written in ((1, 2, 0), (2, 3, 0), (6, 3, 4)):
            out = tmp_path / f"{value} {call}.zarr"
            words = rf"step {step}: 1 NaN or infinite values in tile \(row \d, column \d\)"
            with poisoned(call, value), pytest.raises(RenderError, match=words):
                render(model, SMALL, out)
            assert attributes(out)["complete"] is False
            assert shards(out, 0) == written


def test_nan_is_one_line_and_the_render_can_be_finished(tmp_path, model, call):
    for executor in BOTH:
        render(model, replace(SMALL, executor=executor), tmp_path / executor / "good" / "out.zarr")
        command = (
            f"render {model.path} --size 256x192 --stages 2 --tile 16 --overlap 4 --precision fp32 "
            f"--executor {executor} --out {tmp_path / executor / 'bad' / 'out.zarr'} --resume"
        )
        with poisoned(9):
            code, _, err = call(command)
        assert code == 1
        (line,) = [line for line in err.splitlines() if line.startswith("engine: ")]
        assert "step 3" in line
        assert "fp32" in line
        assert call(command)[0] == 0
        assert files(tmp_path / executor / "bad") == files(tmp_path / executor / "good")


@rrdb_and_slow_swinir
def test_half_precision_is_close_to_float32(tmp_path, models, name):
    for executor in BOTH:
        images = {}
        for precision in ("fp32", "bf16", "fp16"):
            request = replace(SMALL, precision=precision, executor=executor)
            job = render(models[name], request, tmp_path / f"{executor} {precision}.zarr")
            assert attributes(job.out)["plan"]["precision"] == precision
            images[precision] = pixels(job.out).astype(int)
        for half in ("bf16", "fp16"):
            difference = np.abs(images[half] - images["fp32"])
            assert 0 < difference.max() <= 8, (executor, half)
            assert difference.mean() < 1, (executor, half)


# Budgets


def test_too_little_memory_is_refused_before_writing(tmp_path, model):
    little = replace(SMALL, memory=100_000_000)
    needs = r"needs \d\.\d\d GiB of memory, more than 95\.4 MiB"
    with pytest.raises(BudgetError, match=rf"memory: the plan \(.*\) {needs}; give at least memory='\d+MiB', as"):
        render(model, little, tmp_path / "out.zarr")
    with pytest.raises(BudgetError, match=rf"smallest tile .* {needs}; give at least memory='\d+MiB', as"):
        Job.prepare(model, replace(little, tile=None), tmp_path / "out.zarr")
    assert not list(tmp_path.iterdir())


def test_less_memory_means_smaller_tiles(tmp_path, model):
    request = replace(SMALL, size=(4096, 3072), tile=None, overlap="16")
    roomy = Job.prepare(model, replace(request, memory=64 * GIB), tmp_path / "out.zarr")
    need = roomy.projection.working - roomy.projection.host_parts["base image"]
    memory = roomy.measured.baseline + need * 2 // 3
    tight = Job.prepare(model, replace(request, memory=memory), tmp_path / "out.zarr")
    assert math.prod(tight.plan.stages[-1].core) < math.prod(roomy.plan.stages[-1].core)
    assert tight.projection.host <= tight.measured.budget.host
    tight.check()


def test_too_little_disk_is_refused_before_writing(tmp_path, model, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    words = r"disk: the output may take .*, more than 97\.7 KiB free; make room, write elsewhere, or use a smaller size"
    for executor in BOTH:
        with pytest.raises(BudgetError, match=words):
            render(model, replace(SMALL, executor=executor), tmp_path / "out.zarr")
    assert not list(tmp_path.iterdir())


def test_written_bytes_need_not_be_free_again(tmp_path, model, monkeypatch):
    """A disk that is large enough for the render is large enough for the rest of it."""
    request = replace(SMALL, tile=8)
    job = Job.prepare(model, request, tmp_path / "out.zarr")
    needed = job.projection.disk + job.projection.scratch
    usage = shutil.disk_usage(tmp_path)

    def free(_):
        used = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
        return usage._replace(free=needed + 1000 - used)

    monkeypatch.setattr(shutil, "disk_usage", free)
    render(model, request, tmp_path / "out.zarr", writes=40)
    assert Job.prepare(model, request, tmp_path / "out.zarr").measured.budget.disk < needed
    render(model, request, tmp_path / "out.zarr", resume=True)
    assert attributes(tmp_path / "out.zarr")["complete"]


def test_absurd_size_is_refused_at_once(tmp_path, model):
    """Before its tiles are counted one by one."""
    for changes in ({}, {"tile": None}, {"tile": None, "executor": "bands"}):
        request = replace(SMALL, size=(10_000_000, 10_000_000), **changes)
        with pytest.raises(BudgetError):
            render(model, request, tmp_path / "out.zarr")


def test_tiles_of_a_whole_image_are_counted_without_a_list(tmp_path, models):
    for name in ("rrdb", "swinir"):
        for size in ((251, 187), (256, 192), (1, 1), (500, 33)):
            for tile in (3, 40):
                job = Job.prepare(models[name], replace(SMALL, size=size, tile=tile), tmp_path / "out.zarr")
                assert job.projection.tasks == job.plan.tiles_to_run(list(job.plan.writes())), (name, size, tile)


def test_default_memory_is_steady():
    for free, memory in ((0.5, 0.375), (1, 0.75), (1.5, 1), (5, 2), (8, 4), (15, 4), (16, 8), (31, 8)):
        assert default_memory(int(free * GIB)) == memory * GIB


# Refused requests


def test_bad_request_is_refused_before_measuring(tmp_path, model, monkeypatch):
    def measured(*_, **__):
        raise AssertionError("measured")

    for name in (
        "footprint.stage_footprint", "footprint.band_cost", "footprint.base_footprint", "precision.precision_errors",
        "profiles.measure_profiles", "profiles.known_profiles",
    ):  # fmt: skip
        monkeypatch.setattr(f"engine.probe.{name}", measured)
    (tmp_path / "file").write_text("")
    for changes in ({"roi": Box(0, 200, 10, 257)}, {"precision": "fp8"}, {"stages": 3}, {"device": "abacus"}):
        for executor in (AUTO, *EXECUTORS):
            with pytest.raises(UsageError):
                Job.prepare(model, replace(SMALL, overlap="auto", executor=executor, **changes), tmp_path / "out.zarr")
    with pytest.raises(InputError, match="file is not a folder; choose another out"):
        Job.prepare(model, SMALL, tmp_path / "file" / "out.zarr")


def test_model_without_step_1_needs_a_picture(tmp_path, bare):
    with pytest.raises(UsageError, match="with init"):
        Job.prepare(bare, SMALL, tmp_path / "out.zarr")


def test_bare_checkpoint_is_measured_on_the_picture_once(tmp_path, bare, picture_file, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "engine.probe.profiles.measure_profiles", lambda *_, **options: calls.append(options) or [PROFILE]
    )
    request = Request(init=picture_file(100, 100), tile=16, precision="fp32")
    job = render(bare, request, tmp_path / "out.zarr")
    assert len(calls) == 1
    assert job.plan.stages[0].halo == 4
    assert [StageProfile.from_json(p) for p in attributes(tmp_path / "out.zarr")["profiles"]] == [PROFILE]


# Dither


def test_dither_depends_on_the_position_alone(tmp_path, model):
    """With exact halos every executor rounds the same values by the same thresholds, in regions too."""
    request = replace(SMALL, overlap="exact", device="cpu", dither=True)

    def image(name, **changes):
        return pixels(render(model, replace(request, **changes), tmp_path / f"{name}.zarr").out).astype(int)

    tiled = image("tiles")
    for executor in ("bands", "batched"):
        assert (tiled != image(executor, executor=executor, tile=None)).mean() < 1e-3
    roi = Box(33, 17, 180, 200)
    assert (image("part", roi=roi) != tiled[(slice(None), *roi.slices)]).mean() < 1e-3
    plain = image("plain", dither=False)
    assert np.abs(tiled - plain).max() == 1
    assert 0.2 < (tiled != plain).mean() < 0.8
    assert abs((tiled - plain).mean()) < 0.02  # the mean brightness is kept


def test_system_without_the_calls_of_unix(model_file, tmp_path, monkeypatch):
    """Windows has no ``os.sync``, and opens no folder to wait for its names."""
    for name in ("sync", "O_DIRECTORY"):
        monkeypatch.delattr(os, name)
    monkeypatch.setattr("engine.io.files.fcntl", None)
    result = engine.render(model_file, tmp_path / "out.zarr", size="64x48", stages=1, precision="fp32", device="cpu")
    assert engine.open(result.path).complete
