"""The OME-Zarr store: its pyramid, resuming after a kill, refusals, and independent readers."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from ome_zarr_models.v05.image import Image
from support.plans import bands_of, plan_of
from support.stores import image_files

from engine.errors import InputError, ResumeError
from engine.geometry import Box
from engine.io.files import Lock
from engine.io.halving import halve, halve_interleaved
from engine.io.provenance import stored_plan
from engine.io.pyramid_writer import PyramidWriter
from engine.io.zarr_store import ZarrSink

PLANS = {
    "tiles of one shard": plan_of((200, 300), cores=(8, 16), halos=(0, 0)),
    "tiles of four shards": plan_of((150, 230), cores=(8, 16), halos=(0, 0), shard=32, chunk=16),
    "one shard": plan_of((50, 60), cores=(8, 16), halos=(0, 0)),
    "odd sizes": plan_of((257, 129), cores=(8, 16), halos=(0, 0), shard=32, chunk=32),
    "a region": plan_of((300, 420), cores=(8, 16), halos=(0, 0), roi=Box(33, 70, 200, 251)),
    "strips of one shard": bands_of((150, 230), cores=(8, 16), halos=(0, 0)),
    "strips of two shards": bands_of((257, 300), cores=(8, 32), halos=(0, 0), shard=64, chunk=32),
    "one strip that ends within a shard": bands_of((200, 150), cores=(16, 64), halos=(0, 0), shard=64, chunk=32),
    "a region in strips": bands_of((300, 420), cores=(8, 16), halos=(0, 0), roi=Box(33, 70, 200, 251)),
    "flat tiles": plan_of((257, 300), cores=(8, (16, 24)), halos=(0, 0), shard=(32, 96), chunk=(32, 48)),
    "flat shards": plan_of((150, 230), cores=(8, (10, 25)), halos=(0, 0)),
    "a row of pixels": plan_of((1, 700), cores=(8, 16), halos=(0, 0)),
}
PLAN = PLANS["tiles of four shards"]
LEVELS = len(PLAN.pyramid)
PROVENANCE = {"licences": ["CC0-1.0: test"]}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out.zarr"


@pytest.fixture
def opened():
    """Function that opens a sink after it has closed the one before, as the death of its process would."""
    sinks = []

    def open_next(make):
        for sink in sinks:
            sink.close()
        sinks.append(make())
        return sinks[-1]

    return open_next


@pytest.fixture
def create(path, opened):
    return lambda plan=PLAN, **options: opened(lambda: ZarrSink.create(path, plan, PROVENANCE, **options))


@pytest.fixture
def reopen(path, opened):
    return lambda plan=PLAN: opened(lambda: ZarrSink.resume(path, plan))


@pytest.fixture
def finished(create):
    sink = create()
    write_all(sink, pixels_of(PLAN))
    sink.finish()
    return sink


def pixels_of(plan):
    """uint8 [3, H, W]: every value, smooth and rough."""
    height, width = plan.size
    y, x = np.mgrid[0:height, 0:width]
    smooth = np.stack([y + x, 2 * y, 3 * x + 7]) % 256
    rough = np.random.default_rng(0).integers(0, 256, smooth.shape)
    return np.where((y // 16 + x // 16) % 2, smooth, rough).astype(np.uint8)


def write_all(sink, pixels, boxes=None):
    for box in list(sink.missing()) if boxes is None else boxes:
        rows, columns = box.slices
        sink.write(box, pixels[:, rows, columns])


def read(path, level=0):
    return zarr.open_array(path / str(level), mode="r")[:]


def shard_path(path, level, row, column):
    return path / str(level) / "c" / "0" / str(row) / str(column)


def mean_of_four(pixels):
    """An independent halving: in integers, an odd border counts twice, halves are rounded up."""
    c, h, w = pixels.shape
    padded = pixels[:, [*range(h), *[h - 1] * (h % 2)]][:, :, [*range(w), *[w - 1] * (w % 2)]].astype(int)
    sums = padded.reshape(c, -(-h // 2), 2, -(-w // 2), 2).sum(axis=(2, 4))
    return np.floor(sums / 4 + 0.5).astype(np.uint8)


def check_pyramid(path, plan, pixels):
    for level, size in enumerate(plan.pyramid):
        array = read(path, level)
        assert array.shape == (3, *size)
        np.testing.assert_array_equal(array, pixels)
        pixels = mean_of_four(pixels)


# Writing and resuming


@pytest.mark.parametrize("name", PLANS)
def test_interrupted_renders_end_in_the_same_pyramid(create, reopen, path, name):
    """Half the boxes, a new process, the rest in any order and one of them twice."""
    plan = PLANS[name]
    sink, pixels, boxes = create(plan), pixels_of(plan), list(plan.writes())
    assert list(sink.missing()) == boxes
    assert not sink.is_finished
    write_all(sink, pixels, boxes[::2])
    assert list(sink.missing()) == boxes[1::2]
    sink = reopen(plan)
    rest = list(sink.missing())
    assert rest == boxes[1::2]
    np.random.default_rng(0).shuffle(rest)
    write_all(sink, pixels, [*rest, boxes[0]])
    assert list(sink.missing()) == []
    assert sink.is_finished
    assert not sink.complete
    sink.finish()
    check_pyramid(path, plan, pixels)
    sink.finish()  # again: nothing changes
    sink = reopen(plan)
    assert sink.complete
    sink.finish()
    np.testing.assert_array_equal(read(path), pixels)


@pytest.mark.parametrize("name", ["odd sizes", "a region", "strips of two shards"])
def test_order_does_not_matter(create, path, name):
    plan = PLANS[name]
    for step in (1, -1):
        sink = create(plan, overwrite=True)
        write_all(sink, pixels_of(plan), list(plan.writes())[::step])
        sink.finish()
        check_pyramid(path, plan, pixels_of(plan))


def test_the_pyramid_grows_with_the_image(create, path):
    """There is no pass over the whole image at the end: a shard of a level exists as soon as its four children do."""
    sink, pixels, boxes = create(), pixels_of(PLAN), list(PLAN.writes())
    write_all(sink, pixels, boxes[:1])
    written = {index for index in PLAN.grid().indices() if shard_path(path, 0, *index).exists()}
    assert written == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert shard_path(path, 1, 0, 0).exists()
    assert not shard_path(path, 1, 0, 1).exists()
    assert not (path / "2/c").exists()
    write_all(sink, pixels)
    assert shard_path(path, LEVELS - 1, 0, 0).exists()


def test_flat_images_have_every_shard(create, reopen, path):
    """A Zarr store may leave out chunks of its fill value; here existence is the resume mark."""
    for value in (0, 255):
        sink = create(overwrite=True)
        write_all(sink, np.full((3, *PLAN.size), value, np.uint8))
        assert sink.is_finished
        sink.finish()
        for level in range(LEVELS):
            for index in PLAN.grid(level).indices():
                assert shard_path(path, level, *index).stat().st_size > 0, (value, level, index)
        assert reopen().is_finished


def test_partial_shards_are_missing_and_removed(create, reopen, path):
    boxes = list(PLAN.writes())
    write_all(create(), pixels_of(PLAN), boxes[1:])
    leftovers = [path / "0/c/0/0/0.1234.partial", path / "1/c/0/0/0.1234.partial"]
    for leftover in leftovers:
        leftover.parent.mkdir(parents=True, exist_ok=True)
        leftover.write_bytes(b"half a shard")
    sink = reopen()
    assert list(sink.missing()) == boxes[:1]
    assert not list(path.rglob("*.partial"))


def test_empty_shards_are_missing(create, reopen, path):
    """A loss of power can leave an empty file that was renamed before its content was on the disk."""
    pixels, boxes = pixels_of(PLAN), list(PLAN.writes())
    write_all(create(), pixels)
    shard_path(path, 0, 1, 1).write_bytes(b"")
    shard_path(path, 1, 0, 0).write_bytes(b"")
    sink = reopen()
    assert list(sink.missing()) == boxes[:1]
    write_all(sink, pixels)
    sink.finish()
    np.testing.assert_array_equal(read(path, 1), mean_of_four(pixels))


def test_finish_completes_the_pyramid(create, reopen, path):
    pixels = pixels_of(PLAN)
    write_all(create(), pixels)
    shutil.rmtree(path / "1/c/0/1")
    shutil.rmtree(path / "2/c")
    sink = reopen()
    assert sink.is_finished
    sink.finish()
    check_pyramid(path, PLAN, pixels)


def test_finish_names_the_missing_shard(create):
    for plan in (PLAN, PLANS["strips of two shards"]):
        sink = create(plan, overwrite=True)
        write_all(sink, pixels_of(plan), list(plan.writes())[:-1])
        with pytest.raises(ResumeError, match=r"out.zarr: the shard at \d+,\d+,\d+,\d+ is missing; .*resume=True"):
            sink.finish()
        assert not sink.complete


def test_notes_join_the_provenance(create, reopen):
    sink = create()
    sink.note({"seconds": 3})
    assert reopen().provenance == {
        "complete": False,
        "id": sink.provenance["id"],
        "plan": PLAN.to_json(),
        **PROVENANCE,
        "seconds": 3,
    }


def test_parts_of_dead_processes_are_removed_and_nothing_else(create, path):
    """A run may be killed while it creates the store. Names of other forms are the user's, and a locked part is alive."""
    digits = "0123456789abcdef" * 2
    dead, alive = (path.with_name(f".out.zarr.{x}.part") for x in (digits, digits[::-1]))
    users = [path.with_name(name) for name in ("out.zarr.part", "out.zarr.scratch", f".other.zarr.{digits}.part")]
    for folder in (dead, alive, *users):
        (folder / "0").mkdir(parents=True)
        (folder / "zarr.json").write_text("{")
    lock = Lock.take(alive)
    assert lock.held
    create()
    assert not dead.exists()
    assert all((folder / "zarr.json").exists() for folder in (alive, *users))
    assert stored_plan(path) == PLAN.to_json()


