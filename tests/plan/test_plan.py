"""Plans: what tiles read and write, which canvas a size leads to, and that a plan is comparable data."""

import dataclasses
import json
import math

import numpy as np
import pytest
from support.plans import plan_of, stage_of

from engine.errors import AlignmentError, UsageError
from engine.geometry import Box
from engine.plan.canvas import resolve_canvas
from engine.plan.plan import MAX_CHUNK, MAX_SHARD, Plan, StagePlan, shard_of

RANDOM = 24


def random_stage(seed):
    rng = np.random.default_rng(seed)
    align = int(rng.choice([1, 2, 8]))
    height, width = (int(v) for v in rng.integers(1, 150, 2))
    core, halo = align * int(rng.integers(1, 48 // align)), align * int(rng.integers(0, 24 // align))
    return stage_of(height, width, core, halo, align, int(rng.choice([1, 2, 4])))


NAMED = {
    "smaller than a tile": stage_of(10, 7, 64, 16),
    "smaller than a window": stage_of(5, 3, 8, 8, align=8),
    "one pixel": stage_of(1, 1, 16, 0),
    "whole number of cores": stage_of(64, 128, 32, 8, align=8),
    "one pixel more": stage_of(65, 129, 32, 8, align=8),
    "one pixel less": stage_of(63, 127, 32, 8, align=8),
    "flat": stage_of(9, 500, 16, 5),
    "no halo": stage_of(31, 33, 8, 0, align=8),
    "halo larger than the core": stage_of(200, 100, 8, 40, align=8),
    "blended": dataclasses.replace(stage_of(100, 130, 24, 8, align=8), blend=8),
    "blended as wide as the core": dataclasses.replace(stage_of(70, 65, 16, 4), blend=16),
    "blended and no halo": dataclasses.replace(stage_of(33, 50, 16, 0), blend=5),
    "margin wider than the halo": dataclasses.replace(stage_of(100, 130, 16, 4), margin=12),
    "margin narrower than the halo": dataclasses.replace(stage_of(99, 131, 24, 16, align=8), margin=8),
    "margin, and smaller than a tile": dataclasses.replace(stage_of(70, 90, 64, 8), margin=16),
    "margin around a pixel": dataclasses.replace(stage_of(33, 33, 16, 8), margin=16),
    "blended within a margin": dataclasses.replace(stage_of(100, 130, 24, 8, align=8), blend=8, margin=16),
}


@pytest.fixture(params=[*NAMED, *range(RANDOM)])
def stage(request):
    return NAMED[request.param] if request.param in NAMED else random_stage(request.param)


def tiles_of(stage):
    return [stage.tile(*index) for index in stage.grid.indices()]


def test_all_tiles_read_one_shape_inside_the_padded_frame(stage):
    frame = Box(0, 0, *stage.padded)
    for tile in tiles_of(stage):
        assert tile.read.shape == stage.tile_shape
        assert frame.contains(tile.read)


def test_padding_reaches_the_next_window_and_no_further(stage):
    for padded, size in zip(stage.padded, (stage.height, stage.width), strict=True):
        assert padded % stage.align == 0
        assert 0 <= padded - size < stage.align


def test_tiles_start_on_the_window_grid_and_are_whole_windows(stage):
    for tile in tiles_of(stage):
        assert {v % stage.align for v in (tile.read.y0, tile.read.x0, *tile.read.shape)} == {0}


def test_writes_cover_every_output_pixel_once(stage):
    counts = np.zeros((stage.grid.height, stage.grid.width), np.uint8)
    for tile in tiles_of(stage):
        counts[tile.cell.slices] += 1
    assert (counts == 1).all()


def test_core_is_what_is_made_seen_from_the_tiles_output(stage):
    for tile in tiles_of(stage):
        output = Box(0, 0, *(n * stage.scale for n in stage.tile_shape))
        assert output.contains(tile.tile)
        assert tile.tile.shape == tile.output.shape
        y, x = (n - stage.margin for n in (tile.read.y0, tile.read.x0))
        assert tile.tile.shift(y * stage.scale, x * stage.scale) == tile.output


def test_a_tile_reaches_into_those_after_it_by_the_blend_width(stage):
    """And into no others: what meets its cell is made by the tiles that `blended_into` names."""
    reach, image = stage.blend * stage.scale, stage.grid.bounds
    cells = {(t.row, t.column): t for t in tiles_of(stage)}
    for index, tile in cells.items():
        grown = Box(tile.cell.y0, tile.cell.x0, tile.cell.y1 + reach, tile.cell.x1 + reach)
        assert tile.output == grown.clip(image)
        met = {other for other, t in cells.items() if other != index and t.output.clip(tile.cell).area}
        assert met == set(stage.blended_into(*index))


def test_a_blend_reaches_no_further_than_the_next_tile():
    dataclasses.replace(stage_of(100, 100, 16, 8), blend=16).check()
    with pytest.raises(UsageError, match="stage 1: a blend of 17 reaches past the next tile of 16; use at most 16"):
        dataclasses.replace(stage_of(100, 100, 16, 8), blend=17).check()
    with pytest.raises(AlignmentError, match="stage 1: blend width 12 is not a multiple of the window 8; use 16"):
        dataclasses.replace(stage_of(100, 100, 16, 8, align=8), blend=12).check()


def test_inner_sides_have_the_whole_halo(stage):
    """On a side that is the frame's own border no halo is needed: the network pads there as on the whole image."""
    height, width = stage.padded
    for tile in tiles_of(stage):
        kept = tile.output.cover(stage.scale).shift(stage.margin, stage.margin)
        read = tile.read
        for context, at_border in (
            (kept.y0 - read.y0, read.y0 == 0),
            (kept.x0 - read.x0, read.x0 == 0),
            (read.y1 - kept.y1, read.y1 == height),
            (read.x1 - kept.x1, read.x1 == width),
        ):
            assert context >= stage.halo or at_border


def test_a_strip_as_wide_as_the_image_has_no_edge(stage):
    """Nor has it where the image was cropped by up to the margin. The sides of others have their halo."""
    width, scale, frame = stage.grid.width, stage.scale, stage.padded[1]
    for cropped in (0, min(width - 1, stage.margin * scale)):
        assert stage.input_columns(0, width - cropped) == (0, frame)
    for x0, x1 in ((width // 3, width // 3 + 1), (0, width // 2 + 1), (width // 2, width)):
        first, last = stage.input_columns(x0, x1)
        assert first == 0 or first <= stage.margin + x0 // scale - stage.halo
        assert last == frame or last >= stage.margin + -(-x1 // scale) + stage.halo
        assert first % stage.align == last % stage.align == 0


def test_a_margin_begins_on_the_window_grid():
    with pytest.raises(AlignmentError, match="stage 1: margin 4 is not a multiple of the window 8; use 8"):
        dataclasses.replace(stage_of(100, 100, 16, 8, align=8), margin=4).check()


def test_needs_is_inside_the_image_and_holds_all_that_is_reflected(stage):
    """The frame's reflected rows come from pixels that the tile asks of the level below, too."""
    for tile in tiles_of(stage):
        needs = stage.source_box(tile.read)
        assert Box(0, 0, stage.height, stage.width).contains(needs)
        assert needs.contains(tile.read.clip(Box(0, 0, stage.height, stage.width)))
        rows = np.pad(np.arange(stage.height), (0, stage.padded[0] - stage.height), mode="reflect")
        columns = np.pad(np.arange(stage.width), (0, stage.padded[1] - stage.width), mode="reflect")
        assert needs.y0 <= rows[tile.read.y0 : tile.read.y1].min()
        assert needs.x0 <= columns[tile.read.x0 : tile.read.x1].min()


def test_tiles_of_a_box_are_those_that_write_into_it(stage):
    rng = np.random.default_rng(0)
    for _ in range(5):
        y, x = (sorted(int(v) for v in rng.integers(0, n + 1, 2)) for n in (stage.grid.height, stage.grid.width))
        box = Box(y[0], x[0], y[1], x[1])
        assert list(stage.tiles(box)) == [t for t in tiles_of(stage) if t.cell.clip(box).area]


@pytest.mark.parametrize(
    ("core", "halo", "message"),
    [(20, 8, "tile core 20 is not a multiple of the window 8; use 24"), (16, 9, "halo 9 .* use 16")],
)
def test_misaligned_tiles_are_refused_with_the_way_out(core, halo, message):
    with pytest.raises(AlignmentError, match=f"stage 1: .*{message}"):
        stage_of(100, 100, core, halo, align=8).check()


def test_aligned_tiles_pass_the_check(stage):
    stage.check()


def test_strips_may_be_of_any_width_but_bands_and_halos_are_whole_windows():
    strips = dataclasses.replace(stage_of(100, 100, 20, 8, align=8), band=16)
    strips.check()
    with pytest.raises(AlignmentError, match="stage 1: band 12 is not a multiple of the window 8; use 16"):
        dataclasses.replace(strips, band=12).check()
    with pytest.raises(AlignmentError, match="stage 1: halo 9 .* use 16"):
        dataclasses.replace(strips, halo=9).check()


# Canvases


@pytest.mark.parametrize(
    ("size", "native", "base", "stages"),
    [
        # Of the paper: a base 256 wide, three stages of 4. 10912 = 64 * 170.5: the base is rounded up and cropped.
        ((8640, 16384), (135, 256), (135, 256), 3),
        ((9152, 16384), (143, 256), (143, 256), 3),
        ((10912, 16384), (170, 256), (171, 256), 3),
        ((2160, 4096), (135, 256), (135, 256), 2),
        ((540, 1024), (135, 256), (135, 256), 1),
        ((4097, 4097), (256, 256), (257, 257), 2),
        ((100, 100), (135, 256), (25, 25), 1),
        ((1, 1), (135, 256), (1, 1), 1),
        ((65536, 65536), (135, 256), (1024, 1024), 3),
    ],
)
def test_canvas_takes_the_stages_whose_base_is_nearest_to_native(size, native, base, stages):
    canvas = resolve_canvas(size, native, [4, 4, 4], None)
    assert (canvas.size, canvas.base, canvas.stages) == (size, base, stages)
    factor = 4**canvas.stages
    assert all(0 <= b * factor - s < factor for b, s in zip(canvas.base, size, strict=True))


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_given_stages_are_kept(stages):
    canvas = resolve_canvas((4096, 4096), (64, 64), [4, 2, 3], stages)
    factor = math.prod([4, 2, 3][:stages])
    assert canvas.stages == stages
    assert canvas.base == (-(-4096 // factor),) * 2


def test_without_a_size_every_stage_runs_on_the_native_image():
    canvas = resolve_canvas(None, (135, 256), [4, 4, 4], None)
    assert (canvas.size, canvas.base, canvas.stages) == ((8640, 16384), (135, 256), 3)
    assert resolve_canvas(None, (135, 256), [4, 4, 4], 1).size == (540, 1024)


def test_a_margin_adds_to_the_base_and_not_to_the_canvas():
    canvas = resolve_canvas((8640, 16384), (135, 256), [4, 4, 4], None).with_margin(8)
    assert (canvas.size, canvas.base, canvas.stages, canvas.margin) == ((8640, 16384), (151, 272), 3, 8)


def test_a_size_needs_no_native_image():
    assert resolve_canvas((1000, 1000), None, [4, 4], None).stages == 2


@pytest.mark.parametrize(
    ("size", "native", "stages", "message"),
    [
        (None, None, None, "--init"),
        ((100, 100), (10, 10), 0, "--stages 0: the model has 2 .* use 1 to 2"),
        ((100, 100), (10, 10), 3, "--stages 3"),
        ((0, 100), (10, 10), None, "100x0"),
    ],
)
def test_impossible_canvases_are_refused(size, native, stages, message):
    with pytest.raises(UsageError, match=message):
        resolve_canvas(size, native, [4, 4], stages)


# Whole plans


ROI = Box(130, 301, 431, 777)


@pytest.mark.parametrize("roi", [None, ROI])
def test_writes_cover_the_output_once_and_are_whole_shards(roi):
    plan = plan_of(roi=roi)
    counts = np.zeros(plan.size, np.uint8)
    for box in plan.writes():
        counts[box.slices] += 1
        assert box.y0 % plan.shard == 0
        assert box.x0 % plan.shard == 0
        assert box.y1 % plan.shard == 0 or box.y1 == plan.size[0]
        assert box.x1 % plan.shard == 0 or box.x1 == plan.size[1]
    assert (counts == 1).all()


def test_a_full_render_writes_the_last_stages_tiles():
    plan = plan_of()
    bounds = Box(0, 0, *plan.size)
    tiles = (t.cell.clip(bounds) for t in tiles_of(plan.stages[-1]))
    assert list(plan.writes()) == [box for box in tiles if box.area]


@pytest.mark.parametrize("size", [(10912, 16384), (9152, 16384), (8640, 16384)])
def test_the_papers_canvases_crop_the_last_stage(size):
    plan = plan_of(size, cores=(64, 128, 256), halos=(32, 32, 32), scales=(4, 4, 4), align=8)
    assert plan.base[1] == 256
    last = plan.stages[-1].grid
    assert last.bounds.contains(Box(0, 0, *size))
    assert last.height - size[0] < 64
    assert sum(box.area for box in plan.writes()) == math.prod(size)


@pytest.mark.parametrize("roi", [None, ROI, Box(699, 999, 700, 1000), Box(0, 0, 1, 1)])
@pytest.mark.parametrize("halos", [(8, 4), (0, 0)])
def test_tiles_to_run_counts_what_is_pulled(roi, halos):
    plan = plan_of(roi=roi, halos=halos)
    wanted = [set(), set()]
    for box in plan.writes():
        for upper in plan.stages[1].tiles(box.shift(plan.roi.y0, plan.roi.x0)):
            wanted[1].add((upper.row, upper.column))
            wanted[0] |= {(t.row, t.column) for t in plan.stages[0].tiles(plan.stages[1].source_box(upper.read))}
    assert plan.tiles_to_run(list(plan.writes())) == tuple(len(w) for w in wanted)


@pytest.mark.parametrize("margin", [0, 8, 40])
@pytest.mark.parametrize("cores", [(16, 32), (8, 8)])
def test_tiles_are_counted_without_listing_them(margin, cores):
    """Of a canvas with a margin, too, whose first tile need not begin in the corner of the level below."""
    plan = plan_of((256, 320), base=(16 + margin // 2, 20 + margin // 2), cores=cores, halos=(2, 2))
    last = dataclasses.replace(plan.stages[-1], margin=margin)
    plan = dataclasses.replace(plan, stages=(*plan.stages[:-1], last))
    assert plan.is_whole
    assert plan.tiles_to_run() == plan.tiles_to_run(list(plan.writes()))


def test_a_region_runs_fewer_tiles_than_the_canvas():
    whole, part = plan_of(), plan_of(roi=Box(0, 0, 100, 100))
    all_tiles = whole.tiles_to_run(list(whole.writes()))
    # The frame of 704 x 1008 is cropped to 700 x 1000, but every cell of it is met.
    assert all_tiles == tuple(len(s.grid) for s in whole.stages)
    assert part.tiles_to_run(list(part.writes())) == (1, 1)
    assert whole.tiles_to_run([]) == (0, 0)


def test_levels_halve_rounding_up_until_one_chunk_holds_them():
    plan = plan_of((1001, 701), shard=128, chunk=64)
    assert plan.pyramid == ((1001, 701), (501, 351), (251, 176), (126, 88), (63, 44))
    assert plan_of((60, 64), chunk=64).pyramid == ((60, 64),)
    assert [len(plan.grid(i)) for i in range(5)] == [48, 12, 4, 1, 1]


@pytest.mark.parametrize(("errors", "worst"), [((0.0, 0.0), 0.0), ((0.5, 0.7), 0.7), ((0.5, None), None)])
def test_seam_error_is_the_worst_stages(errors, worst):
    plan = plan_of()
    stages = tuple(dataclasses.replace(s, seam_error=e) for s, e in zip(plan.stages, errors, strict=True))
    assert dataclasses.replace(plan, stages=stages).seam_error == worst


OTHER_VALUES = {
    "canvas": (701, 1000),
    "roi": Box(0, 0, 699, 1000),
    "base": (44, 64),
    "stages": (stage_of(44, 63, 16, 8),),
    "shard": 64,
    "chunk": 64,
    "seed": 2,
    "model_digest": "0124",
    "precision": "bf16",
    "overlap": "exact",
    "backend": "cuda",
    "executor": "bands",
    "init_digest": "ab",
}
OTHER_STAGE_VALUES = {
    "name": "x",
    "height": 45,
    "width": 62,
    "scale": 2,
    "align": 2,
    "halo": 9,
    "core": 17,
    "sigma": 0.1,
    "seam_error": 0.5,
    "band": 16,
    "blend": 8,
    "ramp": "linear",
    "dither": True,
    "margin": 8,
}


def test_every_field_has_another_value_here():
    assert set(OTHER_VALUES) == {f.name for f in dataclasses.fields(Plan)}
    assert set(OTHER_STAGE_VALUES) == {f.name for f in dataclasses.fields(StagePlan)}


@pytest.mark.parametrize("field", OTHER_VALUES)
def test_digest_and_differences_see_every_field(field):
    plan = plan_of()
    other = dataclasses.replace(plan, **{field: OTHER_VALUES[field]})
    assert other.digest != plan.digest
    (line,) = plan.differences(other.to_json())
    assert line.startswith(f"{field}: ")
    assert len(line) < 200


@pytest.mark.parametrize("field", OTHER_STAGE_VALUES)
def test_digest_sees_every_field_of_a_stage(field):
    plan = plan_of()
    first = dataclasses.replace(plan.stages[0], **{field: OTHER_STAGE_VALUES[field]})
    assert dataclasses.replace(plan, stages=(first, *plan.stages[1:])).digest != plan.digest


def test_plans_made_alike_are_equal_and_survive_json():
    assert plan_of() == plan_of()
    assert plan_of().digest == plan_of().digest
    stored = json.loads(json.dumps(plan_of(roi=ROI).to_json()))
    assert stored == plan_of(roi=ROI).to_json()
    assert plan_of(roi=ROI).differences(stored) == []


def test_the_digest_is_the_same_in_every_process_and_version():
    """A stored plan names its scratch folder by this: a change here must be a decision."""
    assert plan_of().digest[:16] == "01e4fea4ffaff458"


def test_differences_name_both_values():
    stored = plan_of().to_json() | {"seed": 9}
    assert plan_of().differences(stored) == ["seed: 9 there, 1 here"]
    assert plan_of().differences({}) != []


@pytest.mark.parametrize(
    "tile",
    [2, 4, 16, 30, 64, 254, 256, 258, 510, 512, 514, 768, 1024, 2048, 2050, 2084, 4096, 4100, 4132, 6144, 8192, 16384],
)
def test_shards_divide_tiles_and_are_even(tile):
    shard, chunk = shard_of(tile)
    assert tile % shard == 0
    assert shard % chunk == 0
    assert shard % 2 == 0
    # A shard's memory and a partial read stay bounded: only tiles without a suitable divisor are kept whole.
    assert shard <= MAX_SHARD or not any(tile % d == 0 for d in range(256, MAX_SHARD + 1, 2))
    assert chunk <= MAX_CHUNK or not any(shard % d == 0 for d in range(64, MAX_CHUNK + 1))


@pytest.mark.parametrize(("tile", "shard"), [(4096, 2048), (2048, 2048), (1024, 1024), (8192, 2048), (6144, 2048)])
def test_shards_are_as_large_as_allowed(tile, shard):
    assert shard_of(tile) == (shard, 512)


@pytest.mark.parametrize("tile", [4132, 2084, 1028, 4100, 524])
def test_chunks_never_shrink_to_a_few_pixels(tile):
    """Tiles of a large prime factor: a chunk of 2 would make millions of entries in the index of every shard."""
    assert shard_of(tile)[1] >= 64
