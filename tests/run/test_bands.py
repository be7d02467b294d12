"""Bands through ``Job``: the pixels of tiles, whatever stops or cuts them, and when they are chosen."""

import gc
import random
import re
from dataclasses import replace
from types import SimpleNamespace
from weakref import WeakSet

import numpy as np
import pytest
import torch
import zarr
from PIL import Image
from safetensors.torch import save_file
from support.plans import bands_of
from support.stores import attributes, files, pixels, shards
from torch import nn

from engine.archs.esrgan import RRDBNet
from engine.bands.graph import read_graph
from engine.bands.stream import RowStream
from engine.errors import BudgetError, RenderError, ResumeError, UsageError
from engine.geometry import Box
from engine.io.zarr_store import ZarrSink, halve
from engine.job import Job
from engine.model.bundle import load
from engine.plan import strips as bands
from engine.plan.measured import BandCost, Footprint
from engine.plan.request import Request
from engine.probe import profiles as probe
from engine.run import bands as executor
from engine.run.stage import Stage

SMALL = Request(size=(192, 256), stages=2, overlap="exact", executor="bands", precision="fp32")
MODELS = ["rrdb", "swinir", "noisy"]


@pytest.fixture
def small_shards(monkeypatch):
    """A single strip of these small images has many shards, too."""
    monkeypatch.setattr(bands, "SHARD", 64)
    monkeypatch.setattr(bands, "CHUNK", 64)


def render(model, request, folder, resume=False, on_rows=lambda stage, pixels: None):
    """Render to ``folder``/out.zarr: the job, and the boxes in the order in which they were written."""
    job = Job.prepare(model, request, folder / "out.zarr")
    return job, [done.box for done in job.run(job.open_sink(resume=resume, overwrite=False), on_rows)]


def picture_of(model, request, folder):
    return pixels(render(model, request, folder)[0].out)


def assert_same_but_for_rounding_ties(a, b):
    """Sums in another order: a value that lies between two levels may go to either."""
    difference = np.abs(a.astype(int) - b.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).sum() <= 1e-4 * difference.size


# The pixels of tiles


@pytest.mark.parametrize("size", [(192, 256), (187, 251)])
@pytest.mark.parametrize("name", MODELS)
def test_bands_equal_tiles(tmp_path, models, name, size):
    request = replace(SMALL, size=size, seed=3)
    mine = picture_of(models[name], request, tmp_path / "bands")
    tiled = picture_of(models[name], replace(request, executor="tiles", tile=24), tmp_path / "tiles")
    assert mine.std() > 10
    assert_same_but_for_rounding_ties(mine, tiled)


