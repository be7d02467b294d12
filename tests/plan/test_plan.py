"""Plans: input and output of tiles, boxes that are written, and the stored form."""

import json
import math
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.plans import bands_of, plan_of, stage_of

from engine.errors import AlignmentError, UsageError
from engine.geometry import Box
from engine.pixels import PixelFormat
from engine.plan.plan import Plan, executor_of
from engine.plan.sides import MAX_CHUNK, MAX_SHARD, shard_of
from engine.plan.stage import StagePlan

quick = settings(deadline=None, derandomize=True, max_examples=50)

NAMED = {
    "smaller than a tile": stage_of(10, 7, 64, 16),
    "smaller than a window": stage_of(5, 3, 8, 8, align=8),
    "one pixel": stage_of(1, 1, 16, 0),
    "whole tiles": stage_of(64, 128, 32, 8, align=8),
    "one pixel more": stage_of(65, 129, 32, 8, align=8),
    "one pixel less": stage_of(63, 127, 32, 8, align=8),
    "flat": stage_of(9, 500, 16, 5),
    "no halo": stage_of(31, 33, 8, 0, align=8),
    "halo larger than the tile": stage_of(200, 100, 8, 40, align=8),
    "blended": stage_of(100, 130, 24, 8, align=8, blend=8),
    "blended as wide as the tile": stage_of(70, 65, 16, 4, blend=16),
    "blended without a halo": stage_of(33, 50, 16, 0, blend=5),
    "flat tiles": stage_of(100, 130, (8, 40), 4),
    "two rows of tiles": stage_of(64, 130, (32, 24), 8, align=8),
    "two columns of tiles within a margin": stage_of(100, 130, (24, 56), 16, align=8, margin=8),
    "blended in two columns": stage_of(100, 64, (16, 32), 8, align=8, blend=8),
    "margin wider than the halo": stage_of(100, 130, 16, 4, margin=12),
    "margin narrower than the halo": stage_of(99, 131, 24, 16, align=8, margin=8),
    "margin, and smaller than a tile": stage_of(70, 90, 64, 8, margin=16),
    "margin around a pixel": stage_of(33, 33, 16, 8, margin=16),
    "blended within a margin": stage_of(100, 130, 24, 8, align=8, blend=8, margin=16),
}


