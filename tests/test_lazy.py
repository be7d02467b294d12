"""A render of what is looked at: the pixels of a whole render, nothing more than was wanted, and a store that goes on."""

import numpy as np
import pytest
from support.stores import attributes, pixels, render, shards

from engine.geometry import Box
from engine.lazy import LazyRender, lazy_job
from engine.plan.request import Request


@pytest.mark.parametrize(
    ("name", "executor", "size"),
    [
        ("rrdb", "bands", (512, 384)),
        ("rrdb", "bands", (450, 330)),
        pytest.param("noisy", "tiles", (512, 384), marks=pytest.mark.slow),
    ],
)
def test_shards_that_are_looked_at_are_those_of_the_whole_render(tmp_path, models, name, executor, size):
    """Also where the image is reduced to its size; the rest may come from here, or from a render that continues."""
    request = Request(size=size, seed=5, precision="fp32", executor=executor, tile=64)
    job = lazy_job(models[name], request, tmp_path / "lazy.zarr")
    lazy = LazyRender(job, job.open_sink())
    assert not lazy.step()
    side, _ = job.plan.shard
    places = [Box(side, side, side + 9, side + 9), Box(0, 0, 9, 9)] if side < size[0] else [Box(0, 0, 9, 9)]
    lazy.look(Box(0, 0, *job.plan.size))
    for count, place in enumerate(places, 1):
        lazy.look(place)
        assert (lazy.step(), lazy.step(), shards(job.out, 0)) == (True, False, count)
    whole = render(models[name], request, tmp_path / "whole.zarr")
    assert whole.plan == job.plan
    seen, expected = pixels(job.out), pixels(whole.out)
    for place in places:
        part = (slice(None), *Box(place.y0, place.x0, place.y0 + side, place.x0 + side).slices)
        np.testing.assert_array_equal(seen[part], expected[part])
    if executor == "tiles":
        lazy.close()
        render(models[name], job.request, job.out, resume=True)
    else:
        lazy.wants_all = True
        while lazy.step():
            pass
    np.testing.assert_array_equal(pixels(job.out), expected)
    assert attributes(job.out)["complete"] is True
