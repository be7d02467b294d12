"""Profiles: content, sharing between stages, the cache, and float32."""

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from engine.errors import InputError, UsageError
from engine.io.photo import PictureSource
from engine.model.bundle import load
from engine.plan.halo import HaloPolicy
from engine.probe import cache, precision, profiles
from engine.probe.content import CROP, PICTURES, detailed_crops, photograph_crops
from engine.run.base import base_image
from engine.run.stage import StageFactory

CPU = torch.device("cpu")


@pytest.fixture
def model(model_file):
    return load(model_file)


@pytest.fixture
def photograph(tmp_path, picture):
    path = tmp_path / "photo.png"
    pixels = (picture(CROP, CROP + 40).permute(1, 2, 0) * 255).byte().numpy()
    Image.fromarray(pixels).save(path)
    return path


def test_every_stage_is_measured_on_its_own_input(model):
    lines = []
    first, second = profiles.measure_profiles(model, log=lines.append)
    assert first.content == second.content == "the model's own sample, seed 0"
    # The second stage's input is the first one's output, which is softer: another measurement of the same weights.
    assert first != second
    begun = [line for line in lines if "left" not in line]  # a slow machine is told the time left
    assert begun == [f"step {step} (esrgan): measuring receptive field and seams" for step in (2, 3)]
    assert min(first.seam[0].max, second.seam[0].max) > 1


def test_profiles_are_those_of_float32(model_file):
    """A stage casts its network in place; the profile serves renders in every precision."""
    expected = profiles.measure_profiles(load(model_file))
    used = load(model_file)
    StageFactory(used, CPU).stages(["bf16", "bf16"])
    assert profiles.measure_profiles(used) == expected


def test_photograph_and_equal_networks_need_one_measurement(model, photograph):
    lines = []
    first, second = profiles.measure_profiles(model, photograph, log=lines.append)
    assert first == second
    assert first.content == "crops of photo.png"
    assert len([line for line in lines if "left" not in line]) == 1


@pytest.fixture
def bare(small_rrdb, tmp_path):
    save_file(small_rrdb.state_dict(), tmp_path / "bare.safetensors")
    return load(tmp_path / "bare.safetensors")


@pytest.fixture
def picture_source(tmp_path, picture):
    def make(height, width, name):
        values = (picture(height, width, len(name)).permute(1, 2, 0).numpy() * 255).round().astype("uint8")
        Image.fromarray(values).save(tmp_path / f"{name}.png")
        return PictureSource(tmp_path / f"{name}.png")

    return make


def test_no_content_is_refused(small_rrdb, tmp_path):
    save_file(small_rrdb.state_dict(), tmp_path / "bare.safetensors")
    bare = load(tmp_path / "bare.safetensors")
    with pytest.raises(UsageError, match="no step 1 to make content with; give a photograph with image"):
        profiles.measure_profiles(bare)
    assert profiles.known_profiles(bare) is None


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


AUTO, ERF = HaloPolicy(), HaloPolicy("erf:0.98")


def test_profiles_for_a_render_are_cached_under_the_models_digest(model, model_file, empty_cache):
    """Seams alone for a tolerance; receptive fields only for a policy that reads them."""
    assert profiles.known_profiles(model) is None
    seams = profiles.measure_for_render(model, 2, AUTO, None, CPU)
    assert profiles.known_profiles(load(model_file), AUTO) == seams
    assert {profile.erf_square == {} for profile in seams} == {True}
    assert profiles.known_profiles(model, ERF) is None
    full = profiles.measure_for_render(model, 2, ERF, None, CPU)
    assert profiles.known_profiles(model, ERF) == profiles.known_profiles(model, AUTO) == full
    assert [profile.seam for profile in full] == [profile.seam for profile in seams]
    (file,) = (cache.cache_folder() / "profiles").iterdir()
    file.write_text("[{}]")
    assert profiles.known_profiles(model, ERF) is None


def test_bare_checkpoint_is_measured_on_each_picture(bare, picture_source, empty_cache):
    large, other = picture_source(200, 230, "a"), picture_source(210, 230, "b")
    (measured,) = profiles.measure_for_render(bare, 1, AUTO, large, CPU)
    assert measured.content == "crops of a.png"
    assert profiles.known_profiles(bare, AUTO, large) == [measured]
    assert profiles.known_profiles(bare, AUTO, other) is None


def test_picture_that_is_too_small_gets_exact_halos(bare, picture_source, empty_cache):
    lines = []
    (profile,) = profiles.measure_for_render(bare, 1, AUTO, picture_source(64, 96, "a"), CPU, lines.append)
    assert AUTO.choose(profile, 30, 1) == ERF.choose(profile, 30, 1) == 30
    assert [line.partition(": ")[2] for line in lines] == ["too small to measure seams; halos are exact"]


def test_profiles_of_the_model_file_come_first(model, tmp_path):
    measured = profiles.measure_profiles(model)
    model.with_profiles(measured).save(tmp_path / "a.safetensors")
    assert profiles.known_profiles(load(tmp_path / "a.safetensors")) == measured


@pytest.mark.slow
def test_swinir_is_measured_on_whole_windows(swin_model_file):
    for profile in profiles.measure_profiles(load(swin_model_file)):
        assert all(point.halo % 8 == 0 for point in profile.seam)


# Content


def test_most_detailed_crops_are_taken():
    flat = torch.full((1, 3, 3 * CROP, 3 * CROP), 0.5)
    busy = flat.clone()
    busy[:, :, CROP : 2 * CROP, 2 * CROP :] += torch.rand(3, CROP, CROP) - 0.5
    crops = detailed_crops([busy], 1)
    assert len(crops) == PICTURES
    detail = [float(c.diff(dim=2).abs().mean()) for c in crops]
    assert detail[0] == max(detail)
    assert detail[0] > 0.2
    assert all(c.shape == (1, 3, CROP, CROP) for c in crops)


def test_crops_are_whole_windows(picture):
    for size, align, shape in (((30, 41), 8, (24, 40)), ((30, 41), 1, (30, 41)), ((400, 41), 8, (192, 40))):
        assert {c.shape for c in detailed_crops([picture(*size)[None]], align)} == {(1, 3, *shape)}


def test_content_that_is_too_small_is_refused(tmp_path, picture):
    Image.new("RGB", (500, CROP // 2 - 1)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=f"too small to measure on .*; use one of at least {CROP // 2}x{CROP // 2}"):
        photograph_crops(tmp_path / "a.png", 1)
    with pytest.raises(InputError, match="sample of 9x7 is smaller than the window of 8; .* or use overlap='exact'"):
        detailed_crops([picture(7, 9)[None]], 8)


def test_samples_depend_on_position_and_seed(small_structure):
    first = base_image(small_structure, 3)
    assert first.shape == (3, 24, 32)
    assert torch.equal(first, base_image(small_structure, 3))
    assert not torch.equal(first, base_image(small_structure, 4))
    assert base_image(small_structure, 3, (30, 50)).shape == (3, 30, 50)


def test_half_precision_that_overflows_is_not_tolerable():
    """Some cards give NaN in fp16 (GTX 16xx): the automatic precision is float32 there."""
    levels = torch.zeros(10_000)
    assert precision._error(levels).tolerable
    levels[123] = torch.nan
    assert not precision._error(levels).tolerable
