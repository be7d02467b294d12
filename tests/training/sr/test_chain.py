"""Simulated inputs: step 1 inverted, the previous steps run as in a render, everything cached in a file."""

import pytest
import torch
from torch.nn import functional as F

from engine.io.photo import open_photo
from engine.model.structure_file import read_structure
from engine.run.stage import Stage
from engine.training.sr import chain
from engine.training.sr.chain import Counts, PreviousStep, cached_inputs, enlarge, invert, reconstruct, simulate_inputs

CPU = torch.device("cpu")


@pytest.fixture
def structure(structure_file):
    return read_structure(structure_file)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_inversion_recovers_image(structure):
    """Step 1's own images are met nearly exactly, by a code of the same mean square."""
    torch.manual_seed(3)
    code = torch.randn(1, 6, *structure.sizes[0])
    first = structure.base(code)
    reals = [first, structure.refine(1, first, structure.sizes[1])]
    inverted = invert(structure, reals, generator())
    assert float(inverted.square().mean()) == pytest.approx(1, abs=0.1)
    random_error = F.mse_loss(structure.base(torch.randn(1, 6, *structure.sizes[0])), first)
    assert F.mse_loss(structure.base(inverted), first) < 0.02 * random_error


def test_noise_is_optimised_towards_photograph(structure, monkeypatch):
    """The image comes closer to a photograph that step 1 does not know; other noise gives another image."""
    torch.manual_seed(3)
    structure.sigmas.fill_(0.1)  # as large as after training
    code = torch.randn(1, 6, *structure.sizes[0])
    reals = [2 * torch.rand(1, 3, *size) - 1 for size in structure.sizes]
    first, same, other = (reconstruct(structure, code, reals, generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    monkeypatch.setattr(chain, "NOISE_STEPS", 0)
    drawn = reconstruct(structure, code, reals, generator())
    error, drawn_error = (F.mse_loss(picture * 2 - 1, reals[-1][0]) for picture in (first, drawn))
    assert error < 0.97 * drawn_error
    assert (first - drawn).square().mean() < drawn_error / 4  # still near the image of the drawn noise


def test_simulated_inputs(large_photo, structure, small_rrdb, tmp_path):
    photo = open_photo(large_photo, 1)
    previous = [PreviousStep(Stage(small_rrdb, CPU, "fp32"), 0.05)]
    inputs = simulate_inputs(
        structure, photo, previous, Counts(2, 1), generator(), CPU, tmp_path / "scratch", log=lambda line: None
    )
    assert inputs.size == (96, 128)
    assert [one.paired for one in inputs.pictures] == [True, True, False]
    first, second, free = inputs.pictures
    assert first.picture.dtype == torch.float16
    assert 0 <= first.picture.min() <= first.picture.max() <= 1
    assert not torch.equal(first.picture, second.picture)  # the noise of the GAN scales differs
    to_second, to_free = ((first.picture - other.picture).float().square().mean() for other in (second, free))
    assert to_second < to_free
    assert first.target is second.target
    assert torch.equal(free.target, free.picture)
    error = (first.target.float() - second.picture.float()).square().mean()
    assert inputs.psnr == pytest.approx(float(-10 * error.log10()), abs=3)


def test_bands_equal_whole_image(small_rrdb, small_swinir, picture):
    """Sizes that are no multiple of a window are padded once, at the right and the bottom; tolerance of float16."""
    for network, size, (right, bottom) in (
        (small_rrdb, (24, 32), (0, 0)),
        (small_rrdb, (19, 37), (0, 0)),
        (small_swinir, (19, 37), (3, 5)),
    ):
        x = picture(*size)
        padded = F.pad(x[None], (0, right, 0, bottom), mode="reflect")
        whole = network(padded)[0, :, : 4 * size[0], : 4 * size[1]].clamp(0, 1)
        enlarged = enlarge(PreviousStep(Stage(network, CPU, "fp32"), 0.0), x, generator())
        assert (enlarged.float() - whole).abs().max() < 1e-3


def test_noise_follows_seed(small_rrdb, small_noisy_rrdb, picture):
    """Input noise, and noise channels, differ from image to image."""
    x = picture(24, 32)
    for network, sigma in ((small_rrdb, 0.1), (small_noisy_rrdb, 0.0)):
        step = PreviousStep(Stage(network, CPU, "fp32"), sigma)
        first, same, other = (enlarge(step, x, generator(seed)) for seed in (0, 0, 1))
        assert torch.equal(first, same)
        assert (first - other).abs().max() > 0.02


def test_counts_are_limited_by_memory():
    counts = Counts(8, 8)
    assert counts.within((192, 256)) == counts
    assert counts.within((10, 10), max_bytes=10 * 600) == Counts(5, 5)
    assert counts.within((10, 10), max_bytes=1) == Counts(1, 1)
    assert Counts(8, 0).within((10, 10), max_bytes=600 * 3) == Counts(3, 0)
    assert Counts(0, 8).within((10, 10), max_bytes=600 * 3) == Counts(0, 3)


def test_cache_is_read_for_its_own_key(large_photo, structure, tmp_path):
    photo, path, calls = open_photo(large_photo, 1), tmp_path / "chain", []
    once = simulate_inputs(structure, photo, [], Counts(1, 1), generator(), CPU, tmp_path / "s", log=lambda line: None)

    def simulate():
        calls.append(None)
        return once

    inputs = cached_inputs(path, "a", simulate)
    cached = cached_inputs(path, "a", simulate)
    assert len(calls) == 1
    assert (cached.psnr, cached.psnr_fitted) == (inputs.psnr, inputs.psnr_fitted)
    for one, other in zip(inputs.pictures, cached.pictures, strict=True):
        assert one.paired == other.paired
        assert torch.equal(one.picture, other.picture)
        assert torch.equal(one.target, other.target)
    cached_inputs(path, "b", simulate)
    assert len(calls) == 2
    path.write_bytes(path.read_bytes()[:50])
    cached_inputs(path, "b", simulate)
    assert len(calls) == 3
