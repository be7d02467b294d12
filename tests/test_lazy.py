"""A render of what is looked at: the pixels of a whole render, nothing more than was wanted, and a store that goes on."""

import time

import numpy as np
import pytest
from support.stores import pixels, render, shards

from engine.geometry import Box
from engine.lazy import LazyRender, lazy_job
from engine.plan.request import Request


def wait(condition):
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("nothing is computed")


@pytest.mark.parametrize("executor", ["bands", "tiles"])
@pytest.mark.parametrize("name", ["rrdb", "noisy"])
def test_shards_that_are_looked_at_are_those_of_the_whole_render(tmp_path, models, name, executor):
    request = Request(size=(512, 384), seed=5, precision="fp32", executor=executor, tile=64)
    errors = []
    job = lazy_job(models[name], request, tmp_path / "lazy.zarr")
    lazy = LazyRender(job, job.open_sink(), errors.append)
    (side, _), out = job.plan.shard, job.out
    lazy.look(Box(side, side, side + 9, side + 9))
    wait(lambda: shards(out, 0) == 1)
    lazy.look(Box(0, 0, 9, 9))
    wait(lambda: shards(out, 0) == 2)
    lazy.close()
    whole = render(models[name], request, tmp_path / "whole.zarr")
    assert errors == []
    assert whole.plan == job.plan
    seen, expected = pixels(out), pixels(whole.out)
    for part in (np.s_[:, :side, :side], np.s_[:, side : 2 * side, side : 2 * side]):
        np.testing.assert_array_equal(seen[part], expected[part])
    assert shards(out, 0) == 2
    render(models[name], job.request, out, resume=True)
    np.testing.assert_array_equal(pixels(out), expected)
