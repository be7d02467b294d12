"""A canvas of 1,048,576 x 1,048,576 pixels: regions agree wherever and by whomever they are rendered, and plans take no lists."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from PIL import Image
from support.commands import finish, start
from support.plans import bands_of, cost_of, measured_of, plan_of
from support.stores import pixels

from engine.geometry import Box
from engine.io.zarr_store import ZarrSink
from engine.kernels.gather import Noise, gather, gather_torch
from engine.kernels.noise import noise_torch
from engine.kernels.trim import trim, trim_torch
from engine.model.build import build
from engine.plan.make import project
from engine.plan.measured import BandCost
from engine.plan.parts import Part, Shares

SIDE = 1 << 20
FAR = (1 << 30) - 64
"""Position in a network's input, whose output has 2^31 pixels a side at x2; bytes of a row are beyond 32 bits."""

CUTS = {"shard": 1024, "chunk": 512, "cores": (64, 256, 1024), "scales": (4, 4, 4)}
PLANS = {
    "bands": bands_of((SIDE, SIDE), halos=(49, 49, 49), **CUTS),
    "tiles": plan_of((SIDE, SIDE), halos=(8, 8, 8), **CUTS),
}
MEASURED = measured_of([cost_of(per_pixel=1, seconds=1e-6, bands=BandCost(16, 1, 1e-6), radius=49)] * 3)


@pytest.mark.parametrize("name", PLANS)
def test_plans_take_no_list_of_shards(name):
    plan = PLANS[name]
    tracemalloc.start()
    shares = Shares.of(plan, MEASURED, 64)
    writes = shares.writes(plan, Part(33, 64))
    projection = project(plan, MEASURED, writes.rectangles)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20
    assert sum(shares.writes(plan, part).area for part in shares.parts) == SIDE**2
    assert writes[0] == plan.writes()[shares.bounds[32]]
    assert projection.lr_pixels[-1] * 16 == pytest.approx(SIDE**2 / 64, rel=0.1)
    assert projection.disk > 3 * SIDE**2


def test_writes_cover_what_they_hold():
    """By cells, also where a range begins and ends within a row or a strip."""
    for plan in (plan_of(), bands_of((700, 512), shard=64, chunk=64, cores=(16, 64))):
        writes = plan.writes()
        every = list(writes)
        for first, last in ((0, len(writes)), (3, 17), (1, 2), (5, 5)):
            part = writes[first:last]
            assert list(part) == every[first:last]
            painted = np.zeros(plan.size, int)
            for box in part.rectangles:
                painted[box.slices] += 1
            assert painted.max(initial=0) <= 1
            assert painted.sum() == part.area == sum(box.area for box in part)
            for box in every:
                assert part.covers(box) == (painted[box.slices] == 1).all()


def test_noise_and_pixels_beyond_32_bits():
    """A block at the far end of a large image has the values of its positions; the kernels agree with the definition."""
    size, box = (FAR + 64, FAR + 64), Box(FAR, FAR - 5, FAR + 16, FAR + 19)
    block = torch.rand(3, *box.shape)
    noise = Noise(0.1, 7, 65536, 1)
    expected = gather_torch(block, box, box, size, noise)
    assert torch.equal(noise_torch(7, 1, box, 4)[:, 5:], noise_torch(7, 1, Box(FAR + 5, box.x0, box.y1, box.x1), 4))
    assert not torch.equal(noise_torch(7, 1, box, 4), noise_torch(7, 1, box.shift(-FAR, -FAR), 4))
    torch.testing.assert_close(gather(block, box, box, size, noise, use_triton=True), expected)
    crop, origin = Box(0, 0, *box.shape), (box.y0, box.x0)
    for use_triton in (False, True):
        result = trim(block[None], crop, torch.uint8, origin=origin, dither=True, use_triton=use_triton)
        assert torch.equal(result.pixels, trim_torch(block[None], crop, torch.uint8, origin=origin, dither=True).pixels)


def test_a_store_of_a_terapixel_takes_its_last_shard(tmp_path):
    plan = PLANS["tiles"]
    sink = ZarrSink.create(tmp_path / "out.zarr", plan, {})
    box = plan.writes()[-1]
    box = plan.grid().box(*list(plan.grid().indices(box))[-1])
    values = np.arange(3 * box.area, dtype=np.uint32).reshape(3, *box.shape).astype(np.uint8)
    sink.write(box, values)
    sink.close()
    array = zarr.open_array(sink.path / "0", mode="r")
    assert array.nbytes == 3 * SIDE**2
    np.testing.assert_array_equal(array[(slice(None), *box.slices)], values)
    assert len(list((tmp_path / "out.zarr" / "0").rglob("c/*/*/*"))) == 1


@pytest.mark.slow
def test_regions_of_a_terapixel_agree(tmp_path, model_file):
    """Two processes render two regions each, far from the origin; where they overlap the bits are equal."""
    model = tmp_path / "model.safetensors"
    build(None, [str(model_file.parent / "sr.safetensors")] * 8).save(model)
    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)).save(picture)
    regions = [(1_000_000, 777_777), (1_000_100, 777_700)]
    words = f"render {model} --init {picture} --size {SIDE}x{SIDE} --tile 32 --overlap exact --executor tiles --precision fp32"
    workers = [
        start(tmp_path, f"{words} --memory 4GiB --roi {x},{y},256,256 --out {tmp_path / f'{k}.zarr'} --quiet")
        for k, (x, y) in enumerate(regions)
    ]
    for worker in workers:
        assert finish(worker)[0] == 0
    one, other = (pixels(tmp_path / f"{k}.zarr") for k in range(2))
    (x, y), (u, v) = regions
    np.testing.assert_array_equal(one[:, : 256 - (y - v), u - x :], other[:, y - v :, : 256 - (u - x)])
    assert one.std() > 1
    assert sum(p.stat().st_size for p in Path(tmp_path).rglob("*") if p.is_file()) < 10 << 20