def test_a_run_killed_during_creation_leaves_no_store(create, path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("engine.io.store_layout.ome.image_metadata", killed)
    with pytest.raises(KeyboardInterrupt):
        create()
    assert not path.exists()


# One writer, one store


def test_a_store_has_one_writer(create, path):
    """Resuming and replacing are refused until the writer ends; two processes: tests/test_concurrent.py."""
    sink = create()
    write_all(sink, pixels_of(PLAN), list(PLAN.writes())[:1])
    for attempt in (
        lambda: ZarrSink.resume(path, PLAN),
        lambda: ZarrSink.create(path, dataclasses.replace(PLAN, seed=9), {}, overwrite=True),
    ):
        with pytest.raises(ResumeError, match=rf"is being written by another process \({os.getpid()}\); wait"):
            attempt()
    write_all(sink, pixels_of(PLAN))
    sink.finish()
    assert ZarrSink.resume(path, PLAN).complete
    check_pyramid(path, PLAN, pixels_of(PLAN))


@pytest.mark.parametrize("act", ["write", "note", "finish"])
@pytest.mark.parametrize("fate", ["deleted", "renamed", "replaced", "made incomplete elsewhere"])
def test_a_store_that_goes_while_it_is_written_is_noticed(create, path, tmp_path, act, fate):
    pixels, boxes = pixels_of(PLAN), list(PLAN.writes())
    sink = create()
    write_all(sink, pixels, boxes[:-1])
    if fate == "deleted":
        shutil.rmtree(path)
    elif fate == "made incomplete elsewhere":
        group = zarr.open_group(path)
        group.attrs["ourgan"] = {**group.attrs["ourgan"], "id": "another"}
    else:
        path.rename(tmp_path / "aside.zarr")
        if fate == "replaced":
            ZarrSink.create(path, PLAN, PROVENANCE).close()
    before = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))
    acts = {
        "write": lambda: write_all(sink, pixels, boxes[-1:]),
        "note": lambda: sink.note({"a": 1}),
        "finish": sink.finish,
    }
    with pytest.raises(ResumeError, match="removed, renamed or replaced while it was written") as caught:
        acts[act]()
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)
    assert sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*")) == before