@st.composite
def cuts(draw):
    """Any cut into at most 8 x 8 tiles, often with a cross-fade or a margin."""
    align = draw(st.sampled_from([1, 2, 8]))
    rows, columns = tile = [align * draw(st.integers(1, 48 // align)) for _ in range(2)]
    height, width = (draw(st.integers(1, min(150, 8 * side))) for side in tile)
    return stage_of(
        height, width, (rows, columns), align * draw(st.integers(0, 24 // align)), align,
        scale=draw(st.sampled_from([1, 2, 4])),
        blend=align * draw(st.integers(0, min(tile) // align)),
        margin=align * draw(st.integers(0, (min(height, width) - 1) // 2 // align)),
    )  # fmt: skip


def over_cuts(test):
    """Run a test of one cut on every named cut and on random ones."""
    test = given(cuts())(test)
    for cut in NAMED.values():
        test = example(cut)(test)
    return quick(test)


def tiles_of(cut):
    return [cut.tile_at(*index) for index in cut.grid.indices()]


def reflected(size, padded):
    """Source coordinate of every row or column of the padded frame."""
    return np.pad(np.arange(size), (0, padded - size), mode="reflect")


# Tiles


@over_cuts
def test_padding_ends_at_the_next_window(cut):
    for padded, size in zip(cut.padded, (cut.height, cut.width), strict=True):
        assert padded % cut.align == 0
        assert 0 <= padded - size < cut.align


@over_cuts
def test_tiles_read_equal_shapes_of_whole_windows(cut):
    frame = Box(0, 0, *cut.padded)
    for tile in tiles_of(cut):
        assert tile.read.shape == cut.tile_shape
        assert frame.contains(tile.read)
        assert {v % cut.align for v in (tile.read.y0, tile.read.x0, *tile.read.shape)} == {0}


@over_cuts
def test_cells_cover_the_output_once(cut):
    counts = np.zeros((cut.grid.height, cut.grid.width), np.uint8)
    for tile in tiles_of(cut):
        counts[tile.cell.slices] += 1
    assert (counts == 1).all()


@over_cuts
def test_crop_is_the_output_within_the_network_output(cut):
    network_output = Box(0, 0, *(n * cut.scale for n in cut.tile_shape))
    for tile in tiles_of(cut):
        assert network_output.contains(tile.crop)
        assert tile.crop.shape == tile.output.shape
        y, x = (n - cut.margin for n in (tile.read.y0, tile.read.x0))
        assert tile.crop.shift(y * cut.scale, x * cut.scale) == tile.output


@over_cuts
def test_blend_reaches_the_next_tiles(cut):
    """A tile's output grows by the blend width, into exactly the cells that ``blended_into`` relates to it."""
    border, image = cut.blend * cut.scale, cut.grid.bounds
    tiles = {(t.row, t.column): t for t in tiles_of(cut)}
    for index, tile in tiles.items():
        grown = Box(tile.cell.y0, tile.cell.x0, tile.cell.y1 + border, tile.cell.x1 + border)
        assert tile.output == grown.clip(image)
        met = {other for other, t in tiles.items() if other != index and t.output.clip(tile.cell).area}
        assert met == set(cut.blended_into(*index))


@over_cuts
def test_inner_sides_have_the_whole_halo(cut):
    """No halo is needed at the frame's border: the network pads there as it does on the whole image."""
    height, width = cut.padded
    for tile in tiles_of(cut):
        output, read = tile.output.cover(cut.scale).shift(cut.margin, cut.margin), tile.read
        for context, at_border in (
            (output.y0 - read.y0, read.y0 == 0),
            (output.x0 - read.x0, read.x0 == 0),
            (read.y1 - output.y1, read.y1 == height),
            (read.x1 - output.x1, read.x1 == width),
        ):
            assert context >= cut.halo or at_border


@over_cuts
def test_source_box_holds_the_reflected_pixels(cut):
    image = Box(0, 0, cut.height, cut.width)
    rows, columns = (reflected(*n) for n in zip((cut.height, cut.width), cut.padded, strict=True))
    for tile in tiles_of(cut):
        source = cut.source_box(tile.read)
        assert image.contains(source)
        assert source.contains(tile.read.clip(image))
        assert source.y0 <= rows[tile.read.y0 : tile.read.y1].min()
        assert source.x0 <= columns[tile.read.x0 : tile.read.x1].min()


@over_cuts
def test_whole_width_strip_has_no_edge(cut):
    """Also where the image was cropped by up to the margin. The edges of other strips have their halo."""
    width, scale, frame = cut.grid.width, cut.scale, cut.padded[1]
    for cropped in (0, min(width - 1, cut.margin * scale)):
        assert cut.input_columns(0, width - cropped) == (0, frame)
    for x0, x1 in ((width // 3, width // 3 + 1), (0, width // 2 + 1), (width // 2, width)):
        first, last = cut.input_columns(x0, x1)
        assert first == 0 or first <= cut.margin + x0 // scale - cut.halo
        assert last == frame or last >= cut.margin + -(-x1 // scale) + cut.halo
        assert first % cut.align == last % cut.align == 0


@quick
@given(st.data())
def test_tiles_of_a_box_meet_it(data):
    cut = data.draw(st.sampled_from(list(NAMED.values())) | cuts())
    y, x = (sorted(data.draw(st.tuples(*[st.integers(0, n)] * 2))) for n in cut.grid.bounds.shape)
    box = Box(y[0], x[0], y[1], x[1])
    assert list(cut.tiles(box)) == [t for t in tiles_of(cut) if t.cell.clip(box).area]


@over_cuts
def test_aligned_cuts_pass_the_check(cut):
    cut.check()


MISFITS = [
    ({"tile": 20}, AlignmentError, "step 2: tile is not a multiple of the window (20, window 8); use 24"),
    ({"halo": 9}, AlignmentError, "step 2: halo is not a multiple of the window (9, window 8); use 16"),
    ({"blend": 12}, AlignmentError, "step 2: cross-fade is not a multiple of the window (12, window 8); use 16"),
    ({"margin": 4}, AlignmentError, "step 2: margin is not a multiple of the window (4, window 8); use 8"),
    ({"band": 12}, AlignmentError, "step 2: band is not a multiple of the window (12, window 8); use 16"),
    ({"band": 16, "halo": 9}, AlignmentError, "step 2: halo is not a multiple of the window (9, window 8); use 16"),
    (
        {"width": 2**30 + 1},
        UsageError,
        "step 2: a side of its input is too long (1073741832 pixels, limit 1073741824); use a smaller image",
    ),
    ({"blend": 24}, UsageError, "step 2: cross-fade is wider than the tile (24, tile 16); use blend=16 or less"),
]


def test_misaligned_cuts_are_refused():
    cut = stage_of(100, 100, 16, 8, align=8)
    replace(cut, width=2**30).check()
    for changes, kind, message in MISFITS:
        with pytest.raises(kind) as caught:
            replace(cut, **changes).check()
        assert str(caught.value) == message, changes
    with pytest.raises(UsageError, match="wider than the tile"):
        stage_of(100, 100, 16, 8, blend=17).check()


def test_strips_may_have_any_width():
    stage_of(100, 100, 20, 8, align=8, band=16).check()


# Whole plans


ROI = Box(130, 301, 431, 777)


@st.composite
def regions(draw, size=(700, 1000)):
    """Any region inside an image of this size, or None."""
    if draw(st.booleans()):
        return None
    y, x = (sorted(draw(st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True))) for n in size)
    return Box(y[0], x[0], y[1], x[1])


@quick
@given(regions(), st.sampled_from([32, (24, 40)]))
@example(ROI, 32)
@example(None, (40, 24))
def test_writes_are_whole_shards_and_cover_once(roi, core):
    plan = plan_of(roi=roi, cores=(16, core))
    counts = np.zeros(plan.size, np.uint8)
    for box in plan.writes():
        counts[box.slices] += 1
        height, width = plan.shard
        assert box.y0 % height == box.x0 % width == 0
        assert box.y1 % height == 0 or box.y1 == plan.size[0]
        assert box.x1 % width == 0 or box.x1 == plan.size[1]
    assert (counts == 1).all()


def test_whole_image_writes_are_tiles():
    plan = plan_of()
    bounds = Box(0, 0, *plan.size)
    cells = (t.cell.clip(bounds) for t in tiles_of(plan.stages[-1]))
    assert list(plan.writes()) == [box for box in cells if box.area]


def test_paper_canvases_crop_the_last_stage():
    for size in [(10912, 16384), (9152, 16384), (8640, 16384)]:
        plan = plan_of(size, cores=(64, 128, 256), halos=(32, 32, 32), scales=(4, 4, 4), align=8)
        assert plan.base[1] == 256
        last = plan.stages[-1].grid
        assert last.bounds.contains(Box(0, 0, *size))
        assert last.height - size[0] < 64
        assert sum(box.area for box in plan.writes()) == math.prod(size)


@quick
@given(regions(), st.sampled_from([(8, 4), (0, 0)]))
@example(None, (8, 4))
@example(ROI, (0, 0))
@example(Box(699, 999, 700, 1000), (8, 4))
@example(Box(0, 0, 1, 1), (8, 4))
def test_tiles_to_run_counts_sources(roi, halos):
    plan = plan_of(roi=roi, halos=halos)
    first, last = set(), set()
    for box in plan.writes():
        for tile in plan.stages[1].tiles(box.shift(plan.roi.y0, plan.roi.x0)):
            last.add((tile.row, tile.column))
            first |= {(t.row, t.column) for t in plan.stages[0].tiles(plan.stages[1].source_box(tile.read))}
    assert plan.tiles_to_run(list(plan.writes())) == (len(first), len(last))


def test_tiles_are_counted_without_a_list():
    """Also with a margin, where the first tile need not begin in the corner of its source."""
    for margin in (0, 8, 40):
        for cores in ((16, 32), (8, 8)):
            plan = plan_of((256, 320), base=(16 + margin // 2, 20 + margin // 2), cores=cores, halos=(2, 2))
            plan = replace(plan, stages=(*plan.stages[:-1], replace(plan.stages[-1], margin=margin)))
            assert plan.is_whole
            assert plan.tiles_to_run() == plan.tiles_to_run(list(plan.writes())), (margin, cores)


def test_regions_run_fewer_tiles():
    whole, part = plan_of(), plan_of(roi=Box(0, 0, 100, 100))
    # The frame of 704 x 1008 is cropped to 700 x 1000, but every cell of it is met.
    assert whole.tiles_to_run(list(whole.writes())) == tuple(len(s.grid) for s in whole.stages)
    assert part.tiles_to_run(list(part.writes())) == (1, 1)
    assert whole.tiles_to_run([]) == (0, 0)


def test_margin_of_the_base_image():
    plan = plan_of()
    first, last = plan.stages
    assert plan.margin == 0
    assert replace(plan, stages=(first, replace(last, margin=32))).margin == 8
    assert replace(plan, stages=(replace(first, margin=4), replace(last, margin=32))).margin == 12


def test_pyramid_halves_until_one_chunk():
    plan = plan_of((1001, 701), shard=128, chunk=64)
    assert plan.pyramid == ((1001, 701), (501, 351), (251, 176), (126, 88), (63, 44))
    assert plan_of((60, 64), chunk=64).pyramid == ((60, 64),)
    assert [len(plan.grid(i)) for i in range(5)] == [48, 12, 4, 1, 1]


# Shards


@quick
@given(st.integers(1, 8192).map(lambda half: 2 * half))
def test_shards_divide_tiles(tile):
    shard, chunk = shard_of(tile)
    assert tile % shard == shard % chunk == shard % 2 == 0
    # Memory of a shard and a partial read stay bounded: only tiles without a suitable divisor are kept whole.
    assert shard <= MAX_SHARD or not any(tile % d == 0 for d in range(256, MAX_SHARD + 1, 2))
    assert chunk <= MAX_CHUNK or not any(shard % d == 0 for d in range(64, MAX_CHUNK + 1))
    assert chunk >= min(64, shard)


SHARDS = {1024: (1024, 512), 2048: (2048, 512), 4096: (2048, 512), 6144: (2048, 512), 8192: (2048, 512)}


def test_shards_are_as_large_as_allowed():
    assert {tile: shard_of(tile) for tile in SHARDS} == SHARDS


def test_chunks_are_never_a_few_pixels():
    """A large prime factor must not make millions of chunks in the index of every shard."""
    assert all(shard_of(tile)[1] >= 64 for tile in (4132, 2084, 1028, 4100, 524))


# The stored form

OTHER_VALUES = {
    "canvas": (701, 1000),
    "roi": Box(0, 0, 699, 1000),
    "base": (44, 64),
    "stages": (stage_of(44, 63, 16, 8),),
    "shard": (64, 128),
    "chunk": (64, 32),
    "seed": 2,
    "model_digest": "0124",
    "precision": "bf16",
    "backend": "cuda",
    "executor": "bands",
    "init_digest": "ab",
    "enlarged": (1400, 2000),
    "pixels": PixelFormat(3, 16),
    "profile": "cd",
    "noise_gain": (1.0, 2.0),
}
OTHER_STAGE_VALUES = {
    "step": 4,
    "height": 45,
    "width": 62,
    "scale": 2,
    "align": 2,
    "halo": 9,
    "tile": 17,
    "tile_rows": 18,
    "sigma": 0.1,
    "band": 16,
    "blend": 8,
    "ramp": "linear",
    "statistics": "0123",
    "dither": True,
    "margin": 8,
}
PLAN_KEYS = "canvas roi base stages shard chunk seed model_digest precision backend executor init_digest"
STAGE_KEYS = "name height width scale align halo core sigma band blend ramp dither margin"


def with_old_keys(stored, executor=None):
    """A stored plan as earlier versions wrote it, with measurements and former names of executors."""
    stages = [{**stage, "seam_error": error} for stage, error in zip(stored["stages"], (0.5, None), strict=True)]
    return {**stored, "stages": stages, "overlap": "auto", "executor": executor or stored["executor"]}


def test_every_field_has_another_value():
    assert set(OTHER_VALUES) == {f.name for f in fields(Plan)}
    # ``is_image`` follows from the number of stages. The window of an image that repeats is stored with it alone.
    window = {"period", "start", "context"}
    assert set(OTHER_STAGE_VALUES) == {f.name for f in fields(StagePlan)} - {"is_image"} - window


def test_digest_and_differences_see_every_field():
    plan = plan_of()
    for field, value in OTHER_VALUES.items():
        other = replace(plan, **{field: value})
        assert other.digest != plan.digest, field
        (line,) = plan.differences(other.to_json())
        assert line.startswith("depth: " if field == "pixels" else f"{field}: "), field
        assert len(line) < 200, field


def test_digest_and_differences_see_every_stage_field():
    plan = plan_of()
    for field, value in OTHER_STAGE_VALUES.items():
        other = replace(plan, stages=(replace(plan.stages[0], **{field: value}), plan.stages[1]))
        assert other.digest != plan.digest, field
        (line,) = plan.differences(other.to_json())
        key = {"tile": "core", "tile_rows": "core", "step": "name"}.get(field, field)
        assert line.startswith(f"stages: {key} of step 2 "), field
        assert len(line) < 200, field


def test_equal_plans_have_equal_json():
    assert plan_of() == plan_of()
    assert plan_of().digest == plan_of().digest
    stored = json.loads(json.dumps(plan_of(roi=ROI).to_json()))
    assert stored == plan_of(roi=ROI).to_json()
    assert plan_of(roi=ROI).differences(stored) == []


def test_stored_keys_are_frozen():
    stored = plan_of().to_json()
    assert sorted(stored) == sorted(PLAN_KEYS.split())
    assert [sorted(stage) for stage in stored["stages"]] == [sorted(STAGE_KEYS.split())] * 2
    assert [stage["name"] for stage in stored["stages"]] == ["stage 1", "stage 2"]
    assert [stage["core"] for stage in stored["stages"]] == [16, 32]


def test_digest_is_frozen():
    """A stored plan names its scratch folder by the digest: a change must be a decision."""
    assert plan_of().digest[:16] == "bc403fbf2bc7b70b"


@over_cuts
def test_stage_survives_json(cut):
    cut = replace(cut, step=3, band=16, ramp="linear", dither=True, sigma=0.25)
    stored = json.loads(json.dumps(cut.to_json()))
    assert StagePlan.from_json(stored) == cut
    assert StagePlan.from_json({**stored, "seam_error": 0.5}) == cut
    # ``is_image`` decides no pixel of the stage and is not stored.
    assert replace(cut, is_image=True).to_json() == stored


def test_stages_of_first_versions_are_read():
    """Bands, cross-fades, dither and margins were added later, each with a default."""
    cut = stage_of(44, 63, 16, 8)
    stored = {k: v for k, v in cut.to_json().items() if k not in ("band", "blend", "ramp", "dither", "margin")}
    assert StagePlan.from_json(stored) == cut


def test_damaged_stages_are_refused():
    stored = stage_of(44, 63, 16, 8).to_json()
    damaged = [
        *({k: v for k, v in stored.items() if k != key} for key in ("name", "core", "height", "halo", "sigma")),
        *({**stored, "name": name} for name in ("stage one", "", None, 1.5, [])),
        [],
        None,
        "stage 1",
    ]
    for data in damaged:
        with pytest.raises((KeyError, TypeError, ValueError)):
            StagePlan.from_json(data)


def test_differences_accept_old_plans():
    for plan, executor in ((plan_of(), None), (bands_of(), None), (plan_of(executor="batched"), "stream")):
        stored = with_old_keys(plan.to_json(), executor)
        assert executor_of(stored) == plan.executor
        assert plan.differences(stored) == []
        assert replace(plan, seed=9).differences(stored) == ["seed: 1 there, 9 here"]
    assert plan_of().differences(with_old_keys(plan_of().to_json(), "stream")) == [
        'executor: "batched" there, "tiles" here'
    ]


def test_differences_name_both_values():
    assert plan_of().differences(plan_of().to_json() | {"seed": 9}) == ["seed: 9 there, 1 here"]
    other = plan_of(cores=(16, 64), shard=128, chunk=128).to_json()
    assert plan_of().differences(other) == ["stages: core of step 3 64 there, 32 here"]


def test_differences_report_damaged_plans():
    plan = plan_of()
    stored = plan.to_json()
    first, last = stored["stages"]
    damaged_stages = [None, 5, {}, [], [first], [first, last, last], [first, None], [{}, last], [first, {"core": 32}]]
    # A missing ``init_digest`` is None.
    assert len(plan.differences({})) == len(stored) - 1
    for stages in damaged_stages:
        (line,) = plan.differences({**stored, "stages": stages})
        assert line.startswith("stages: "), stages
        assert len(line) < 200, stages
    for executor in (None, 5, ["tiles"]):
        (line,) = plan.differences({**stored, "executor": executor})
        assert line.startswith("executor: "), executor
