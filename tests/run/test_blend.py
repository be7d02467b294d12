"""Cross-fades: every pixel once, from all tiles that cover it, in any order; a step becomes a slope."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.plans import stage_of
from support.stages import Chain, whole_image
from support.stores import image_files, pixels, render

from engine.device.memory import resident
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


def outputs_of(plan):
    """Random output of every tile: index -> float32."""
    generator = torch.Generator().manual_seed(0)
    covering = (plan.tile_at(*index) for index in plan.grid.indices())
    return {(t.row, t.column): torch.rand(3, *t.output.shape, generator=generator) for t in covering}


def runner(outputs, ran=None):
    def run(requested):
        for tile in requested:
            if ran is not None:
                ran.append((tile.row, tile.column))
            yield tile, outputs[tile.row, tile.column]

    return run


def averaged(plan, outputs):
    """The weighted mean of all outputs, and the sum of the weights."""
    height, width = plan.grid.bounds.shape
    reach = plan.blend * plan.scale
    total, sums = torch.zeros(3, height, width, dtype=torch.float64), torch.zeros(height, width, dtype=torch.float64)
    for index, values in outputs.items():
        tile = plan.tile_at(*index)
        axes = []
        for first, last, end, size in (
            (tile.cell.y0, tile.cell.y1, tile.output.y1, height), (tile.cell.x0, tile.cell.x1, tile.output.x1, width)
        ):  # fmt: skip
            line = torch.ones(end - first, dtype=torch.float64)
            entering = min(reach, size - first)  # the border of the tile before ends with the image
            if first:
                line[:entering] = 1 - weights(entering, plan.ramp, line.device).double()[: len(line)]
            if end > last:
                line[last - first :] *= weights(end - last, plan.ramp, line.device).double()
            axes.append(line)
        weight = axes[0][:, None] * axes[1][None, :]
        total[(slice(None), *tile.output.slices)] += values.double() * weight
        sums[tile.output.slices] += weight
    return total, sums


def blended(plan, outputs, order=None, dtype=torch.float32):
    """The image, its cells requested one by one, in the given order."""
    result = torch.zeros(3, *plan.grid.bounds.shape, dtype=dtype)
    blender = TileBlender(plan, dtype)
    for index in order or plan.grid.indices():
        for tile, cell in blender.blend([plan.tile_at(*index)], runner(outputs)):
            result[(slice(None), *tile.cell.slices)] = cell
    return result


def test_pixel_is_the_weighted_mean_of_its_tiles():
    for plan in PLANS:
        outputs = outputs_of(plan)
        expected, sums = averaged(plan, outputs)
        torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-6, rtol=0)
        torch.testing.assert_close(blended(plan, outputs).double(), expected, atol=1e-6, rtol=0)


def test_order_changes_no_bit():
    for plan in PLANS:
        outputs, chance = outputs_of(plan), random.Random(0)
        expected = blended(plan, outputs)
        for _ in range(5):
            order = list(plan.grid.indices())
            chance.shuffle(order)
            assert torch.equal(blended(plan, outputs, order), expected), plan
        together = torch.zeros_like(expected)
        all_tiles = [plan.tile_at(*index) for index in plan.grid.indices()]
        for tile, cell in TileBlender(plan, torch.float32).blend(all_tiles, runner(outputs)):
            together[(slice(None), *tile.cell.slices)] = cell
        assert torch.equal(together, expected), plan


def test_tile_runs_once_and_two_rows_of_borders_are_kept():
    for plan in PLANS:
        outputs, ran = outputs_of(plan), []
        blender = TileBlender(plan, torch.float32)
        for index in plan.grid.indices():
            list(blender.blend([plan.tile_at(*index)], runner(outputs, ran)))
            assert len(blender._borders) <= plan.borders_kept
            nbytes = sum(border.numel() * 4 for borders in blender._borders.values() for border in borders)
            assert nbytes <= tiles._border_bytes(plan)
        assert ran == list(plan.grid.indices()), plan


def test_new_blender_runs_the_neighbours_again():
    plan, ran = PLANS[0], []
    tile = plan.tile_at(1, 2)
    list(TileBlender(plan, torch.float32).blend([tile], runner(outputs_of(plan), ran)))
    assert ran == [(0, 1), (0, 2), (1, 1), (1, 2)]


def test_levels_are_rounded_once_at_the_end():
    for dither in (False, True):
        plan = replace(PLANS[0], dither=dither)
        outputs = outputs_of(plan)
        levels, exact = blended(plan, outputs, dtype=torch.uint8), blended(plan, outputs) * 255
        assert levels.dtype == torch.uint8
        largest = float((levels.float() - exact).abs().max())
        assert largest <= (1 if dither else 0.5) + 1e-4
        assert (largest > 0.6) == dither


def in_tiles(folder, network, image, blend):
    """Output of one stage in tiles of 24 without a halo."""
    return Chain(folder, network, image, [24], [0], last=False, blend=blend).render()


def relative_step(image, cell):
    """Mean step across the borders of cells, divided by the mean step elsewhere."""
    change = (image[:, :, 1:] - image[:, :, :-1]).abs().mean((0, 1))
    at = np.arange(1, image.shape[2]) % cell == 0
    return float(change[at].mean() / change[~at].mean())


def test_step_becomes_a_slope(tmp_path, small_rrdb, picture):
    """Without a halo a seam is a line; cross-faded, the picture changes there as elsewhere. The error is no larger."""
    image = picture(72, 96)
    hard, soft = (in_tiles(tmp_path / str(blend), small_rrdb, image, blend) for blend in (0, 8))
    whole = whole_image(small_rrdb, image)
    natural = relative_step(whole, 96)
    assert relative_step(hard, 96) > 1.1 * natural
    assert abs(relative_step(soft, 96) - natural) < (relative_step(hard, 96) - natural) / 3
    assert float((soft - whole).abs().max()) <= 1.001 * float((hard - whole).abs().max())


SMALL = Request(
    size=(256, 192), stages=2, tile=16, overlap="4", executor="tiles", device="cpu", precision="fp32", blend=8
)


@pytest.mark.parametrize("name", ["noisy", *(pytest.param(n, marks=pytest.mark.slow) for n in ("rrdb", "swinir"))])
def test_blended_render_is_equal_by_every_executor_and_after_a_stop(tmp_path, models, name):
    whole = render(models[name], SMALL, tmp_path / "tiles.zarr")
    assert [stage.blend for stage in whole.plan.stages] == [0, 8]
    render(models[name], replace(SMALL, executor="batched"), tmp_path / "batched.zarr")
    render(models[name], SMALL, tmp_path / "stopped.zarr", writes=5)
    render(models[name], SMALL, tmp_path / "stopped.zarr", resume=True)
    hard = render(models[name], replace(SMALL, blend=0), tmp_path / "hard.zarr")
    assert not np.array_equal(pixels(hard.out), pixels(whole.out))
    for other in ("batched", "stopped"):
        assert image_files(tmp_path / f"{other}.zarr") == image_files(tmp_path / "tiles.zarr"), other


def test_region_of_a_blended_render_is_the_crop(tmp_path, models):
    whole = render(models["rrdb"], SMALL, tmp_path / "whole.zarr")
    roi = Box(33, 17, 180, 200)
    part = render(models["rrdb"], replace(SMALL, roi=roi), tmp_path / "part.zarr")
    np.testing.assert_array_equal(pixels(part.out), pixels(whole.out)[(slice(None), *roi.slices)])


def test_projected_tiles_are_those_that_run(tmp_path, models):
    for number, roi in enumerate([None, Box(33, 17, 180, 200), Box(130, 70, 140, 80)]):
        ran = [0, 0]
        job = Job.prepare(models["rrdb"], replace(SMALL, roi=roi), tmp_path / f"{number}.zarr")

        def count(position, lr_pixels, ran=ran):
            ran[position] += 1

        for _ in job.run(job.open_sink(resume=False, overwrite=False), count):
            pass
        assert tuple(ran) == job.projection.tasks, roi


def test_tile_smaller_than_the_cross_fade_is_refused(tmp_path, models):
    with pytest.raises(UsageError, match="cross-fade is wider than the tile \\(24, tile 16\\); use blend=16"):
        Job.prepare(models["rrdb"], replace(SMALL, blend=24), tmp_path / "out.zarr")
    memory = resident() + (1 << 29)  # what tests before this one left in the process is not the tile's
    chosen = Job.prepare(models["rrdb"], replace(SMALL, blend=24, tile=None, memory=memory), tmp_path / "out.zarr")
    assert chosen.plan.stages[-1].tile >= 24
