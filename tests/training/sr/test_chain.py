"""Chain pictures: step 1 inverted, the steps below run as a render runs them, all of it kept in a file."""

import pytest
import torch
from torch.nn import functional as F

from engine.archs.hpvaegan import BaseGenerator
from engine.io.photo import open_photo
from engine.run.stage import Stage
from engine.training.sr import chain
from engine.training.sr.chain import Counts, Previous, enlarge, invert, keep_chain, make_chain, reconstruct


@pytest.fixture
def structure(structure_file):
    return BaseGenerator.from_file(structure_file)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_inversion_finds_the_picture_of_a_code(structure):
    """Pictures that step 1 itself has made can be met nearly exactly, and by a code of the same size."""
    torch.manual_seed(3)
    code = torch.randn(1, 6, *structure.sizes[0])
    first = structure.base(code)
    reals = [first, structure.refine(1, first, structure.sizes[1])]
    found = invert(structure, reals, generator())
    assert float(found.square().mean()) == pytest.approx(1, abs=0.1)
    before = F.mse_loss(structure.base(torch.randn(1, 6, *structure.sizes[0])), first)
    assert F.mse_loss(structure.base(found), first) < 0.02 * before


def test_noise_is_led_towards_the_photograph(structure, monkeypatch):
    """Closer to it than it was as drawn, though step 1 does not know it; other noise makes another picture."""
    torch.manual_seed(3)
    structure.sigmas.fill_(0.1)  # as large as what training leaves
    code = torch.randn(1, 6, *structure.sizes[0])
    reals = [2 * torch.rand(1, 3, *size) - 1 for size in structure.sizes]
    led = [reconstruct(structure, code, reals, generator(seed)) for seed in (0, 0, 1)]
    assert torch.equal(led[0], led[1])
    assert not torch.equal(led[0], led[2])
    monkeypatch.setattr(chain, "LED", 0)
    drawn = reconstruct(structure, code, reals, generator())
    error, before = (F.mse_loss(picture * 2 - 1, reals[-1][0]) for picture in (led[0], drawn))
    assert error < 0.97 * before
    assert (led[0] - drawn).square().mean() < before / 4  # led, not pulled away from what was drawn


def test_chain_pictures(large_photo, structure, small_rrdb, tmp_path):
    photo = open_photo(large_photo, 1)
    previous = [Previous(Stage(small_rrdb, torch.device("cpu"), "fp32"), 0.05)]
    made = make_chain(
        structure, photo, previous, Counts(2, 1), generator(), torch.device("cpu"), tmp_path / "scratch", print
    )
    assert made.size == (96, 128)
    assert [one.paired for one in made.pictures] == [True, True, False]
    first, second, free = made.pictures
    assert first.picture.dtype == torch.float16
    assert 0 <= first.picture.min() <= first.picture.max() <= 1
    assert not torch.equal(first.picture, second.picture)  # the noise of the GAN scales differs
    alike, apart = ((first.picture - other.picture).float().square().mean() for other in (second, free))
    assert alike < apart
    assert first.target is second.target
    assert torch.equal(free.target, free.picture)
    error = (first.target.float() - second.picture.float()).square().mean()
    assert made.psnr == pytest.approx(float(-10 * error.log10()), abs=3)


@pytest.mark.parametrize("size", [(24, 32), (19, 37)])
def test_a_step_below_runs_as_a_whole_image(small_rrdb, picture, size):
    stage = Stage(small_rrdb, torch.device("cpu"), "fp32")
    x = picture(*size)
    whole = small_rrdb(x[None])[0].clamp(0, 1)
    assert (enlarge(Previous(stage, 0.0), x, generator()).float() - whole).abs().max() < 1e-3  # fp16


def test_a_step_with_windows_pads_once(small_swinir, picture):
    stage = Stage(small_swinir, torch.device("cpu"), "fp32")
    x = picture(19, 37)
    padded = F.pad(x[None], (0, 3, 0, 5), mode="reflect")
    whole = small_swinir(padded)[0, :, : 4 * 19, : 4 * 37].clamp(0, 1)
    assert (enlarge(Previous(stage, 0.0), x, generator()).float() - whole).abs().max() < 1e-3


def test_input_noise_is_that_of_the_step(small_rrdb, picture):
    stage, x = Stage(small_rrdb, torch.device("cpu"), "fp32"), picture(24, 32)
    one, same, other = (enlarge(Previous(stage, 0.1), x, generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_noise_channels_are_filled_anew_for_every_picture(small_noisy_rrdb, picture):
    stage, x = Stage(small_noisy_rrdb, torch.device("cpu"), "fp32"), picture(24, 32)
    one, same, other = (enlarge(Previous(stage, 0.0), x, generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert (one - other).abs().max() > 0.02


def test_large_pictures_are_fewer():
    counts = Counts(8, 8)
    assert counts.within((192, 256)) == counts
    assert counts.within((10, 10), most=10 * 600) == Counts(5, 5)
    assert counts.within((10, 10), most=1) == Counts(1, 1)
    assert Counts(8, 0).within((10, 10), most=600 * 3) == Counts(3, 0)
    assert Counts(0, 8).within((10, 10), most=600 * 3) == Counts(0, 3)


def test_the_file_is_read_only_for_its_own_run(large_photo, structure, tmp_path):
    photo, path, calls = open_photo(large_photo, 1), tmp_path / "chain", []

    def make():
        calls.append(None)
        return make_chain(structure, photo, [], Counts(1, 1), generator(), torch.device("cpu"), tmp_path / "s", print)

    made = keep_chain(path, "a", make)
    kept = keep_chain(path, "a", make)
    assert len(calls) == 1
    assert (kept.psnr, kept.psnr_fitted) == (made.psnr, made.psnr_fitted)
    for one, other in zip(made.pictures, kept.pictures, strict=True):
        assert one.paired == other.paired
        assert torch.equal(one.picture, other.picture)
        assert torch.equal(one.target, other.target)
    keep_chain(path, "b", make)
    assert len(calls) == 2
    path.write_bytes(path.read_bytes()[:50])
    keep_chain(path, "b", make)
    assert len(calls) == 3
