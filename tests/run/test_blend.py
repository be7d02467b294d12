"""Blending: every pixel once, out of the tiles that make it, whatever the order; a step becomes a slope."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.plans import stage_of
from support.stages import Chain, whole_image
from support.stores import files, pixels, render

from engine.errors import UsageError
from engine.geometry import Box
from engine.job import Job
from engine.kernels.blend import weights
from engine.plan import tiles
from engine.plan.request import Request
from engine.run.blend import TileBlender

PLANS = [
    replace(stage_of(40, 52, 16, 4, scale=2), blend=4),
    replace(stage_of(33, 50, 16, 0, scale=2), blend=16, ramp="linear"),  # the last cells are narrower than the ramp
    replace(stage_of(20, 100, 32, 8, align=4, scale=1), blend=8),
    replace(stage_of(100, 20, 32, 8, scale=1), blend=7),
    replace(stage_of(9, 9, 16, 8, scale=4), blend=8),  # one tile
]


def made_of(plan):
    """What every tile makes, each another: index -> float32."""
    generator = torch.Generator().manual_seed(0)
    tiles = (plan.tile_at(*index) for index in plan.grid.indices())
    return {(t.row, t.column): torch.rand(3, *t.output.shape, generator=generator) for t in tiles}


def runner(made, ran=None):
    def run(tiles):
        for tile in tiles:
            if ran is not None:
                ran.append((tile.row, tile.column))
            yield tile, made[tile.row, tile.column]

    return run


def averaged(plan, made):
    """The weighted mean of all that the tiles make, and the sum of the weights."""
    height, width = plan.grid.bounds.shape
    reach = plan.blend * plan.scale
    total, sums = torch.zeros(3, height, width, dtype=torch.float64), torch.zeros(height, width, dtype=torch.float64)
    for index, values in made.items():
        tile = plan.tile_at(*index)
        axes = []
        for first, last, end, size in (
            (tile.cell.y0, tile.cell.y1, tile.output.y1, height), (tile.cell.x0, tile.cell.x1, tile.output.x1, width)
        ):  # fmt: skip
            line = torch.ones(end - first, dtype=torch.float64)
            entering = min(reach, size - first)  # the strip of the tile before ends with the image
            if first:
                line[:entering] = 1 - weights(entering, plan.ramp, line.device).double()[: len(line)]
            if end > last:
                line[last - first :] *= weights(end - last, plan.ramp, line.device).double()
            axes.append(line)
        weight = axes[0][:, None] * axes[1][None, :]
        total[(slice(None), *tile.output.slices)] += values.double() * weight
        sums[tile.output.slices] += weight
    return total, sums


def joined(plan, made, order=None, dtype=torch.float32):
    """The image, its cells asked for one by one or as ``order`` says."""
    result = torch.zeros(3, *plan.grid.bounds.shape, dtype=dtype)
    blender = TileBlender(plan, dtype)
    for index in order or plan.grid.indices():
        for tile, cell in blender.blend([plan.tile_at(*index)], runner(made)):
            result[(slice(None), *tile.cell.slices)] = cell
    return result


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_pixel_is_the_weighted_mean_of_the_tiles_that_make_it(plan):
    made = made_of(plan)
    expected, sums = averaged(plan, made)
    torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-6, rtol=0)
    torch.testing.assert_close(joined(plan, made).double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_the_order_changes_no_bit(plan):
    made, rng = made_of(plan), random.Random(0)
    expected = joined(plan, made)
    for _ in range(5):
        order = list(plan.grid.indices())
        rng.shuffle(order)
        assert torch.equal(joined(plan, made, order), expected)
    together = torch.zeros_like(expected)
    for tile, cell in TileBlender(plan, torch.float32).blend(
        [plan.tile_at(*i) for i in plan.grid.indices()], runner(made)
    ):
        together[(slice(None), *tile.cell.slices)] = cell
    assert torch.equal(together, expected)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_tile_is_made_once_and_two_rows_of_borders_are_kept(plan):
    made, ran = made_of(plan), []
    blender = TileBlender(plan, torch.float32)
    for index in plan.grid.indices():
        list(blender.blend([plan.tile_at(*index)], runner(made, ran)))
        assert len(blender._borders) <= plan.borders_kept
        held = sum(strip.numel() * 4 for strips in blender._borders.values() for strip in strips)
        assert held <= tiles._border_bytes(plan)
    assert ran == list(plan.grid.indices())


def test_a_blender_that_begins_anew_makes_its_neighbours_again():
    plan, ran = PLANS[0], []
    tile = plan.tile_at(1, 2)
    list(TileBlender(plan, torch.float32).blend([tile], runner(made_of(plan), ran)))
    assert ran == [(0, 1), (0, 2), (1, 1), (1, 2)]


@pytest.mark.parametrize("dither", [False, True])
def test_levels_are_rounded_once_at_the_end(dither):
    plan = replace(PLANS[0], dither=dither)
    made = made_of(plan)
    levels, exact = joined(plan, made, dtype=torch.uint8), joined(plan, made) * 255
    assert levels.dtype == torch.uint8
    off = (levels.float() - exact).abs()
    assert float(off.max()) <= (1 if dither else 0.5) + 1e-4
    assert (float(off.max()) > 0.6) == dither


def chained(folder, network, image, blend):
    """One stage in tiles of 24 without a halo."""
    chain = Chain(folder, network, image, [24], [0], last=False, blend=blend)
    return chain.render()


def steps(image, cell):
    """Mean step across the borders of cells, over the mean step elsewhere."""
    change = (image[:, :, 1:] - image[:, :, :-1]).abs().mean((0, 1))
    at = np.arange(1, image.shape[2]) % cell == 0
    return float(change[at].mean() / change[~at].mean())


def test_a_step_becomes_a_slope(tmp_path, small_rrdb, picture):
    """Without a halo a seam is a line; blended, the picture changes there as it does elsewhere. The error is no larger."""
    image = picture(72, 96)
    hard, soft = (chained(tmp_path / str(blend), small_rrdb, image, blend) for blend in (0, 8))
    whole = whole_image(small_rrdb, image)
    natural = steps(whole, 96)
    assert steps(hard, 96) > 1.1 * natural
    assert abs(steps(soft, 96) - natural) < (steps(hard, 96) - natural) / 3
    assert float((soft - whole).abs().max()) <= 1.001 * float((hard - whole).abs().max())


SMALL = Request(
    size=(192, 256), stages=2, tile=16, overlap="4", executor="tiles", device="cpu", precision="fp32", blend=8
)


def image_files(folder):
    """Without the file that names the store and the executor."""
    return {name: data for name, data in files(folder).items() if name != "zarr.json"}


@pytest.mark.parametrize("name", ["rrdb", "swinir", "noisy"])
def test_a_blended_render_is_the_same_by_every_executor_and_after_a_stop(tmp_path, models, name):
    whole = render(models[name], SMALL, tmp_path / "tiles.zarr")
    assert whole.plan.stages[-1].blend == 8
    assert whole.plan.stages[0].blend == 0
    render(models[name], replace(SMALL, executor="batched"), tmp_path / "batched.zarr")
    render(models[name], SMALL, tmp_path / "stopped.zarr", most=5)
    render(models[name], SMALL, tmp_path / "stopped.zarr", resume=True)
    expected = image_files(tmp_path / "tiles.zarr")
    hard = render(models[name], replace(SMALL, blend=0), tmp_path / "hard.zarr")
    assert not np.array_equal(pixels(hard.out), pixels(whole.out))
    assert image_files(tmp_path / "batched.zarr") == expected
    assert image_files(tmp_path / "stopped.zarr") == expected


def test_a_region_of_a_blended_render_is_its_crop(tmp_path, models):
    whole = render(models["rrdb"], SMALL, tmp_path / "whole.zarr")
    roi = Box(33, 17, 180, 200)
    part = render(models["rrdb"], replace(SMALL, roi=roi), tmp_path / "part.zarr")
    np.testing.assert_array_equal(pixels(part.out), pixels(whole.out)[(slice(None), *roi.slices)])


def test_the_tiles_that_run_are_those_that_were_planned(tmp_path, models):
    for number, roi in enumerate([None, Box(33, 17, 180, 200), Box(130, 70, 140, 80)]):
        ran = [0, 0]
        job = Job.prepare(models["rrdb"], replace(SMALL, roi=roi), tmp_path / f"{number}.zarr")

        def count(stage, pixels, ran=ran):
            ran[stage] += 1

        for _ in job.run(job.open_sink(resume=False, overwrite=False), count):
            pass
        assert tuple(ran) == job.projection.tasks


def test_a_tile_smaller_than_the_blend_is_refused(tmp_path, models):
    with pytest.raises(UsageError, match="cross-fade is wider than the tile \\(24, tile 16\\); use blend=16"):
        Job.prepare(models["rrdb"], replace(SMALL, blend=24), tmp_path / "out.zarr")
    chosen = Job.prepare(models["rrdb"], replace(SMALL, blend=24, tile=None, memory=1 << 30), tmp_path / "out.zarr")
    assert chosen.plan.stages[-1].tile >= 24
