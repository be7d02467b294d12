"""The first level of the pyramid comes from the device: the host halves and reads no shard of the image."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from support.accelerator import pretend_accelerator
from support.stores import pixels, render

from engine.geometry import Box
from engine.io import pyramid_writer
from engine.io.halving import half_of, halve
from engine.io.pyramid_writer import PyramidWriter
from engine.plan import strips
from engine.plan.request import Request
from engine.run.stage import Stage

SMALL = Request(size=(134, 114), stages=2, precision="fp32,bf16", overlap="4")
"""Odd sides of a level below, in shards of 64 x 64."""

ODD = replace(SMALL, size=(133, 115))
"""Odd sides that end within the last network's image: the device halves a pixel there with one outside."""

CASES = {
    "batches": (replace(SMALL, executor="batched", tile=16), 0),
    "bands": (replace(SMALL, executor="bands"), 0),
    "strips": (replace(SMALL, executor="bands", tile=16, dither=True), 0),
    "batches, odd": (replace(ODD, executor="batched", tile=16, dither=True), 4),
    "bands, odd": (replace(ODD, executor="bands"), 3),
    "rows of a region, odd": (replace(SMALL, executor="bands", roi=Box(21, 13, 90, 120)), 2),
}
"""Requests, and shards of the image that the host halves nevertheless: those at odd borders."""


@pytest.fixture
def host(monkeypatch):
    """Shapes of the arrays that the host halves and levels that it reads, in a render on a pretend device."""
    monkeypatch.setattr(strips, "SHARD", 64)
    monkeypatch.setattr(strips, "CHUNK", 64)
    halved, read_levels, read = [], [], PyramidWriter._read
    monkeypatch.setattr(pyramid_writer, "halve", lambda values: halved.append(values.shape) or halve(values))
    monkeypatch.setattr(PyramidWriter, "_read", lambda own, *index: read_levels.append(index[0]) or read(own, *index))
    with pretend_accelerator():
        yield halved, read_levels


def check_pyramid(store, plan):
    levels = [pixels(store, level) for level in range(len(plan.pyramid))]
    assert levels[0].std() > 5
    for larger, smaller in pairwise(levels):
        np.testing.assert_array_equal(smaller, halve(larger))


def halvings(plan):
    """Shards of the levels between the first and the last, which the host made and halves."""
    return sum(len(plan.grid(level)) for level in range(1, len(plan.pyramid) - 1))


@pytest.mark.parametrize("name", CASES)
def test_host_halves_what_it_made_and_odd_borders(tmp_path, models, host, name):
    request, borders = CASES[name]
    job = render(models["rrdb"], request, tmp_path / "out.zarr")
    check_pyramid(job.out, job.plan)
    halved, read_levels = host
    assert read_levels == []
    assert len(halved) == halvings(job.plan) + borders


def test_shards_that_mix_tiles_are_halved_by_the_host(tmp_path, models, host):
    """A region has shards of its own, which take parts of tiles."""
    job = render(models["rrdb"], replace(CASES["batches"][0], roi=Box(21, 13, 90, 120)), tmp_path / "out.zarr")
    check_pyramid(job.out, job.plan)
    assert len(host[0]) == halvings(job.plan) + len(job.plan.grid())


@pytest.mark.parametrize("name", ["batches", "bands"])
def test_what_float32_computed_again_is_halved_too(tmp_path, models, host, monkeypatch, name):
    """A tile that overflowed is halved by the host; of rows, those that float32 computes bring their half."""
    fill, push = Stage.fill, Stage.push

    def poisoned_fill(stage, out, tiles, chunks):
        fill(stage, out, tiles, chunks)
        if stage.precision == "bf16":
            out[0, 1, out.shape[2] // 2, out.shape[3] // 2] = torch.inf

    def poisoned_push(stage, stream, band):
        for y, rows in push(stage, stream, band):
            if stage.precision == "bf16" and y <= 100 < y + rows.shape[2]:
                rows = rows.clone()
                rows[0, 1, 100 - y, 20] = torch.inf
            yield y, rows

    monkeypatch.setattr(Stage, "fill", poisoned_fill)
    monkeypatch.setattr(Stage, "push", poisoned_push)
    job = render(models["rrdb"], CASES[name][0], tmp_path / "out.zarr")
    check_pyramid(job.out, job.plan)
    assert job.redone >= 1
    assert len(host[0]) == halvings(job.plan) + (job.redone if name == "batches" else 0)


def test_half_of_a_part_mixes_no_parts():
    whole = Box(10, 20, 10 + 7, 20 + 9)
    half = halve(np.random.default_rng(0).integers(0, 256, (3, *whole.shape), np.uint8))
    for part in (Box(10, 20, 14, 26), Box(12, 24, 17, 29), whole):
        inside = part.relative_to(whole).cover(2)
        np.testing.assert_array_equal(half_of(half, part, whole), half[(slice(None), *inside.slices)])
        assert half_of(None, part, whole) is None
    for part in (Box(11, 20, 14, 26), Box(10, 21, 14, 26), Box(10, 20, 13, 26), Box(10, 20, 14, 27)):
        assert half_of(half, part, whole) is None
