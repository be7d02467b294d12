"""Bands through ``Job``: the pixels of tiles, however they are cut or stopped, and when bands are chosen."""

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
from support.stores import attributes, files, image_files, pixels, shards
from torch import nn

from engine.archs.esrgan import RRDBNet
from engine.bands.graph import read_graph
from engine.bands.segment import SegmentStream
from engine.bands.stream import RowStream
from engine.device.queue import DeviceQueue
from engine.errors import BudgetError, RenderError, ResumeError, UsageError
from engine.geometry import Box
from engine.io.halving import halve
from engine.io.zarr_store import ZarrSink
from engine.job import Job
from engine.model.bundle import load
from engine.plan import strips
from engine.plan.measured import BandCost, Footprint
from engine.plan.request import Request
from engine.probe import profiles
from engine.run import bands
from engine.run.rows import RowBlock
from engine.run.stage import Stage

SMALL = Request(size=(256, 192), stages=2, overlap="exact", executor="bands", precision="fp32")
MODELS = ["rrdb", "swinir", "noisy"]


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of 64 pixels, so that even a single strip of these small images has many."""
    monkeypatch.setattr(strips, "SHARD", 64)
    monkeypatch.setattr(strips, "CHUNK", 64)


def render(model, request, folder, resume=False, on_pixels=lambda position, lr_pixels: None):
    """Render to ``folder``/out.zarr: (job, boxes in the order in which they were written)."""
    job = Job.prepare(model, request, folder / "out.zarr")
    return job, [written.box for written in job.run(job.open_sink(resume=resume, overwrite=False), on_pixels)]


def image_of(model, request, folder):
    return pixels(render(model, request, folder)[0].out)


def assert_equal_to_rounding(a, b):
    """Sums in another order: a value that lies between two levels may go to either."""
    difference = np.abs(a.astype(int) - b.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).sum() <= 1e-4 * difference.size


# The pixels of tiles


@pytest.mark.parametrize("name", MODELS)
def test_bands_equal_tiles(tmp_path, models, name):
    for size in ((256, 192), (251, 187)):
        request = replace(SMALL, size=size, seed=3)
        banded = image_of(models[name], request, tmp_path / f"bands {size}")
        tiled = image_of(models[name], replace(request, executor="tiles", tile=24), tmp_path / f"tiles {size}")
        assert banded.std() > 10
        assert_equal_to_rounding(banded, tiled)


@pytest.mark.parametrize("name", MODELS)
def test_strips_equal_one_strip(tmp_path, models, name):
    request = replace(SMALL, size=(400, 60))
    one = image_of(models[name], request, tmp_path / "one")
    for tile, count in ((64, 2), (37, 3), (9, 12)):
        job, _ = render(models[name], replace(request, tile=tile), tmp_path / str(tile))
        width = -(-tile // job.stages[-1].align) * job.stages[-1].align  # a strip is rounded up to windows, like a tile
        assert len(list(job.plan.column_strips())) == (count if width == tile else -(-100 // width))
        assert job.seam_error == 0
        assert_equal_to_rounding(pixels(job.out), one)


@pytest.mark.parametrize("name", ["rrdb", pytest.param("swinir", marks=pytest.mark.slow)])
def test_strips_with_a_measured_halo_keep_the_promised_error(tmp_path, models, name):
    measured = models[name].with_profiles(profiles.measure_profiles(models[name]))
    one = image_of(models[name], SMALL, tmp_path / "one").astype(int)
    for overlap in ("auto", "8"):
        job, _ = render(measured, replace(SMALL, overlap=overlap, tile=16), tmp_path / overlap)
        assert job.plan.stages[-1].halo < job.stages[-1].radius
        assert job.seam_error > 0
        assert overlap == "8" or job.seam_error <= SMALL.seam_tolerance
        largest = np.abs(pixels(job.out).astype(int) - one).max()
        assert 0 < largest <= 2 * len(job.stages) * (1 + job.seam_error)


def test_strips_with_too_small_a_halo_are_not_exact(tmp_path, models):
    """Two strips that each read nearly all columns: a tile of that shape would hold the whole image, a strip does not."""
    request = replace(SMALL, size=(64, 64), stages=1, overlap="2", tile=12)
    job, _ = render(models["rrdb"], request, tmp_path / "strips")
    assert job.seam_error != 0.0  # None, or measured if another test has measured the model
    one = image_of(models["rrdb"], replace(request, tile=None), tmp_path / "one")
    assert np.abs(pixels(job.out).astype(int) - one).max() > 2


def test_networks_that_fold_pixels_first(tmp_path, picture):
    """Their first operation has less than one row per input row; an odd strip leaves the pyramid on whole pixels."""
    Image.fromarray((picture(60, 50).permute(1, 2, 0).numpy() * 255).astype(np.uint8)).save(tmp_path / "picture.png")
    for scale in (1, 2):
        network = RRDBNet(channels=16, blocks=1, growth=8, scale=scale, fold=4 // scale)
        nn.init.constant_(network.conv_last.bias, 0.5)
        save_file(network.state_dict(), tmp_path / f"x{scale}.safetensors")
        for tile in (None, 5):
            request = replace(SMALL, size=None, stages=None, init=tmp_path / "picture.png", tile=tile)
            job, _ = render(load(tmp_path / f"x{scale}.safetensors"), request, tmp_path / f"x{scale} {tile}")
            levels = [pixels(job.out, level) for level in range(len(job.plan.pyramid))]
            assert len(levels) > 1 or tile is None
            for larger, smaller in zip(levels, levels[1:], strict=False):
                np.testing.assert_array_equal(smaller, halve(larger))


def test_strips_of_two_widths_share_the_memory(tmp_path, models, monkeypatch):
    alive, counts = WeakSet(), []

    class Counted(RowStream):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            alive.add(self)
            counts.append(len(alive))

    monkeypatch.setattr("engine.run.rows.RowStream", Counted)
    job, _ = render(models["rrdb"], replace(SMALL, tile=8, overlap="4"), tmp_path)
    assert len(counts) > len(job.stages)
    assert max(counts) == len(job.stages)


def test_finished_render_holds_no_memory(tmp_path, models, monkeypatch):
    """At once, not after the next garbage collection: --count renders many images one after the other."""
    alive = WeakSet()

    def count(cls):
        make = cls.__init__

        def counted(self, *args, **kwargs):
            make(self, *args, **kwargs)
            alive.add(self)

        monkeypatch.setattr(cls, "__init__", counted)

    count(RowStream)
    count(SegmentStream)
    gc.collect()
    gc.disable()
    try:
        render(models["rrdb"], replace(SMALL, size=(64, 640)), tmp_path)
        assert not list(alive)
    finally:
        gc.enable()


def test_store_of_bands_is_refused_when_the_network_cannot_be_streamed(tmp_path, models, monkeypatch):
    job = Job.prepare(models["rrdb"], SMALL, tmp_path / "out.zarr")
    job.open_sink(resume=False, overwrite=False)

    def refuse(_stage):
        raise UsageError("cannot be streamed")

    monkeypatch.setattr(Stage, "graph", property(refuse))
    with pytest.raises(ResumeError, match='executor: "bands" there, "tiles" here'):
        Job.prepare(models["rrdb"], replace(SMALL, executor="auto"), job.out).open_sink(resume=True, overwrite=False)


def test_stop_keeps_the_computed_rows(tmp_path, models, small_shards):
    """A stop after a row of shards leaves the next row written too: its pixels were computed already."""
    job = Job.prepare(models["rrdb"], SMALL, tmp_path / "out.zarr")
    run = job.run(job.open_sink(resume=False, overwrite=False))
    next(run)
    run.close()
    assert shards(job.out, 0) == 2 * (256 // 64)


def test_no_scratch_on_disk(tmp_path, models):
    for tile in (None, 16):
        folder = tmp_path / str(tile)
        job = Job.prepare(models["noisy"], replace(SMALL, tile=tile), folder / "out.zarr")
        assert job.projection.scratch == 0
        for _ in job.run(job.open_sink(resume=False, overwrite=False)):
            assert [path.name for path in folder.iterdir()] == ["out.zarr"]


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
    ("name", "tile"),
    [("noisy", 24), *(pytest.param(*case, marks=pytest.mark.slow) for case in
                      (("rrdb", None), ("noisy", None), ("swinir", None), ("swinir", 16)))],
)  # fmt: skip
def test_gaps_are_filled_to_the_same_bits(tmp_path, models, small_shards, name, tile):
    request = replace(SMALL, size=(180, 310), tile=tile, overlap="8")
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
        "all but the first": indices[1:],
    }
    for label, lost_indices in gaps.items():
        lose(tmp_path / "out.zarr", chance, lost_indices)
        lost = {job.plan.grid().box(*index) for index in lost_indices}
        _, again = render(models[name], request, tmp_path, resume=True)
        assert again == [box for box in boxes if any(box.clip(shard).area for shard in lost)], label
        assert files(tmp_path) == expected, label


def test_failed_write_is_resumed_to_the_same_bits(tmp_path, models, monkeypatch):
    """A disk that is full for a while: rows computed meanwhile are computed again."""
    request = replace(SMALL, tile=16)
    render(models["noisy"], request, tmp_path / "expected")
    write = ZarrSink.write
    for failing in (1, 5):
        calls = []

        def fail_once(*arguments, failing=failing, calls=calls):
            calls.append(1)
            if len(calls) == failing:
                raise OSError(28, "No space left on device")
            write(*arguments)

        folder = tmp_path / str(failing)
        with monkeypatch.context() as patch:
            patch.setattr(ZarrSink, "write", fail_once)
            with pytest.raises(OSError, match="No space"):
                render(models["noisy"], request, folder)
        assert len(calls) == failing  # the first failure is the last write
        assert shards(folder / "out.zarr", 0) == failing - 1
        render(models["noisy"], request, folder, resume=True)
        assert files(folder) == files(tmp_path / "expected")


@pytest.mark.parametrize(
    ("tile", "stage", "row", "value"),
    [
        (None, 2, 150, -torch.inf),
        (16, 1, 40, torch.nan),
        pytest.param(None, 1, 40, torch.nan, marks=pytest.mark.slow),
        pytest.param(16, 2, 150, torch.inf, marks=pytest.mark.slow),
    ],
)
def test_nonfinite_rows_are_never_written(tmp_path, models, monkeypatch, small_shards, tile, stage, row, value):
    """One value in the middle of a late band: its rows are named and missing, the rows above are written."""
    request = replace(SMALL, tile=tile)
    render(models["noisy"], request, tmp_path / "expected")
    push = Stage.push
    failing = Job.prepare(models["noisy"], request, tmp_path / "out" / "out.zarr")
    stages = failing.stages

    def poisoned(self, *arguments):
        for y, rows in push(self, *arguments):
            if stages.index(self) == stage - 1 and y <= row < y + rows.shape[2]:
                rows = rows.clone()
                rows[0, 1, row - y, 20] = value
            yield y, rows

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "push", poisoned)
        words = rf"step {stage + 1}: 1 NaN or infinite values in rows \d+ to \d+, in fp32; the rows were not written"
        with pytest.raises(RenderError, match=words) as caught:
            for _ in failing.run(failing.open_sink(resume=False, overwrite=False)):
                pass
    first, last = (int(word) for word in re.findall(r"rows (\d+) to (\d+)", str(caught.value))[0])
    assert first <= row <= last < first + 64
    store, whole = files(tmp_path / "out"), files(tmp_path / "expected")
    names = {name for name, content in store.items() if name.startswith("out.zarr/0/c/0/") and content}
    assert all(store[name] == whole[name] for name in names)
    output_row = row * (4 if stage == 1 else 1)
    written = {int(name.split("/")[4]) for name in names}
    assert written <= set(range(output_row // 64))
    if stage == 2:
        assert written == set(range(output_row // 64))  # all rows that were finished before
    assert attributes(tmp_path / "out" / "out.zarr")["complete"] is False
    render(models["noisy"], request, tmp_path / "out", resume=True)
    assert files(tmp_path / "out") == whole


class Rows:
    """A chain whose pixels encode their place, with a record of the streams that were started."""

    def __init__(self, block):
        self.block, self.started = block, []

    def __call__(self, columns, in_fp32):
        self.columns = columns
        return self

    def rows(self, first, last):
        columns = self.columns
        self.started.append((*columns, first, last))
        for top in range(first, last, self.block):
            y = torch.arange(top, min(top + self.block, last))
            yield RowBlock((y[:, None] * 1000 + torch.arange(*columns)).repeat(3, 1, 1))


class Record:
    """A sink that misses these boxes."""

    def __init__(self, boxes):
        self.boxes, self.written = boxes, {}

    def missing(self, writes):
        return iter(self.boxes)

    def write(self, box, values, half):
        self.written[box] = values


def test_stream_starts_after_every_gap_and_at_every_strip():
    for roi in (None, Box(13, 70, 300, 411)):
        plan = bands_of((310, 420), cores=(8, 16), roi=roi)
        missing = [box for i, box in enumerate(plan.writes()) if i not in (0, 3, 4, 8)]
        for block in (1, 7, 64, 1000):
            sink, chain = Record(missing), Rows(block)
            written = [
                w.box
                for w in bands.run(
                    SimpleNamespace(
                        plan=plan, rows=chain, writes=plan.writes(), queue=DeviceQueue(torch.device("cpu"))
                    ),
                    sink,
                )
            ]
            assert written == missing == list(sink.written)
            for box, values in sink.written.items():
                y, x = (torch.arange(*span) for span in ((box.y0, box.y1), (box.x0, box.x1)))
                expected = (y[:, None] + plan.roi.y0) * 1000 + x + plan.roi.x0
                np.testing.assert_array_equal(values, expected.repeat(3, 1, 1))
            runs = []  # of boxes without a gap
            for box in missing:
                if runs and (runs[-1][-1].x0, runs[-1][-1].y1) == (box.x0, box.y0):
                    runs[-1].append(box)
                else:
                    runs.append([box])
            runs = [[box.shift(plan.roi.y0, plan.roi.x0) for box in run] for run in runs]
            assert chain.started == [(run[0].x0, run[0].x1, run[0].y0, run[-1].y1) for run in runs], (roi, block)


# Choice of the executor


def test_auto_takes_bands_at_any_measured_speed(tmp_path, models, monkeypatch):
    """A speed that was measured on a busy machine must not cost ten times the memory."""
    monkeypatch.setattr("engine.probe.footprint.stage_footprint", lambda *_: Footprint(0, 1000.0, 1e-6))
    for seconds in (1e-8, 1e-4):
        monkeypatch.setattr("engine.probe.footprint.band_cost", lambda *_, s=seconds: BandCost(16, 1000.0, s))
        job = Job.prepare(models["rrdb"], replace(SMALL, executor="auto"), tmp_path / "out.zarr")
        by_name = Job.prepare(models["rrdb"], SMALL, tmp_path / "out.zarr")
        assert job.plan == by_name.plan
        assert job.plan.executor == "bands"
        assert job.projection.lr_pixels == by_name.projection.lr_pixels
        assert job.projection.host_parts == by_name.projection.host_parts


def test_requested_tile_means_tiles(tmp_path, models, monkeypatch):
    """Unless bands are requested by name."""
    monkeypatch.setattr("engine.probe.footprint.band_cost", lambda *_: BandCost(16, 1000.0, 1e-12))
    for requested, chosen in (("auto", "tiles"), ("tiles", "tiles"), ("bands", "bands")):
        job = Job.prepare(models["rrdb"], replace(SMALL, executor=requested, tile=16), tmp_path / "out.zarr")
        assert job.plan.executor == chosen
        assert job.plan.stages[-1].tile == 16


def test_bands_that_do_not_fit_give_way_to_tiles(tmp_path, models, monkeypatch):
    monkeypatch.setattr("engine.probe.footprint.band_cost", lambda *_: BandCost(16, 1e12, 1e-12))
    assert Job.prepare(models["rrdb"], replace(SMALL, executor="auto"), tmp_path / "out.zarr").plan.executor == "tiles"
    with pytest.raises(BudgetError, match=r"the narrowest strip of bands .* or use executor='tiles'"):
        Job.prepare(models["rrdb"], SMALL, tmp_path / "out.zarr")


def test_network_that_cannot_be_streamed_runs_in_tiles(tmp_path, models, monkeypatch):
    """A network that pools the whole picture."""
    pooled = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 3, 1))
    monkeypatch.setattr(Stage, "graph", property(lambda self: read_graph(pooled, 1)))
    job, _ = render(models["rrdb"], replace(SMALL, executor="auto", overlap="4"), tmp_path)
    assert job.plan.executor == "tiles"
    assert attributes(job.out)["complete"]
    with pytest.raises(UsageError, match=r"AdaptiveAvgPool2d \(_1\): cannot be streamed in bands .*executor=.tiles"):
        Job.prepare(models["rrdb"], SMALL, tmp_path / "other.zarr")
    assert [path.name for path in tmp_path.iterdir()] == ["out.zarr"]


@pytest.mark.parametrize("name", ["rrdb", "swinir"])
def test_projected_pixels_are_reported(tmp_path, models, name):
    """The work of a render is known before to a band of rows, and grows from the first band on."""
    for tile in (None, 24):
        for size in ((256, 192), (251, 187), (1, 1)):
            reported = [0, 0]

            def add(position, lr_pixels, reported=reported):
                reported[position] += lr_pixels

            request = replace(SMALL, size=size, tile=tile, overlap="8")
            job, _ = render(models[name], request, tmp_path / f"{tile} {size}", on_pixels=add)
            inputs = [job.plan.input_columns(strip) for strip in job.plan.column_strips()]
            widths = [sum(last - first for first, last in stage) for stage in zip(*inputs, strict=True)]
            projected = job.projection.lr_pixels
            for stage, width, expected, count in zip(job.plan.stages, widths, projected, reported, strict=True):
                assert abs(expected - count) <= stage.band * width, (tile, size)


# Exhausted memory


@pytest.fixture
def memory(monkeypatch):
    """Function ``memory(columns, pushes=0)``: a device on which a stream of more LR columns fails after so many bands."""
    push, count = Stage.push, []

    def limited(columns, pushes=0):
        def limited_push(stage, stream, band):
            if stream.plan.width > columns:
                count.append(stage)
                if len(count) > pushes:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nSee documentation")
            yield from push(stage, stream, band)

        monkeypatch.setattr(Stage, "push", limited_push)

    return limited


WIDE = replace(SMALL, size=(640, 400))


@pytest.mark.parametrize("name", ["noisy", pytest.param("swinir", marks=pytest.mark.slow)])
def test_strips_become_narrower_and_the_store_records_it(tmp_path, models, small_shards, memory, name):
    """Halos of one strip are exact, so narrower strips are the same image to rounding; finished shards stay."""
    planned, boxes = render(models[name], WIDE, tmp_path / "planned")
    assert len(boxes) == 7
    memory(130, pushes=planned.stages[1].stream_plan(160).delay // 16 + 3)
    lines = []
    job = Job.prepare(models[name], WIDE, tmp_path / "out.zarr", lines.append)
    written = []
    for done in job.run(job.open_sink()):
        written.append(done.box)
        if len(written) == 1:
            first = files(tmp_path / "out.zarr" / "0" / "c")
    assert job.plan == planned.plan
    wide = [box for box in written if box.width == 640]
    assert 0 < len(wide) < len(boxes)
    assert written[: len(wide)] == wide == boxes[: len(wide)]
    assert {box.width for box in written[len(wide) :]} == {320}
    assert len(written) == len(set(written))
    assert f"step 3: out of device memory; going on with strips of {job.cuts[-1].tile} px" in lines
    stored = attributes(job.out)
    assert stored["complete"]
    assert stored["plan"] == planned.plan.to_json()
    assert stored["cores"] == [cut.tile for cut in job.cuts]
    assert stored["seam_error_levels"] == 0
    assert first.items() <= files(tmp_path / "out.zarr" / "0" / "c").items()
    assert_equal_to_rounding(pixels(job.out), pixels(planned.out))


def test_resumed_render_keeps_the_narrower_strips(tmp_path, models, small_shards, memory):
    memory(110)
    whole, _ = render(models["noisy"], WIDE, tmp_path / "whole")
    assert [cut.tile for cut in whole.cuts] != [cut.tile for cut in whole.plan.stages]
    job = Job.prepare(models["noisy"], WIDE, tmp_path / "out" / "out.zarr")
    run = job.run(job.open_sink())
    next(run)
    run.close()
    job, _ = render(models["noisy"], WIDE, tmp_path / "out", resume=True)
    assert job.cuts == whole.cuts
    assert image_files(job.out) == image_files(whole.out)


def test_damaged_narrower_strips_are_refused(tmp_path, models, small_shards):
    job = Job.prepare(models["noisy"], WIDE, tmp_path / "out.zarr")
    job.open_sink().close()
    for tiles in ([20, 79], [80], "ab", [160, 160], 7, [0, 0]):
        group = zarr.open_group(job.out, mode="r+")
        group.attrs["ourgan"] = {**group.attrs["ourgan"], "cores": tiles}
        with pytest.raises(ResumeError, match="out.zarr: damaged, its tiles do not fit its plan"):
            Job.prepare(models["noisy"], WIDE, job.out).open_sink(resume=True)


@pytest.mark.parametrize(("tile", "strip"), [(64, 64), (None, 16)])
def test_narrowest_and_requested_strips_are_refused(tmp_path, models, small_shards, memory, tile, strip):
    memory(1)
    words = rf"step 3: strips of {strip} px do not fit the device's memory \(.*; finished shards are kept; .*vram"
    with pytest.raises(BudgetError, match=words):
        render(models["noisy"], replace(WIDE, tile=tile), tmp_path)
