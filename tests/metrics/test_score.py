"""All measures of one set of images, with random weights."""

import json
import statistics

import pytest

from engine.errors import InputError
from engine.io.photo import TensorSource
from engine.metrics.images import Sample
from engine.metrics.score import rows_to_read, score


@pytest.fixture
def sample(picture):
    """(name, height, width, seed) -> Sample."""
    return lambda name, height=150, width=140, seed=0: Sample(name, TensorSource(picture(height, width, seed=seed)))


def test_photograph_as_sample_scores_zero(sample, inception):
    scores = score(sample("photo"), [sample("copy")], inception, None)
    (copy,) = scores.samples
    assert copy.colour_profile == 0
    assert copy.patches == pytest.approx([0] * len(copy.patches), abs=1e-6)
    assert copy.sifid == pytest.approx({"5": 0, "13": 0}, abs=1e-9)
    assert copy.border == scores.photograph_border
    assert scores.diversity is None
    assert all(floor > 0 for floor in scores.patch_floor)


def test_means_over_samples(sample, inception, lpips):
    samples = [sample("a", seed=1), sample("b", seed=2), sample("c", seed=2)]
    scores = score(sample("photo"), samples, inception, lpips)
    for layer in ("5", "13"):
        values = [s.sifid[layer] for s in scores.samples]
        assert min(values) > 0
        assert values[1] == values[2] != values[0]
        assert scores.sifid[layer] == pytest.approx(statistics.fmean(values))
    assert scores.colour_profile == pytest.approx(statistics.fmean(s.colour_profile for s in scores.samples))
    assert scores.patches[0] == pytest.approx(statistics.fmean(s.patches[0] for s in scores.samples))
    # One of the three pairs has equal images.
    pair = lpips.pairwise([s.source for s in samples])
    assert scores.diversity.lpips["-1..1"] == pytest.approx(2 / 3 * pair[0, 1])
    assert scores.diversity.lpips["0..1"] != pytest.approx(scores.diversity.lpips["-1..1"], rel=1e-3)
    assert scores.diversity.rms > 0
    stored = json.loads(json.dumps(scores.to_json()))
    assert stored["mean"]["sifid"]["5"] == scores.sifid["5"]
    assert len(stored["samples"]) == 3


def test_measures_without_networks(sample):
    scores = score(sample("photo"), [sample("a", seed=1), sample("b", seed=2)], None, None)
    assert scores.sifid is None
    assert scores.diversity.lpips is None
    assert scores.diversity.pixels > 0
    assert scores.colour_profile > 0


def test_wider_sample_keeps_height(sample):
    scores = score(sample("photo"), [sample("wide", width=300, seed=1)], None, None)
    assert scores.base == (128, 256)
    assert scores.photograph_size == (150, 140)


def test_progress_adds_up(sample, lpips):
    photo, samples = sample("photo"), [sample("a", seed=1), sample("b", seed=2)]
    for network in (None, lpips):
        rows = []
        score(photo, samples, None, network, rows.append)
        assert sum(rows) == rows_to_read(photo, samples, lpips=network is not None)


def test_sizes_are_checked(sample):
    photo = sample("photo")
    with pytest.raises(InputError, match="b is 140x151, a is 140x150: samples must have one size"):
        score(photo, [sample("a"), sample("b", height=151)], None, None)
    with pytest.raises(InputError, match="photo is 140x150, a is 140x151: heights must be equal"):
        score(photo, [sample("a", height=151)], None, None)
    with pytest.raises(InputError, match="no samples"):
        score(photo, [], None, None)
    with pytest.raises(InputError, match="a is 140x31: both sides must have at least 32 pixels"):
        score(photo, [sample("a", height=31)], None, None)
