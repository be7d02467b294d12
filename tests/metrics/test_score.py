"""All measures of one set of pictures together, with random weights."""

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


def test_the_photograph_as_its_own_sample_scores_zero(sample, inception):
    found = score(sample("photo"), [sample("copy")], inception, None)
    (copy,) = found.samples
    assert copy.colour_profile == 0
    assert copy.patches == pytest.approx([0] * len(copy.patches), abs=1e-6)
    assert copy.sifid == pytest.approx({"5": 0, "13": 0}, abs=1e-9)
    assert copy.border == found.photograph_border
    assert found.diversity is None
    assert all(floor > 0 for floor in found.patch_floor)


def test_other_pictures_do_not_and_means_are_means(sample, inception, lpips):
    samples = [sample("a", seed=1), sample("b", seed=2), sample("c", seed=2)]
    found = score(sample("photo"), samples, inception, lpips)
    for layer in ("5", "13"):
        values = [s.sifid[layer] for s in found.samples]
        assert min(values) > 0
        assert values[1] == values[2] != values[0]
        assert found.sifid[layer] == pytest.approx(statistics.fmean(values))
    assert found.colour_profile == pytest.approx(statistics.fmean(s.colour_profile for s in found.samples))
    assert found.patches[0] == pytest.approx(statistics.fmean(s.patches[0] for s in found.samples))
    # Of three pairs one is of equal pictures.
    pair = lpips.pairwise([s.source for s in samples])
    assert found.diversity.lpips["-1..1"] == pytest.approx(2 / 3 * pair[0, 1])
    assert found.diversity.lpips["0..1"] != pytest.approx(found.diversity.lpips["-1..1"], rel=1e-3)
    assert found.diversity.rms > 0
    stored = json.loads(json.dumps(found.to_json()))
    assert stored["mean"]["sifid"]["5"] == found.sifid["5"]
    assert len(stored["samples"]) == 3


def test_without_networks_the_rest_is_there(sample):
    found = score(sample("photo"), [sample("a", seed=1), sample("b", seed=2)], None, None)
    assert found.sifid is None
    assert found.diversity.lpips is None
    assert found.diversity.pixels > 0
    assert found.colour_profile > 0


def test_a_wider_sample_is_compared_at_the_same_height(sample):
    found = score(sample("photo"), [sample("wide", width=300, seed=1)], None, None)
    assert found.base == (128, 256)
    assert found.photograph_size == (150, 140)


@pytest.mark.parametrize("with_lpips", [False, True])
def test_progress_adds_up(sample, lpips, with_lpips):
    photo, samples = sample("photo"), [sample("a", seed=1), sample("b", seed=2)]
    rows = []
    score(photo, samples, None, lpips if with_lpips else None, rows.append)
    assert sum(rows) == rows_to_read(photo, samples, with_lpips)


def test_sizes_that_cannot_be_compared_are_refused(sample):
    photo = sample("photo")
    with pytest.raises(InputError, match="b is 140x151, a is 140x150: samples must have one size"):
        score(photo, [sample("a"), sample("b", height=151)], None, None)
    with pytest.raises(InputError, match="photo is 140x150, a is 140x151: heights must be equal"):
        score(photo, [sample("a", height=151)], None, None)
    with pytest.raises(InputError, match="no samples"):
        score(photo, [], None, None)
    with pytest.raises(InputError, match="a is 140x31: both sides must have at least 32 pixels"):
        score(photo, [sample("a", height=31)], None, None)
