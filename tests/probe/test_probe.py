"""The probe as a whole: what it measures on, what stages share, and that its numbers hold in a render."""

import pytest
import torch
from PIL import Image

from engine.errors import InputError, UsageError
from engine.model import bundle as models
from engine.probe import footprint
from engine.probe import profiles as probe
from engine.probe.content import CROP, PICTURES, detailed_crops, photograph_crops
from engine.run.base import base_image

CPU = torch.device("cpu")


@pytest.fixture
def model(model_file):
    return models.load(model_file)


@pytest.fixture
def photograph(tmp_path, picture):
    path = tmp_path / "photo.png"
    pixels = (picture(CROP, CROP + 40).permute(1, 2, 0) * 255).byte().numpy()
    Image.fromarray(pixels).save(path)
    return path


def test_every_stage_gets_a_profile_on_what_it_will_see(model):
    lines = []
    first, second = probe.measure_profiles(model, log=lines.append)
    assert first.content == second.content == "the model's own sample, seed 0"
    # The second stage sees the first one's output, which is softer: another measurement, of the same weights.
    assert first != second
    assert [line.split(" (")[0] for line in lines] == ["measuring stage 1 of 2", "measuring stage 2 of 2"]
    assert min(first.seam[0].max, second.seam[0].max) > 1


def test_stages_of_one_photograph_and_one_network_share_the_measurement(model, photograph):
    lines = []
    first, second = probe.measure_profiles(model, photograph, log=lines.append)
    assert first == second
    assert first.content == "crops of photo.png"
    assert len(lines) == 1


def test_nothing_to_measure_on_is_refused(model_file, small_rrdb, tmp_path):
    from safetensors.torch import save_file

    save_file(small_rrdb.state_dict(), tmp_path / "bare.safetensors")
    bare = models.load(tmp_path / "bare.safetensors")
    with pytest.raises(UsageError, match="--image"):
        probe.measure_profiles(bare)
    assert probe.profiles_of(bare) is None


def test_profiles_are_remembered_under_the_models_digest(model, model_file, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    lines = []
    first = probe.profiles_of(model, log=lines.append)
    assert len(lines) == 2
    assert probe.profiles_of(models.load(model_file), log=lines.append) == first
    assert len(lines) == 2
    (file,) = (footprint.cache_folder() / "profiles").iterdir()
    assert file.stem in model.digest
    file.write_text("[{}]")
    assert probe.profiles_of(model, log=lines.append) == first
    assert len(lines) == 4


def test_a_models_own_profiles_come_first(model, tmp_path):
    profiles = probe.measure_profiles(model)
    model.with_profiles(profiles).save(tmp_path / "a.safetensors")
    assert probe.profiles_of(models.load(tmp_path / "a.safetensors"), log=pytest.fail) == profiles


def test_swinir_is_measured_on_whole_windows(swin_model_file):
    for profile in probe.measure_profiles(models.load(swin_model_file)):
        assert all(point.halo % 8 == 0 for point in profile.seam)


# Content


def test_the_most_detailed_crops_are_taken():
    flat = torch.full((1, 3, 3 * CROP, 3 * CROP), 0.5)
    busy = flat.clone()
    busy[:, :, CROP : 2 * CROP, 2 * CROP :] += torch.rand(3, CROP, CROP) - 0.5
    crops = detailed_crops([busy], 1)
    assert len(crops) == PICTURES
    detail = [float(c.diff(dim=2).abs().mean()) for c in crops]
    assert detail[0] == max(detail)
    assert detail[0] > 0.2
    assert all(c.shape == (1, 3, CROP, CROP) for c in crops)


@pytest.mark.parametrize(
    ("size", "align", "shape"), [((30, 41), 8, (24, 40)), ((30, 41), 1, (30, 41)), ((400, 41), 8, (192, 40))]
)
def test_crops_are_whole_windows(picture, size, align, shape):
    assert {c.shape for c in detailed_crops([picture(*size)[None]], align)} == {(1, 3, *shape)}


def test_a_photograph_too_small_is_refused(tmp_path):
    Image.new("RGB", (500, CROP // 2 - 1)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=f"too small to measure on; use one of at least {CROP}x{CROP}"):
        photograph_crops(tmp_path / "a.png", 1)


def test_samples_are_addressed_by_position_and_seed(small_structure):
    first = base_image(small_structure, 3)
    assert first.shape == (3, 24, 32)
    assert torch.equal(first, base_image(small_structure, 3))
    assert not torch.equal(first, base_image(small_structure, 4))
    assert base_image(small_structure, 3, (30, 50)).shape == (3, 30, 50)