@pytest.mark.parametrize("name", MODELS)
def test_strips_equal_one_strip(tmp_path, models, name):
    request = replace(SMALL, size=(60, 400))
    one = picture_of(models[name], request, tmp_path / "one")
    for tile, strips in ((64, 2), (37, 3), (9, 12)):
        job, _ = render(models[name], replace(request, tile=tile), tmp_path / str(tile))
        step = -(-tile // job.stages[-1].align) * job.stages[-1].align  # a strip is rounded to windows, as a tile is
        assert len(list(job.plan.column_strips())) == (strips if step == tile else -(-100 // step))
        assert job.seam_error == 0
        assert_same_but_for_rounding_ties(pixels(job.out), one)


@pytest.mark.parametrize("name", ["rrdb", "swinir"])
def test_strips_with_a_measured_halo_leave_at_most_the_promised_error(tmp_path, models, name):
    measured = models[name].with_profiles(
        probe.measure_profiles(models[name], None, torch.device("cpu"), lambda _: None)
    )
    one = picture_of(models[name], SMALL, tmp_path / "one").astype(int)
    for overlap in ("auto", "8"):
        job, _ = render(measured, replace(SMALL, overlap=overlap, tile=16), tmp_path / overlap)
        assert job.plan.stages[-1].halo < job.stages[-1].radius
        assert job.seam_error > 0
        assert overlap == "8" or job.seam_error <= SMALL.seam_tolerance
        largest = np.abs(pixels(job.out).astype(int) - one).max()
        assert 0 < largest <= 2 * len(job.stages) * (1 + job.seam_error)


def test_strips_with_too_small_a_halo_are_not_called_exact(tmp_path, models):
    """Two strips of which each reads nearly all: a tile of that shape would hold the whole image, a strip does not."""
    request = replace(SMALL, size=(64, 64), stages=1, overlap="2", tile=12)
    job, _ = render(models["rrdb"], request, tmp_path / "strips")
    assert job.seam_error is None
    one = picture_of(models["rrdb"], replace(request, tile=None), tmp_path / "one")
    assert np.abs(pixels(job.out).astype(int) - one).max() > 2


@pytest.mark.parametrize("tile", [None, 5])
@pytest.mark.parametrize("scale", [1, 2])
def test_networks_that_fold_pixels_first(tmp_path, picture, scale, tile):
    """Their first operation makes less than a row of a row; and an odd strip must leave the pyramid on whole pixels."""
    network = RRDBNet(channels=16, blocks=1, growth=8, scale=scale)
    torch.nn.init.constant_(network.conv_last.bias, 0.5)
    save_file(network.state_dict(), tmp_path / "folding.safetensors")
    Image.fromarray((picture(60, 50).permute(1, 2, 0).numpy() * 255).astype(np.uint8)).save(tmp_path / "picture.png")
    request = Request(init=tmp_path / "picture.png", overlap="exact", precision="fp32", executor="bands", tile=tile)
    job, _ = render(load(tmp_path / "folding.safetensors"), request, tmp_path)
    levels = [pixels(job.out, level) for level in range(len(job.plan.pyramid))]
    assert len(levels) > 1 or tile is None
    assert all(np.array_equal(smaller, halve(larger)) for larger, smaller in zip(levels, levels[1:], strict=False))


def test_strips_of_two_widths_take_turns_with_the_memory(tmp_path, models, monkeypatch):
    alive, most = WeakSet(), []

    class Counted(RowStream):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            alive.add(self)
            most.append(len(alive))

    monkeypatch.setattr("engine.run.rows.RowStream", Counted)
    job, _ = render(models["rrdb"], replace(SMALL, tile=8, overlap="4"), tmp_path)
    assert len(most) > len(job.stages)
    assert max(most) == len(job.stages)


def test_a_render_that_is_done_holds_no_memory(tmp_path, models, monkeypatch):
    """At once, not at the next collection of garbage: many images may be rendered one after the other (--count)."""
    alive, make = WeakSet(), RowStream.__init__

    def counted(self, *args):
        make(self, *args)
        alive.add(self)
        for segment in self._segments:
            alive.add(segment)

    monkeypatch.setattr(RowStream, "__init__", counted)
    gc.collect()
    gc.disable()
    try:
        render(models["rrdb"], replace(SMALL, size=(640, 64)), tmp_path)
        assert not list(alive)
    finally:
        gc.enable()


def test_a_store_of_bands_is_refused_when_the_network_cannot_be_streamed(tmp_path, models, monkeypatch):
    job = Job.prepare(models["rrdb"], SMALL, tmp_path / "out.zarr")
    job.open_sink(resume=False, overwrite=False)

    def refuse(_stage):
        raise UsageError("cannot be streamed")

    monkeypatch.setattr(Stage, "graph", property(refuse))
    with pytest.raises(ResumeError, match='executor: "bands" there, "tiles" here'):
        Job.prepare(models["rrdb"], replace(SMALL, executor="auto"), job.out).open_sink(resume=True, overwrite=False)


def test_a_stop_keeps_the_rows_that_are_computed(tmp_path, models, small_shards):
    """Whoever stops after a row of shards has the next one written, too: its rows were there already."""
    job = Job.prepare(models["rrdb"], SMALL, tmp_path / "out.zarr")
    work = job.run(job.open_sink(resume=False, overwrite=False))
    next(work)
    work.close()
    assert shards(job.out, 0) == 2 * (256 // 64)


@pytest.mark.parametrize("tile", [None, 16])
def test_chained_stages_leave_nothing_on_the_disk(tmp_path, models, tile):
    request = replace(SMALL, tile=tile)
    job = Job.prepare(models["noisy"], request, tmp_path / "out.zarr")
    assert job.projection.scratch == 0
    for _ in job.run(job.open_sink(resume=False, overwrite=False)):
        assert [path.name for path in tmp_path.iterdir()] == ["out.zarr"]


# Stopped and resumed


def lose(store, chance, level_0):
    """Delete these shards and some of the pyramid, as if a render had been killed before it wrote them."""
    for row, column in level_0:
        (store / "0" / "c" / "0" / str(row) / str(column)).unlink()
    for level in range(1, 9):
        for shard in list(store.glob(f"{level}/c/0/*/*")):
            if chance.random() < 0.5:
                shard.unlink()
    group = zarr.open_group(store, mode="r+")
    group.attrs["ourgan"] = {**group.attrs["ourgan"], "complete": False}


@pytest.mark.parametrize(
    ("name", "tile"), [("rrdb", None), ("noisy", None), ("swinir", None), ("swinir", 16), ("noisy", 24)]
)
def test_a_store_with_gaps_is_filled_to_the_same_bits(tmp_path, models, small_shards, name, tile):
    request = replace(SMALL, size=(310, 180), tile=tile, overlap="8")
    job, boxes = render(models[name], request, tmp_path)
    expected = files(tmp_path)
    chance, indices = random.Random(name), list(job.plan.grid().indices())
    rows, columns = (1 + max(index[axis] for index in indices) for axis in (0, 1))
    assert rows >= 4
    gaps = {
        "one in the middle": [(rows // 2, columns // 2)],
        "a column of shards": [(row, columns - 1) for row in range(rows)],
        "a row of shards, and the last": [(rows - 1, columns - 1), *((rows - 3, column) for column in range(columns))],
        "at random": chance.sample(indices, len(indices) // 3),
        "nothing but the first": indices[1:],
    }
    for label, gone in gaps.items():
        lose(tmp_path / "out.zarr", chance, gone)
        lost = {job.plan.grid().box(*index) for index in gone}
        _, again = render(models[name], request, tmp_path, resume=True)
        assert again == [box for box in boxes if any(box.clip(shard).area for shard in lost)], label
        assert files(tmp_path) == expected, label


@pytest.mark.parametrize("writes", [1, 5])
def test_a_sink_that_fails_is_resumed_to_the_same_bits(tmp_path, models, monkeypatch, writes):
    """The disk is full for a while. What was computed meanwhile is computed again."""
    request = replace(SMALL, tile=16)
    render(models["noisy"], request, tmp_path / "expected")
    write, count = ZarrSink.write, 0

    def failing(*arguments):
        nonlocal count
        count += 1
        if count == writes:
            raise OSError(28, "No space left on device")
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ZarrSink, "write", failing)
        with pytest.raises(OSError, match="No space"):
            render(models["noisy"], request, tmp_path / "out")
    assert count == writes  # the first failure is the last write
    assert shards(tmp_path / "out" / "out.zarr", 0) == writes - 1
    render(models["noisy"], request, tmp_path / "out", resume=True)
    assert files(tmp_path / "out") == files(tmp_path / "expected")


@pytest.mark.parametrize(
    ("tile", "stage", "row", "value"),
    [(None, 1, 40, torch.nan), (None, 2, 150, -torch.inf), (16, 1, 40, torch.inf), (16, 2, 150, torch.nan)],
)
def test_rows_with_nan_are_never_written(tmp_path, models, monkeypatch, small_shards, tile, stage, row, value):
    """One value in the middle of a late band: named by its rows, which are missing, and the rows above are there."""
    request = replace(SMALL, tile=tile)
    job, _ = render(models["noisy"], request, tmp_path / "expected")
    push, made = Stage.push, []

    def poisoned(self, *arguments):
        for y, rows in push(self, *arguments):
            if made.index(self) == stage - 1 and y <= row < y + rows.shape[2]:
                rows = rows.clone()
                rows[0, 1, row - y, 20] = value
            yield y, rows

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "push", poisoned)
        failing = Job.prepare(models["noisy"], request, tmp_path / "out" / "out.zarr")
        made.extend(failing.stages)
        words = rf"step {stage + 1}: 1 NaN or infinite values in rows \d+ to \d+; the rows were not written; .*fp32"
        with pytest.raises(RenderError, match=words) as caught:
            for _ in failing.run(failing.open_sink(resume=False, overwrite=False)):
                pass
    first, last = (int(word) for word in re.findall(r"rows (\d+) to (\d+)", str(caught.value))[0])
    assert first <= row <= last < first + 64
    found = files(tmp_path / "out")
    there = {name for name, content in found.items() if name.startswith("out.zarr/0/c/0/") and content}
    whole = files(tmp_path / "expected")
    assert all(found[name] == whole[name] for name in there)
    output_row = row * (4 if stage == 1 else 1)
    written = {int(name.split("/")[4]) for name in there}
    assert written <= set(range(output_row // 64))
    if stage == 2:
        assert written == set(range(output_row // 64))  # all that was finished before
    assert attributes(tmp_path / "out" / "out.zarr")["complete"] is False
    render(models["noisy"], request, tmp_path / "out", resume=True)
    assert files(tmp_path / "out") == whole


class Rows:
    """A chain whose pixels say where they come from, with a record of the streams that were begun."""

    def __init__(self, height, block):
        self.height, self.block, self.begun = height, block, []

    def __call__(self, columns):
        self.columns = columns
        return self

    def rows(self, first):
        columns = self.columns
        self.begun.append((*columns, first))
        for top in range(first, self.height, self.block):
            y = torch.arange(top, min(top + self.block, self.height))
            yield (y[:, None] * 1000 + torch.arange(*columns)).repeat(3, 1, 1)


class Record:
    """A sink that lacks these boxes."""

    def __init__(self, boxes):
        self.boxes, self.written = boxes, {}

    def missing(self):
        return iter(self.boxes)

    def write(self, box, values):
        self.written[box] = values


@pytest.mark.parametrize("roi", [None, Box(13, 70, 300, 411)])
@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_the_executor_begins_a_stream_after_every_gap_and_at_every_strip(roi, block):
    plan = bands_of((310, 420), cores=(8, 16), roi=roi)
    boxes = list(plan.writes())
    missing = [box for i, box in enumerate(boxes) if i not in (0, 3, 4, 8)]
    sink, chain = Record(missing), Rows(310, block)
    done = [d.box for d in executor.run(SimpleNamespace(plan=plan, rows=chain), sink)]
    assert done == missing == list(sink.written)
    for box, values in sink.written.items():
        y, x = (torch.arange(*span) for span in ((box.y0, box.y1), (box.x0, box.x1)))
        expected = (y[:, None] + plan.roi.y0) * 1000 + x + plan.roi.x0
        np.testing.assert_array_equal(values, expected.repeat(3, 1, 1))
    follows = [b for a, b in zip([None, *missing], missing, strict=False) if a is None or (a.x0, a.y1) != (b.x0, b.y0)]
    canvas = [box.shift(plan.roi.y0, plan.roi.x0) for box in follows]
    assert chain.begun == [(box.x0, box.x1, box.y0) for box in canvas]


# Which executor


@pytest.mark.parametrize("seconds", [1e-8, 1e-4])
def test_auto_takes_bands_whatever_was_measured_of_their_speed(tmp_path, models, monkeypatch, seconds):
    """Speeds that were measured while the machine was busy must not cost ten times the memory."""
    monkeypatch.setattr("engine.probe.footprint.stage_footprint", lambda *_: Footprint(0, 1000.0, 1e-6))
    monkeypatch.setattr("engine.probe.footprint.band_cost", lambda *_: BandCost(16, 1000.0, seconds))
    job = Job.prepare(models["rrdb"], replace(SMALL, executor="auto"), tmp_path / "out.zarr")
    assert job.plan.executor == "bands"
    asked = Job.prepare(models["rrdb"], SMALL, tmp_path / "out.zarr")
    assert job.plan == asked.plan
    assert (job.projection.lr_pixels, job.projection.host_parts) == (
        asked.projection.lr_pixels,
        asked.projection.host_parts,
    )


def test_a_tile_speaks_of_tiles_unless_bands_are_asked_for(tmp_path, models, monkeypatch):
    monkeypatch.setattr("engine.probe.footprint.band_cost", lambda *_: BandCost(16, 1000.0, 1e-12))
    for asked, chosen in (("auto", "tiles"), ("tiles", "tiles"), ("bands", "bands")):
        job = Job.prepare(models["rrdb"], replace(SMALL, executor=asked, tile=16), tmp_path / "out.zarr")
        assert job.plan.executor == chosen
        assert job.plan.stages[-1].tile == 16


def test_what_does_not_fit_in_bands_is_rendered_in_tiles(tmp_path, models, monkeypatch):
    monkeypatch.setattr("engine.probe.footprint.band_cost", lambda *_: BandCost(16, 1e12, 1e-12))
    assert Job.prepare(models["rrdb"], replace(SMALL, executor="auto"), tmp_path / "out.zarr").plan.executor == "tiles"
    with pytest.raises(BudgetError, match=r"the narrowest strip of bands .* or use executor='tiles'"):
        Job.prepare(models["rrdb"], SMALL, tmp_path / "out.zarr")


def test_a_network_that_cannot_be_streamed_is_rendered_in_tiles(tmp_path, models, monkeypatch):
    """A network that pools the whole picture."""
    pooled = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 3, 1))
    monkeypatch.setattr(Stage, "graph", property(lambda self: read_graph(pooled, 1)))
    job, _ = render(models["rrdb"], replace(SMALL, executor="auto", overlap="4"), tmp_path)
    assert job.plan.executor == "tiles"
    assert attributes(job.out)["complete"]
    with pytest.raises(UsageError, match=r"AdaptiveAvgPool2d \(_1\): cannot be streamed in bands .*executor=.tiles"):
        Job.prepare(models["rrdb"], SMALL, tmp_path / "other.zarr")
    assert [path.name for path in tmp_path.iterdir()] == ["out.zarr"]


@pytest.mark.parametrize("tile", [None, 24])
@pytest.mark.parametrize("size", [(192, 256), (187, 251), (1, 1)])
@pytest.mark.parametrize("name", ["rrdb", "swinir"])
def test_the_projected_pixels_are_those_that_are_reported(tmp_path, models, name, size, tile):
    """To the pixel where the canvas is the last stage's whole frame; a cropped one may end within a band."""
    ran = [0, 0]

    def on_rows(stage, count):
        ran[stage] += count

    job, _ = render(models[name], replace(SMALL, size=size, tile=tile, overlap="8"), tmp_path, on_rows=on_rows)
    reads = [job.plan.input_columns(strip) for strip in job.plan.column_strips()]
    columns = [sum(r[i][1] - r[i][0] for r in reads) for i in range(len(job.plan.stages))]
    for stage, width, projected, reported in zip(job.plan.stages, columns, job.projection.lr_pixels, ran, strict=True):
        assert abs(projected - reported) <= stage.band * width
    if size[0] % 16 == 0:
        frame = tuple(s.height * width for s, width in zip(job.plan.stages, columns, strict=True))
        assert tuple(ran) == job.projection.lr_pixels == frame
