"""Networks that look at the whole picture: found, rendered whole where they fit, and else with frozen statistics."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support.community import mosr, omnisr, rcan, realplksr, state_of
from support.stores import pixels, render

from engine.archs import build
from engine.errors import ResumeError, UsageError
from engine.job import Job
from engine.model.bundle import load
from engine.plan.request import Request
from engine.probe import reach
from engine.probe.profiles import measure_profiles
from engine.run.stage import Stage

CPU = torch.device("cpu")

pytestmark = pytest.mark.filterwarnings("ignore:torch.meshgrid")  # in spandrel's OmniSR


@pytest.fixture(scope="module")
def photo(tmp_path_factory, picture):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray((picture(112, 144).permute(1, 2, 0) * 255).byte().numpy()).save(path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "rcan.safetensors"
    save_file(state_of(rcan()), path)
    return load(path)


TILES = {"tile": 32, "overlap": "16", "accept_error": True}


@pytest.fixture(scope="module")
def tiles(model, photo, tmp_path_factory):
    """The render of the photo in tiles, and its store."""
    store = tmp_path_factory.mktemp("tiles") / "tiles.zarr"
    return render(model, request(photo, **TILES), store), store


@pytest.mark.parametrize(
    ("make", "expected"),
    [(mosr, "local"), (rcan, "statistics"), (realplksr, "statistics"), (omnisr, "whole")],
)
def test_reach_is_measured(make, expected, tmp_path, photo):
    save_file(state_of(make()), tmp_path / "network.safetensors")
    (profile,) = measure_profiles(load(tmp_path / "network.safetensors"), photo, with_erf=False)
    assert profile.reach == expected
    assert (profile.statistics > 0) == (expected == "statistics")
    assert type(profile).from_json(profile.to_json()) == profile


def request(photo, **options):
    return Request(init=photo, precision="fp32", executor="tiles", **options)


def difference(a, b):
    return int(np.abs(pixels(a).astype(int) - pixels(b)).max())


def test_a_local_network_runs_in_bands(photo, tmp_path):
    """By default, and in strips with its receptive field beside them: the pixels are those of one tile."""
    save_file(state_of(mosr()), tmp_path / "mosr.safetensors")
    model = load(tmp_path / "mosr.safetensors")
    options = {
        "whole": {"executor": "tiles", "tile": 256},
        "bands": {},
        "strips": {"executor": "bands", "tile": 32, "overlap": "exact"},
    }
    for name, chosen in options.items():
        plan = render(model, Request(init=photo, precision="fp32", **chosen), tmp_path / f"{name}.zarr").plan
        assert plan.executor == ("tiles" if name == "whole" else "bands")
    assert (plan.stages[0].tile, plan.stages[0].halo) == (32, 14)
    for name in ("bands", "strips"):
        difference = np.abs(pixels(tmp_path / f"{name}.zarr").astype(int) - pixels(tmp_path / "whole.zarr"))
        assert (difference.max() <= 1, (difference > 0).mean() <= 1e-4) == (True, True)


def test_tiles_agree_with_the_whole_picture(model, photo, tiles, tmp_path):
    tiles, store = tiles
    whole = render(model, request(photo), tmp_path / "whole.zarr")
    (stage,) = whole.plan.stages
    assert stage.tile_shape == stage.padded
    assert (stage.statistics, whole.seam_error) == ("", 0.0)
    assert tiles.plan.stages[0].statistics
    assert difference(tmp_path / "whole.zarr", store) <= 1
    part = render(model, request(photo, roi="64,48,96,80", **TILES), tmp_path / "part.zarr")
    assert part.plan.stages == tiles.plan.stages
    expected = pixels(store)[:, 48:128, 64:160]
    assert np.array_equal(pixels(tmp_path / "part.zarr"), expected)


def test_a_large_error_is_refused_until_it_is_accepted(model, photo, tmp_path):
    options = {"tile": 32, "overlap": "0"}
    with pytest.raises(UsageError, match=r"step 2: looks at the whole picture, .* levels .*give accept_error=True"):
        Job.prepare(model, request(photo, **options), tmp_path / "out.zarr")
    job = Job.prepare(model, request(photo, accept_error=True, **options), tmp_path / "out.zarr")
    assert job.seam_error > 1


def test_a_resumed_render_takes_the_statistics_that_it_was_begun_with(model, photo, tiles, tmp_path, monkeypatch):
    expected, finished = tiles
    options, store = request(photo, **TILES), tmp_path / "out.zarr"
    job = Job.prepare(model, options, store)
    run = job.run(job.open_sink())
    next(run)
    run.close()
    shutil.copytree(store, tmp_path / "alone.zarr")  # without its working data
    monkeypatch.setattr(reach, "CORE", 32)
    monkeypatch.setattr(reach, "MAX_TILES", 2)  # others are recorded, as on another machine
    resumed = render(load(model.path), options, store, resume=True)
    assert resumed.plan == expected.plan
    assert np.array_equal(pixels(store), pixels(finished))
    with pytest.raises(ResumeError, match="statistics of step 2"):
        render(load(model.path), options, tmp_path / "alone.zarr", resume=True)


def test_a_network_in_half_precision_takes_constants_too(photo, picture):
    stage = Stage(build(state_of(rcan())), CPU, "bf16")
    x = picture(64, 64)[None].contiguous(memory_format=torch.channels_last)
    frozen = reach.on_picture(stage)(x)
    assert (frozen(x) - stage.run(x)).abs().max() < 0.05
    assert stage.run(x).dtype == torch.float32