def test_the_old_store_is_kept_until_the_new_one_is_complete(finished, create, reopen, path, tmp_path):
    other = dataclasses.replace(PLAN, seed=9)
    for _ in range(2):  # the second time over an unfinished one: the complete one is kept
        sink = create(other, overwrite=True)
        write_all(sink, pixels_of(other), list(other.writes())[:1])
        assert stored_plan(sink.replaced)["seed"] == 1
        np.testing.assert_array_equal(read(sink.replaced), pixels_of(PLAN))
        assert len(list(tmp_path.iterdir())) == 2
    sink = reopen(other)
    write_all(sink, pixels_of(other))
    sink.finish()
    assert [p.name for p in tmp_path.iterdir()] == ["out.zarr"]
    assert stored_plan(path)["seed"] == 9


def test_overwrite_refuses_what_no_render_wrote(finished, create, path, tmp_path):
    foreign = tmp_path / "measurements.zarr"
    group_with(foreign, mine=True)
    with pytest.raises(ResumeError, match="not a Zarr store of this engine"):
        ZarrSink.create(foreign, PLAN, {}, overwrite=True)
    for name in ("notes.txt", "0/notes.txt", "0/c/notes.txt", "labels/zarr.json", "0/c/0/0/notes"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("years of work")
        with pytest.raises(ResumeError, match=f"holds {name}, which no render wrote"):
            create(overwrite=True)
        (path / name).unlink()
    create(overwrite=True)


KILLED = """
import os, pathlib, signal, sys
import numpy as np
from engine.geometry import Box, Grid
from engine.io.pyramid_writer import PyramidWriter
from engine.io.zarr_store import ZarrSink
from engine.run.tile_cache import Scratch
from support.plans import plan_of

folder, step = pathlib.Path(sys.argv[1]), sys.argv[2]
plan = plan_of((150, 230), cores=(8, 16), halos=(0, 0), shard=32, chunk=16)
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if step == "scratch":
    scratch = Scratch(folder / "scratch", Grid(50, 70, (20, 30)), np.float32)
    scratch.write((0, 0), np.ones((3, 20, 30), np.float32))
    pathlib.Path.replace = die
    scratch.write((0, 1), np.ones((3, 20, 30), np.float32))
sink, boxes = ZarrSink.create(folder / "out.zarr", plan, {}), list(plan.writes())
sink.write(boxes[0], np.ones((3, *boxes[0].shape), np.uint8))
if step == "fsync":
    os.fsync = die
else:
    pathlib.Path.replace = die
sink.write(boxes[1], np.ones((3, *boxes[1].shape), np.uint8))
"""


@pytest.mark.parametrize("step", ["fsync", "replace", "scratch"])
def test_a_killed_write_leaves_no_shard_and_no_lock(tmp_path, step):
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
    child = subprocess.run([sys.executable, "-c", KILLED, tmp_path, step], check=False, env=environment)
    assert child.returncode == -signal.SIGKILL
    store = tmp_path / ("scratch" if step == "scratch" else "out.zarr")
    assert len(list(store.rglob("*.partial"))) == 1
    shards = {p.relative_to(store).as_posix() for p in store.rglob("*") if p.is_file() and p.name.isdigit()}
    if step == "scratch":
        assert shards == {"c/0/0/0"}
        return
    assert shards == {"0/c/0/0/0", "0/c/0/0/1", "0/c/0/1/0", "0/c/0/1/1", "1/c/0/0/0"}
    sink = ZarrSink.resume(store, PLAN)
    assert sink.lost == 0
    assert len(list(sink.missing())) == len(list(PLAN.writes())) - 1
    assert not list(store.rglob("*.partial"))


# Halving


def test_halve_rounds_halves_up():
    for values, mean in (([0, 0, 0, 1], 0), ([0, 0, 1, 1], 1), ([255] * 4, 255), ([1, 2, 2, 2], 2)):
        assert halve(np.array(values, np.uint8).reshape(1, 2, 2)).item() == mean
    assert halve(np.full((1, 2, 2), 65535, np.uint16)).item() == 65535


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000))
def test_halve_matches_an_independent_mean(height, width, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (3, height, width)).astype(np.uint8)
    np.testing.assert_array_equal(halve(pixels), mean_of_four(pixels))
    interleaved = halve_interleaved(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    np.testing.assert_array_equal(interleaved.transpose(2, 0, 1), mean_of_four(pixels))


# Refusals


def test_an_existing_store_is_kept_or_replaced(finished, create):
    with pytest.raises(ResumeError) as caught:
        create()
    assert str(caught.value).endswith(
        "out.zarr: exists; give resume=True to finish it, overwrite=True to replace it, or another out"
    )
    assert "give --resume to finish it, --overwrite to" in caught.value.for_command_line()
    assert finished.complete
    sink = create(overwrite=True)
    assert list(sink.missing()) == list(PLAN.writes())
    assert not sink.complete
    assert not list(finished.path.parent.glob("*.part"))


def test_folders_files_and_links_are_never_deleted(finished, create, tmp_path):
    folder, file, link = tmp_path / "folder", tmp_path / "file", tmp_path / "link.zarr"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    file.write_text("years of work")
    link.symlink_to(finished.path)
    for target in (folder, file, link):
        for overwrite in (True, False):
            with pytest.raises(ResumeError, match="not a Zarr store" if overwrite else "exists; give"):
                ZarrSink.create(target, PLAN, {}, overwrite=overwrite)
    assert (folder / "thesis.txt").read_text() == file.read_text() == "years of work"
    assert finished.complete
    assert shard_path(finished.path, 0, 0, 0).exists()


def test_an_empty_folder_may_be_overwritten(create, path):
    path.mkdir()
    assert not create(overwrite=True).complete


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be created"):
        ZarrSink.create(tmp_path / "file" / "out.zarr", PLAN, {})


def test_resume_refuses_another_plan_and_names_the_difference(create, path):
    create()
    other = dataclasses.replace(PLAN, seed=99, precision="bf16")
    with pytest.raises(ResumeError, match=r"another plan .*seed: 1 there, 99 here.*precision") as caught:
        ZarrSink.resume(path, other)
    assert "--overwrite" in caught.value.for_command_line()
    assert stored_plan(path)["seed"] == 1
    with pytest.raises(ResumeError) as caught:
        ZarrSink.resume(path, plan_of((60, 60)))
    assert "\n" not in str(caught.value)


def group_with(path, **attributes):
    zarr.open_group(path, mode="w", zarr_format=3).attrs.update(attributes)


def folder_with(path, name, content):
    path.mkdir()
    (path / name).write_text(content)


def test_resume_refuses_everything_but_a_store(tmp_path):
    others = {
        "nothing": lambda path: None,
        "a file": lambda path: path.write_text("{}"),
        "a folder": lambda path: folder_with(path, "thesis.txt", ""),
        "an image of other software": lambda path: group_with(path, ome={"version": "0.5"}),
        "an array": lambda path: zarr.create_array(path, shape=(4,), chunks=(2,), dtype="u1"),
        "half a JSON file": lambda path: folder_with(path, "zarr.json", '{"zarr_format": 3, "node_ty'),
        "an empty JSON file": lambda path: folder_with(path, "zarr.json", "{}"),
        "an attribute of another type": lambda path: group_with(path, ourgan="yes"),
        "no plan": lambda path: group_with(path, ourgan={"complete": True}),
    }
    for name, make in others.items():
        path = tmp_path / name
        make(path)
        assert stored_plan(path) is None, name
        with pytest.raises(ResumeError, match="not a store of this engine"):
            ZarrSink.resume(path, PLAN)


def test_resume_refuses_a_damaged_array(create, reopen, path):
    for content in (None, "", "{}", "[]"):
        create(overwrite=True)
        (path / "1" / "zarr.json").unlink()
        if content is not None:
            (path / "1" / "zarr.json").write_text(content)
        with pytest.raises(ResumeError, match=r"damaged, .*; give overwrite=True"):
            reopen()


# Independent readers


@pytest.mark.parametrize("name", ["tiles of four shards", "a region in strips"])
def test_tensorstore_reads_the_same_bits(create, name):
    plan = PLANS[name]
    sink, pixels = create(plan), pixels_of(plan)
    write_all(sink, pixels)
    sink.finish()
    for level in range(len(plan.pyramid)):
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(sink.path / str(level))}}
        array = tensorstore.open(spec, open=True).result()
        assert array.domain.labels == ("c", "y", "x")
        np.testing.assert_array_equal(array.read().result(), pixels)
        pixels = mean_of_four(pixels)


def test_metadata_is_valid_ome_zarr(create):
    """A region is placed in the canvas; a pixel of level i lies at the centre of the 2**i x 2**i pixels that it averages."""
    for plan in PLANS.values():
        image = Image.from_zarr(zarr.open_group(create(plan, overwrite=True).path, mode="r"))
        (multiscale,) = image.ome_attributes.multiscales
        assert multiscale.name == "out"
        assert [axis.name for axis in multiscale.axes] == ["c", "y", "x"]
        assert [axis.type for axis in multiscale.axes] == ["channel", "space", "space"]
        assert [dataset.path for dataset in multiscale.datasets] == [str(i) for i in range(len(plan.pyramid))]
        colours = [channel["color"] for channel in image.ome_attributes.omero["channels"]]
        assert colours == ["FF0000", "00FF00", "0000FF"]
        for level, dataset in enumerate(multiscale.datasets):
            scale, translation = dataset.coordinateTransformations
            assert list(scale.scale) == [1, 2**level, 2**level]
            centre = sum(range(2**level)) / 2**level
            assert list(translation.translation) == [0, plan.roi.y0 + centre, plan.roi.x0 + centre]


def test_provenance_and_plan_are_in_the_store(create, path):
    create()
    attributes = json.loads((path / "zarr.json").read_text())["attributes"]["ourgan"]
    identity = attributes.pop("id")
    assert re.fullmatch("[0-9a-f]{32}", identity)
    assert attributes == {"complete": False, "plan": PLAN.to_json(), **PROVENANCE}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("limit", [1 << 20, 2000])
def test_pyramid_from_memory_is_that_from_the_disk(tmp_path, monkeypatch, plan, limit):
    """With room for all halves no shard is read; with little, some are."""
    reads = []
    read = PyramidWriter._read
    monkeypatch.setattr(PyramidWriter, "_read", lambda own, *index: reads.append(index) or read(own, *index))
    stores = {}
    for name, kept in (("disk", 0), ("memory", limit)):
        reads.clear()
        sink = ZarrSink.create(tmp_path / name / "out.zarr", plan, PROVENANCE)
        sink.keep_halves(kept)
        write_all(sink, pixels_of(plan))
        sink.finish()
        stores[name] = image_files(sink.path), len(reads)
    assert stores["memory"][0] == stores["disk"][0]
    assert stores["memory"][1] <= stores["disk"][1]
    assert limit == 2000 or not reads
